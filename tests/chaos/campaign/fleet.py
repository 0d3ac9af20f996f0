"""The fleet under test: `mergefleet run` on real Ray, started again when it ends, as a service manager would."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

MERGEFLEET = Path(sys.executable).with_name("mergefleet")
ROOT = Path(__file__).parents[3]
LEASE_SECONDS = 6.0
UNRESPONSIVE_SECONDS = 15.0
_RESTART_SECONDS = 1.0
_STOP_SECONDS = 60.0
_BUSY = ("ray::merge:", "ray::plan:", "ray::verify:", "ray::publish", "ray::progress", "ray::discard", "ray::residents")
_IDLE = "ray::MergeWorker"


@dataclass(slots=True)
class Slot:
    """A place for one `mergefleet run`."""

    name: str
    num_workers: int
    process: subprocess.Popen[bytes] | None = None
    extra: dict[str, str] = field(default_factory=dict)
    """Environment of its next start alone."""
    workers: list[psutil.Process] = field(default_factory=list)
    """Its workers, as they were a moment ago: looking for them takes longer than some stages."""
    codes: list[int] = field(default_factory=list)
    """What it ended with, each time."""


class Fleet:
    """Slots, and a keeper that starts again what has ended."""

    def __init__(self, home: Path, store: str, environment: dict[str, str], *, slots: dict[str, int]) -> None:
        self.home = home
        self.ray_directory = Path(f"/tmp/mfc-{os.getpid()}")
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MERGEFLEET_"))},
            **environment,
            "HOME": str(home),
            "MERGEFLEET_HOME": str(home / "home"),
            "MERGEFLEET_SCRATCH": str(home / "scratch"),
            "MERGEFLEET_LOGS": str(home / "logs" / "fleet"),
            "MERGEFLEET_STORE": store,
            "MERGEFLEET_DASHBOARD": "0",
            "MERGEFLEET_LEASE_SECONDS": str(LEASE_SECONDS),
            "MERGEFLEET_POLL_SECONDS": "0.25",
            "MERGEFLEET_UNRESPONSIVE_SECONDS": str(UNRESPONSIVE_SECONDS),
            "MERGEFLEET_RETRY_DELAY_SECONDS": "0.5",
            "MERGEFLEET_MAX_RETRY_DELAY_SECONDS": "8",
            "MERGEFLEET_MAX_JOBS_PER_PASS": "2",
            "MERGEFLEET_STOP_SECONDS": "10",
            "NUMBA_CACHE_DIR": str(home / "numba"),
            "OMP_NUM_THREADS": "1",
            "RAY_prestart_worker_first_driver": "0",
        }
        self.slots = [Slot(name, number) for name, number in slots.items()]
        self._keeping = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def start(self) -> None:
        """Start the slots, and keep them."""
        self._keeping.set()
        self._keeper.start()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while self._keeping.is_set():
            for slot in self.slots:
                driver = self.driver(slot)
                below = [] if driver is None else self._below(driver)
                slot.workers = [each for each in below if _title(each).startswith((*_BUSY, _IDLE))]
            time.sleep(0.4)

    def _keep(self) -> None:
        while self._keeping.is_set():
            for slot in self.slots:
                code = None if slot.process is None else slot.process.poll()
                if slot.process is None or code is not None:
                    if code is not None:
                        slot.codes.append(code)
                        time.sleep(_RESTART_SECONDS)
                    slot.process = self._run(slot)
            time.sleep(0.2)

    def _run(self, slot: Slot) -> subprocess.Popen[bytes]:
        directory = self.home / "logs"
        environment = self.environment | slot.extra | {"MERGEFLEET_RAY_DIRECTORY": f"{self.ray_directory}-{slot.name}"}
        slot.extra = {}
        command = [MERGEFLEET, "run", "--json", "--log-format", "text", "--workers", str(slot.num_workers)]
        with (
            (directory / f"{slot.name}.jsonl").open("ab") as out,
            (directory / f"{slot.name}.log").open("ab") as log,
        ):
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=log, start_new_session=True)

    def command(self, *arguments: str) -> tuple[int, str]:
        """Run another command of mergefleet; return its exit code and what it said."""
        environment = self.environment | {"MERGEFLEET_RAY_DIRECTORY": f"{self.ray_directory}-x"}
        done = subprocess.run(
            [MERGEFLEET, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return done.returncode, done.stdout + done.stderr

    def driver(self, slot: Slot) -> psutil.Process | None:
        """Return the driver below a supervisor, where there is one now."""
        with contextlib.suppress(psutil.Error):
            if slot.process is not None and slot.process.poll() is None:
                children = psutil.Process(slot.process.pid).children()
                return children[0] if children else None
        return None

    def workers(self, slot: Slot, *, busy: bool = True) -> list[psutil.Process]:
        """Return the workers below a driver; Ray names them after the class, or after the task they are at."""
        return [each for each in slot.workers if _title(each).startswith(_BUSY if busy else (*_BUSY, _IDLE))]

    def part(self, slot: Slot, name: str) -> psutil.Process | None:
        """Return Ray's own process of a name (`gcs_server`, `raylet`) below a driver."""
        driver = self.driver(slot)
        if driver is None:
            return None
        return next((each for each in self._below(driver) if Path(_title(each).split(" ")[0]).name == name), None)

    def _below(self, process: psutil.Process) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            return process.children(recursive=True)
        return []

    def stop(self) -> dict[str, list[int]]:
        """End all in order; return the exit codes of each slot."""
        self._keeping.clear()
        self._keeper.join()
        below: list[psutil.Process] = []
        for slot in self.slots:
            if slot.process is not None and slot.process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    below += psutil.Process(slot.process.pid).children(recursive=True)
                slot.process.send_signal(signal.SIGTERM)
        for slot in self.slots:
            if slot.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    slot.process.wait(_STOP_SECONDS)
                if slot.process.poll() is None:
                    slot.process.kill()
                slot.codes.append(slot.process.wait())
        _, alive = psutil.wait_procs(below, timeout=20)
        for each in alive:
            with contextlib.suppress(psutil.Error):
                each.kill()
        return {slot.name: slot.codes for slot in self.slots}

    def clean(self) -> None:
        """Remove Ray's directories."""
        for slot in self.slots:
            shutil.rmtree(f"{self.ray_directory}-{slot.name}", ignore_errors=True)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
