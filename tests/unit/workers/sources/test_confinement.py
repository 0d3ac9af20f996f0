"""What a closed process can still do: compute, read and write what it was given open, and nothing else."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from workers.sources.confinement import _SECCOMP, ALLOWED, Limits, run_isolated

HEADERS = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
CLOSE_IN = "from workers.sources.confinement import Limits, close_in; close_in({limits!r})"
PLENTY = Limits(memory_bytes=1 << 30, file_bytes=1 << 20, cpu_seconds=60)

ATTEMPTS = """
import ctypes, json, os, signal, socket, subprocess, sys, threading
port, secret, closed = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "closed"
parent = os.getppid()
libc = ctypes.CDLL(None, use_errno=True)
def system_call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
attempts = {
    "connect": lambda: socket.socket().connect(("127.0.0.1", port)),
    "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "unix": lambda: socket.socket(socket.AF_UNIX),
    "pair": lambda: socket.socketpair(),
    "io_uring": lambda: system_call(425, 1, ctypes.create_string_buffer(120)),
    "open": lambda: open(secret).read(),
    "make": lambda: open(secret + ".made", "w"),
    "remove": lambda: os.unlink(secret + ".made"),
    "environment of the parent": lambda: open(f"/proc/{parent}/environ", "rb").read(),
    "list": lambda: os.listdir("/"),
    "run": lambda: subprocess.run(["/bin/true"], check=True),
    "fork": lambda: os.fork() or os._exit(0),
    "execute": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    "thread": lambda: threading.Thread(target=print).start(),
    "signal": lambda: os.kill(parent, 0),
    "more limits": lambda: system_call(302, 0, 7, None, None),
}
if closed:
    CLOSE_IN
found = {}
for name, attempt in attempts.items():
    try:
        attempt()
        found[name] = "done"
    except Exception as error:
        found[name] = getattr(error, "errno", None) or type(error).__name__
sys.stdout.write(chr(10) + json.dumps(found))
"""


def run(program, *arguments, limits=PLENTY, descriptors=(), seconds=60):
    with Path(os.devnull).open("rb") as nothing:
        return run_isolated(
            program.replace("CLOSE_IN", CLOSE_IN.format(limits=limits)),
            list(arguments),
            stdin=nothing,
            descriptors=descriptors,
            seconds=seconds,
        )


def attempts(directory, state):
    """Let a process try everything, and return what came of it and how many connections arrived."""
    secret = directory / "secret"
    secret.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ended = run(ATTEMPTS, str(listener.getsockname()[1]), str(secret), state)
        assert ended.code == 0, ended.said
        listener.settimeout(0)
        try:
            listener.accept()[0].close()
            connected = True
        except BlockingIOError:
            connected = False
    return json.loads(ended.said.splitlines()[-1]), connected


def test_a_closed_process_reaches_nothing(tmp_path):
    found, connected = attempts(tmp_path, "closed")
    refused = {1, "RuntimeError"}  # EPERM; "can't start new thread"
    assert {name: result for name, result in found.items() if result not in refused} == {}
    assert not connected
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_the_same_attempts_succeed_in_an_open_process(tmp_path):
    found, connected = attempts(tmp_path, "open")
    usual = {"connect", "datagram", "unix", "pair", "open", "make", "remove", "list", "run", "thread", "signal"}
    assert {name: found[name] for name in usual} == dict.fromkeys(usual, "done")
    assert connected


def test_a_process_inherits_no_credentials(monkeypatch, tmp_path):
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "MERGEFLEET_STORE",
        "RAY_AUTH_TOKEN",
        "PYTHONPATH",
        "HTTPS_PROXY",
    ):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    with (tmp_path / "open").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        ended = run(
            "import json, os; from pathlib import Path; files = os.listdir('/proc/self/fd'); "
            "print(json.dumps([dict(os.environ), os.path.expanduser('~'), os.getcwd(), "
            f"str({ours.fileno()}) in files]))"
        )
    environment, home, directory, has_ours = json.loads(ended.said)
    assert environment.pop("LD_LIBRARY_PATH") == str(tmp_path)
    assert environment == {"HOME": "/dev/null", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    assert (home, directory, has_ours) == ("/dev/null", "/", False)


def test_a_process_imports_what_this_one_imports():
    import torch

    import workers

    ended = run("import sys, torch, workers; print(workers.__file__, torch.__file__, sys.flags.isolated)")
    assert ended.said.split() == [workers.__file__, torch.__file__, "1"]


def test_memory_is_limited():
    ended = run("CLOSE_IN\nsmall = bytearray(1 << 20)\nlarge = bytearray(2 << 30)")
    assert ended.code == 1
    assert "MemoryError" in ended.said


def test_files_are_limited(tmp_path):
    with (tmp_path / "out").open("wb") as target:
        program = "import os, sys; CLOSE_IN\nfor _ in range(3): print(os.write(int(sys.argv[1]), bytes(1 << 19)))"
        ended = run(program, str(target.fileno()), descriptors=[target.fileno()])
    assert "File too large" in ended.said
    assert (tmp_path / "out").stat().st_size == 1 << 20


def test_time_is_limited():
    limits = Limits(memory_bytes=1 << 30, file_bytes=1 << 20, cpu_seconds=1)
    assert run("CLOSE_IN\nwhile True: pass", limits=limits).code == -signal.SIGKILL
    assert run("import time; time.sleep(60)", seconds=0.5).code is None


def test_what_it_says_is_cut():
    assert len(run("print('x' * (1 << 20))").said) == 4096


def test_it_does_not_outlive_a_killed_parent():
    read_end, write_end = os.pipe()
    program = f"import os; {CLOSE_IN.format(limits=PLENTY)}; os.write({write_end}, b'closed')\nwhile True: pass"
    parent_program = (
        "from workers.sources.confinement import run_isolated; "
        f"run_isolated({program!r}, [], stdin=open('/dev/null', 'rb'), descriptors=[{write_end}], seconds=60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_program], pass_fds=[write_end])
    os.close(write_end)
    try:
        assert os.read(read_end, 100) == b"closed"
    finally:
        parent.kill()
        parent.wait()
    ready, _, _ = select.select([read_end], [], [], 30)
    assert ready, "the process is still there"
    assert os.read(read_end, 100) == b""
    os.close(read_end)


def test_numbers_are_those_of_the_kernel():
    if missing := [path for path in HEADERS if not path.exists()]:
        pytest.skip(f"no kernel headers: {missing[0]}")
    for column, path in enumerate(HEADERS):
        defined = re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", path.read_text(), re.MULTILINE)
        numbers = {name: int(number) for name, number in defined}
        expected = {name: numbers[name] for name in (*ALLOWED, "seccomp")}
        assert {name: both[column] for name, both in (ALLOWED | {"seccomp": _SECCOMP}).items()} == expected
