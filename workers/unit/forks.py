"""Calls in processes of their own, of bounded time and memory, that cost milliseconds.

A server that has imported everything forks a child for each call. What a call imports of the same libraries beyond
that, such as the one architecture of a model, the server imports after it: the next call finds it. It has one thread,
as no other process can be forked without the danger that a lock stays held in the child for ever; it has no variables
of ours, and ends with the process it serves. Where this process has one thread itself, the server is a fork of it, and
shares its memory; elsewhere it is started anew, which takes as long as importing the libraries does.

The forkserver of `multiprocessing` would import the main program again in each child, and hand it our variables.
"""

import atexit
import contextlib
import importlib
import json
import os
import pickle
import select
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from jobs.errors import MergefleetError, TransientIOError
from workers.files.collector import loading, pass_over_modules
from workers.sources.confinement import Limits, bare_environment, bound, die_with_parent, isolated_command

_LENGTH = struct.Struct("<Q")
_MAX_ANSWER_BYTES = 32 << 10
"""Less than a pipe holds: a child never waits for its reader."""
_MAX_SAID = 1_000
_MAX_IMPORTED = 200
"""Names of modules."""
_PROGRAM = "from workers.unit.forks import main; main()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What one call may take."""

    cpu_seconds: int
    memory_bytes: int
    """Address space beyond what the libraries take."""

    @property
    def seconds(self) -> float:
        """After which it is killed though it computes nothing: on a busy machine time passes faster than work."""
        return 30.0 + 10 * self.cpu_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """How a call ended."""

    overran: str | None = None
    """What it took too much of, in words; None when it came to its end."""
    error: str | None = None
    """The exception it ended with that is none of ours, in one line."""
    traceback: str = ""
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    """Of main memory, the libraries included."""


class ForkServer:
    """Runs calls one after the other; safe from any thread."""

    def __init__(self, prepare: Callable[[], None]) -> None:
        """Take what the server does before the first call; nothing is started yet.

        Args:
            prepare: of a module, which is imported with all that it imports.
        """
        self._prepare = prepare
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | int | None = None

    def start(self) -> None:
        """Start the server where it does not run yet; does not wait for it."""
        with self._lock:
            self._start()

    def call(self, function: Callable[..., None], *arguments: Any, bounds: Bounds) -> Answer:
        """Call a function of a module in a bounded process.

        Args:
            function: returns nothing; an error of ours that it raises counts as its end.
            arguments: what pickle takes.
            bounds: what it may take.

        Raises:
            TransientIOError: the server was ended from outside.
        """
        message = pickle.dumps((_name_of(function), arguments, bounds))
        with self._lock:
            for _ in range(2):  # it may have ended since the last call
                served = self._start()
                with contextlib.suppress(OSError, EOFError):
                    _send(served, message)
                    return Answer(**json.loads(_receive(served)))
                self._close()
        raise TransientIOError("the process that looks at files before they are used was ended from outside")

    def close(self) -> None:
        """End the server."""
        with self._lock:
            self._close()

    def _start(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair()
        with theirs:
            if len(os.listdir("/proc/self/task")) == 1:  # noqa: PTH208 - names are counted
                self._process = self._fork(ours, theirs)
            else:
                self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and program
                    isolated_command(_PROGRAM, [_name_of(self._prepare)]),
                    env=bare_environment(),
                    cwd="/",
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        self._socket = ours
        atexit.register(self.close)
        return ours

    def _fork(self, ours: socket.socket, theirs: socket.socket) -> int:
        process = os.fork()
        if process:
            return process
        try:  # the server: a child of this process
            ours.close()
            os.setsid()
            os.dup2(theirs.fileno(), 0)
            quiet = os.open(os.devnull, os.O_RDWR)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") > 0 else 1 << 16)
            os.environ.clear()
            os.environ.update(bare_environment())
            os.chdir("/")
            self._prepare()
            _serve()
        finally:
            os._exit(0)

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        process, self._process = self._process, None
        # It ends when its socket is closed; a child that is at work is killed by it.
        if isinstance(process, int):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process, 0)
        elif process is not None:
            process.wait()


def main() -> NoReturn:
    """Serve the socket that is stdin; the argument names what is done before the first call."""
    with loading():
        _function(sys.argv[1])()
    _serve()


def _serve() -> NoReturn:
    pass_over_modules()
    with socket.socket(fileno=0) as served, contextlib.suppress(OSError, EOFError):
        while True:
            name, arguments, bounds = pickle.loads(_receive(served))  # noqa: S301 - from the process that started it
            answer = _run(name, arguments, bounds, served)
            imported = answer.pop("imported", [])
            _send(served, json.dumps(answer).encode())
            for each in imported:
                with contextlib.suppress(Exception):  # some are made by code, and not to be found by their names
                    importlib.import_module(each)
    os._exit(0)


def _run(name: str, arguments: tuple[Any, ...], bounds: Bounds, served: socket.socket) -> dict[str, Any]:
    """Fork, wait for the child no longer than it may take, and return its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _work(name, arguments, bounds, writer)
    os.close(writer)
    try:
        late = not _ended(child, bounds.seconds, served)
        _, status, usage = os.wait4(child, 0)
        answer = _read_all(reader)
    finally:
        os.close(reader)
    cpu_seconds = usage.ru_utime + usage.ru_stime
    found: dict[str, Any] = {"cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss << 10}
    if late:
        return found | {"overran": f"more than {bounds.seconds:.0f} seconds"}
    if cpu_seconds > bounds.cpu_seconds - 0.5:  # the kernel counts in ticks
        return found | {"overran": f"more than {bounds.cpu_seconds} seconds of a processor"}
    if os.waitstatus_to_exitcode(status) != 0:
        # The libraries in C and Rust end the process where they get no memory.
        return found | {"overran": f"more than {bounds.memory_bytes >> 20} MiB of memory, or it crashed"}
    told: dict[str, Any] = json.loads(answer)
    return found | told


def _ended(child: int, seconds: float, served: socket.socket) -> bool:
    """Wait for a child; kill it when its time is over, or when the process that wanted it has ended."""
    descriptor = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.register(served, select.POLLRDHUP)
        ready = poll.poll(seconds * 1000)
    finally:
        os.close(descriptor)
    if any(number == descriptor for number, _ in ready):
        return True
    os.kill(child, 9)
    return False


def _work(name: str, arguments: tuple[Any, ...], bounds: Bounds, writer: int) -> NoReturn:
    """Be the child."""
    answer: dict[str, Any] = {}
    try:
        die_with_parent()
        os.close(0)
        bound(Limits(memory_bytes=bounds.memory_bytes, file_bytes=0, cpu_seconds=bounds.cpu_seconds))
        before = set(sys.modules)
        _function(name)(*arguments)
        answer["imported"] = _of_libraries(set(sys.modules) - before, before)
    except MergefleetError:
        pass  # the caller comes to it itself, and says so
    except MemoryError:
        answer = {"overran": f"more than {bounds.memory_bytes >> 20} MiB of memory"}
    except BaseException as error:  # noqa: BLE001 - this is the edge of the process
        said = f"{type(error).__name__}: {error}"[:_MAX_SAID]
        answer = {"error": said, "traceback": "".join(traceback.format_exception(error))[-_MAX_SAID:]}
    os.write(writer, json.dumps(answer).encode()[:_MAX_ANSWER_BYTES])
    os._exit(0)


def _name_of(function: Callable[..., None]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def _function(name: str) -> Callable[..., None]:
    module, _, function = name.partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), function)
    return found


def _of_libraries(imported: set[str], before: set[str]) -> list[str]:
    """Return those of some modules that belong to packages which were there before: no code from elsewhere is one."""
    packages = {name.partition(".")[0] for name in before}
    return sorted(name for name in imported if name.partition(".")[0] in packages)[:_MAX_IMPORTED]


def _read_all(reader: int) -> bytes:
    parts = []
    while part := os.read(reader, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def _send(to: socket.socket, message: bytes) -> None:
    to.sendall(_LENGTH.pack(len(message)) + message)


def _receive(source: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_receive_exactly(source, _LENGTH.size))
    return _receive_exactly(source, length)


def _receive_exactly(source: socket.socket, num_bytes: int) -> bytes:
    parts = b""
    while len(parts) < num_bytes:
        part = source.recv(min(1 << 20, num_bytes - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return parts
