"""Processes that read untrusted files: started with nothing of ours, then closed in.

The kernel's seccomp filter does it: once closed in, a process computes, reads and writes the files that it was given
open, and ends. It opens no file, has no network, starts no program, process or thread, and reaches no other process.
This takes no privilege and works in containers, where a network namespace needs a capability that they do not have.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jobs.errors import UnsupportedError

_KEPT = ("LD_LIBRARY_PATH",)
"""Variables that a process may need to find its libraries, and that say nothing else."""

_SAID_BYTES = 4096

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1  # every thread of the process
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET = 0, 4
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the tables below, and AUDIT_ARCH of linux/audit.h."""

_SECCOMP = (317, 277)

ALLOWED = {
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "sched_yield": (24, 124),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "exit": (60, 93),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "exit_group": (231, 94),
    "getrandom": (318, 278),
}
"""What a closed process may ask of the kernel: numbers on x86_64 and aarch64. Anything else answers EPERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a closed process may take."""

    memory_bytes: int
    """Address space beyond what it has when it is closed in."""
    file_bytes: int
    """Size of a file it writes."""
    cpu_seconds: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int | None
    """Exit code; a negative signal number when it was killed; None when it took too long."""
    said: str
    """The end of what it wrote to stdout and stderr."""


def run_isolated(
    program: str, arguments: Sequence[str], *, stdin: BinaryIO, descriptors: Sequence[int], seconds: float
) -> Ended:
    """Run a Python program in a process of its own that inherits no variables, no descriptors and no home.

    It imports the modules of this process, from the same path. Closing itself in is its own first deed, once it has
    imported what it needs.

    Args:
        program: Python code.
        arguments: its `sys.argv[1:]`.
        stdin: the file it reads.
        descriptors: further ones it keeps, under their numbers.
        seconds: after which it is killed.
    """
    with tempfile.TemporaryFile() as said:
        try:
            code: int | None = subprocess.run(  # noqa: S603 - our own interpreter and program
                isolated_command(program, arguments),
                env=bare_environment(),
                cwd="/",
                stdin=stdin,
                stdout=said,
                stderr=subprocess.STDOUT,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for this process to act upon
                timeout=seconds,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(max(0, said.seek(0, os.SEEK_END) - _SAID_BYTES))
        return Ended(code, said.read().decode(errors="replace"))


def isolated_command(program: str, arguments: Sequence[str] = ()) -> list[str]:
    """Return a command that runs a Python program with the modules of this process; its environment changes none."""
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop()); {program}"
    path = json.dumps([os.path.abspath(entry) for entry in sys.path])  # noqa: PTH100 - an empty entry is a directory
    return [sys.executable, "-I", "-c", start, *arguments, path]


def bare_environment() -> dict[str, str]:
    """Return the variables of a process that gets nothing of ours: no credentials, no home."""
    environment = {"HOME": os.devnull, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return environment | {name: os.environ[name] for name in _KEPT if name in os.environ}


def close_in(limits: Limits) -> None:
    """Close this process in, for good.

    Args:
        limits: what it may still take.

    Raises:
        UnsupportedError: this kernel or machine cannot; the process must not go on then.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _ARCHITECTURES:
        raise UnsupportedError(
            f"a process cannot be closed in on {sys.platform} {machine}; expected Linux on "
            f"{' or '.join(_ARCHITECTURES)}"
        )
    column, architecture = _ARCHITECTURES[machine]
    libc = ctypes.CDLL(None, use_errno=True)
    die_with_parent()
    _set_limits(limits)
    program = _filter(architecture, [numbers[column] for numbers in ALLOWED.values()])
    instructions = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program) // 8, ctypes.addressof(instructions)))
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.syscall(
        ctypes.c_long(_SECCOMP[column]),
        ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC),
        header,
    ):
        raise UnsupportedError(
            f"a process cannot be closed in here: the kernel refuses a seccomp filter "
            f"({os.strerror(ctypes.get_errno())}); allow it to, or use another machine"
        )


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _set_limits(limits: Limits) -> None:
    bound(limits)
    _lower(resource.RLIMIT_NOFILE, 0)


def bound(limits: Limits) -> None:
    """Bound what this process may still take, for good; it can still open files."""
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    for kind, most in (
        (resource.RLIMIT_AS, num_pages * resource.getpagesize() + limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _lower(kind, most)


def _lower(kind: int, most: int) -> None:
    _, before = resource.getrlimit(kind)
    limit = most if before == resource.RLIM_INFINITY else min(most, before)
    resource.setrlimit(kind, (limit, limit))


def _filter(architecture: int, allowed: Sequence[int]) -> bytes:
    """Return a program for the kernel's packet filter, as seccomp(2) takes it."""
    instructions = [
        (_LOAD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_IF_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_OFFSET),
        *((_JUMP_IF_EQUAL, len(allowed) - place, 0, number) for place, number in enumerate(allowed)),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
