"""Where the time of a merge goes: a flame graph of the process that merges, by py-spy, which asks it from outside."""

import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

_SAMPLES_PER_SECOND = 200
_PY_SPY = shutil.which("py-spy", path=sysconfig.get_path("scripts")) or "py-spy"


def draw(pid: int, work: Callable[[], object], path: Path) -> None:
    """Draw what the threads of a process are at while some work lasts; threads that wait do not count.

    Args:
        pid: of the process.
        work: has it do what is to be drawn.
        path: of the SVG file; its frames show their shares in a browser.

    Raises:
        RuntimeError: py-spy cannot look into the process.
    """
    command = [_PY_SPY, "record", "--pid", str(pid), "--rate", str(_SAMPLES_PER_SECOND), "--output", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sampler:
        try:
            work()
        finally:
            sampler.send_signal(signal.SIGINT)  # ends the record, and has it written
        said, _ = sampler.communicate()
    if sampler.returncode:
        raise RuntimeError(f"py-spy cannot look into process {pid}: {said.strip()}")
