"""A driver in a process of its own, which is started anew when it ends in a way that no one asked for.

Ray ends the process of a driver, without an exception, when its control service is gone. This process
knows no Ray: it waits, and begins again, with a new Ray where that is local.
"""

import logging
import os
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
_FIRST_PAUSE_SECONDS = 1.0


class Supervisor:
    """Runs a driver again and again, until it ends in order or is told to stop. For a process with one thread."""

    def __init__(
        self,
        drive: Callable[[str | None, Callable[[str], None]], int],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take what drives.

        Args:
            drive: called in a process of its own, with the name of the driver that it follows, if there was one, and
                what it tells its own name to. Returns an exit code when it has ended in order.
            sleep: waits so many seconds.
        """
        self._drive = drive
        self._sleep = sleep
        self._pid = 0
        self._stopping = False

    def run(self) -> int:
        """Run drivers until one ends in order, this process is told to stop, or they end quickly again and again.

        Returns:
            The exit code of the last one.
        """
        previous = {number: signal.signal(number, self._pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return self._run()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

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
            pause = _FIRST_PAUSE_SECONDS * 2.0 ** (num_quick - 1)
            logger.warning(
                "the driver ended unasked and starts anew", extra={"code": code, "driver": name, "pause_seconds": pause}
            )
            self._sleep(pause)
            if self._stopping:
                return code

    def _run_one(self, predecessor: str | None) -> tuple[int, str | None, bool]:
        """Run one driver; return its exit code, its name where it said so, and whether it ended in order."""
        lifeline, held = os.pipe()
        heard, said = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(held)
            os.close(heard)
            self._drive_here(predecessor, lifeline, said)
        os.close(lifeline)
        os.close(said)
        if self._stopping:
            os.kill(self._pid, signal.SIGTERM)
        with os.fdopen(heard, encoding="utf-8") as words:
            lines = words.read().splitlines()  # until it has ended
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        os.close(held)
        code = os.waitstatus_to_exitcode(status)
        in_order = lines[-1:] == [_IN_ORDER]
        names = [line for line in lines if line != _IN_ORDER]
        return (code if code >= 0 else 128 - code), (names[-1] if names else None), in_order

    def _drive_here(self, predecessor: str | None, lifeline: int, said: int) -> None:
        """Drive in this process, the child's; never returns."""
        os.setpgid(0, 0)  # a Ctrl-C at the terminal comes by the supervisor alone, or it would count twice
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
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
