"""Signals that stop a driver."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from cluster.driving.driver import Driver


@contextlib.contextmanager
def stop_on_signals(driver: Driver) -> Iterator[None]:
    """While this lasts, SIGINT and SIGTERM stop the driver in order; the second one ends the process at once."""

    def on_signal(number: int, _: FrameType | None) -> None:
        if driver.stopping:
            os._exit(128 + number)
        driver.stop()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
