"""A driver in a process of its own, which is started anew when it ends in a way that no one asked for.

Ray ends the process of a driver, without an exception, when its control service is gone. This process
knows no Ray: it waits, and begins again, with a new Ray where that is local.
"""

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

logger = logging.getLogger(__name__)

_MAX_QUICK_ENDS = 5
"""In a row: then it is no accident."""
_QUICK_SECONDS = 30.0
_STOPS = (signal.SIGINT, signal.SIGTERM)


class Supervisor:
    """Runs a driver again and again, until it ends in order or is told to stop. For a process with one thread."""

    def __init__(
        self,
        drive: Callable[[str | None, Callable[[str], None]], int],
        first_pause_seconds: float = 1.0,
    ) -> None:
        """Take what drives.

        Args:
            drive: called in a process of its own, with the name of the driver that it follows, if there was one, and
                what it tells its own name to. Returns an exit code when it has ended in order.
            first_pause_seconds: how long to wait before a driver is started anew; twice as long each time.
        """
        self._drive = drive
        self._first_pause_seconds = first_pause_seconds
        self._pid = 0
        self._stopping = False
        self._woken = -1
        """Readable once a signal has come: one that comes just before a wait must end it, too."""

    def run(self) -> int:
        """Run drivers until one ends in order, this process is told to stop, or they end quickly again and again.

        Returns:
            The exit code of the last one.
        """
        self._woken, wake = os.pipe()
        os.set_blocking(wake, False)
        before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        previous = {number: signal.signal(number, self._pass_on) for number in _STOPS}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
            os.close(self._woken)
            os.close(wake)

    def _run(self) -> int:
        name: str | None = None
        num_quick = 0
        while True:
            begin = time.monotonic()
            code, said, in_order = self._run_one(name)
            if in_order or self._stopping:
                return code
            name = said or name
            num_quick = num_quick + 1 if time.monotonic() - begin < _QUICK_SECONDS else 1
            if num_quick >= _MAX_QUICK_ENDS:
                logger.error("the driver ends again and again; given up", extra={"code": code, "driver": name})
                return code
            pause = self._first_pause_seconds * 2.0 ** (num_quick - 1)
            logger.warning(
                "the driver ended unasked and starts anew", extra={"code": code, "driver": name, "pause_seconds": pause}
            )
            select.select([self._woken], [], [], pause)
            if self._stopping:
                return code

    def _run_one(self, predecessor: str | None) -> tuple[int, str | None, bool]:
        """Run one driver; return its exit code, its name where it said so, and whether it ended in order."""
        lifeline, held = os.pipe()
        heard, said = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal in between would find no process, and be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        self._pid = os.fork()
        if self._pid == 0:
            os.close(held)
            os.close(heard)
            self._drive_here(predecessor, lifeline, said)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        os.close(lifeline)
        os.close(said)
        words = self._listen(heard)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        os.close(held)
        lines = words.decode().splitlines()
        code = os.waitstatus_to_exitcode(status)
        in_order = lines[-1:] == [_IN_ORDER]
        names = [line for line in lines if line != _IN_ORDER]
        return (code if code >= 0 else 128 - code), (names[-1] if names else None), in_order

    def _listen(self, heard: int) -> bytes:
        """Return all that a driver says until it has ended, and close what it says it to."""
        said = b""
        while True:
            ready, _, _ = select.select([heard, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 512)  # the handler runs before the next wait
            if heard in ready:
                more = os.read(heard, 4096)
                if not more:
                    os.close(heard)
                    return said
                said += more

    def _drive_here(self, predecessor: str | None, lifeline: int, said: int) -> None:
        """Drive in this process, the child's; never returns."""
        os.setpgid(0, 0)  # a Ctrl-C at the terminal comes by the supervisor alone, or it would count twice
        signal.set_wakeup_fd(-1)
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()
        code = 1
        try:
            code = self._drive(predecessor, lambda name: _say(said, name))
            _say(said, _IN_ORDER)
        except BaseException:
            logger.exception("the driver ended by a fault")
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self._stopping = True
        if self._pid:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(self._pid, number)


_IN_ORDER = "in order"


def _say(said: int, text: str) -> None:
    os.write(said, f"{text}\n".encode())


def _end_with(lifeline: int) -> None:
    """End this process when its supervisor has ended, however it did."""
    while True:
        try:
            os.read(lifeline, 1)
        except InterruptedError:
            continue
        os._exit(1)
