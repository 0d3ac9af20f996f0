"""All that a campaign has: fleet, ledger, bucket, directories; and what its faults have done to them."""

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.ledger.store import JobStore
from jobs.states import ACTIVE_STATES, STAGES
from tests.chaos.campaign.fleet import Fleet, Slot
from tests.chaos.campaign.ledger import LedgerSight
from tests.chaos.campaign.proxy import Proxy
from tests.chaos.campaign.workload import Models, draw_request, parsed, write_file
from tests.servers.postgres import PostgresServer
from tests.servers.s3 import S3Server

AT_WORK = tuple(STAGES)
LATER = "later: "
"""How a fault begins to say that another one is in its way."""
_LATE_SECONDS = 300.0
UP_SECONDS = 90.0
"""How long a fault waits for the fleet to be up that is to hit it at work."""


@dataclass(slots=True)
class Watch:
    """Waits for what a fault broke to work again."""

    what: str
    since: float
    is_back: Callable[[], bool]
    calm: bool
    """Whether no other fault lasted meanwhile."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What became of the faults of one kind."""

    injected: int = 0
    skipped: int = 0
    why: str = ""
    recovered: int = 0
    seconds: list[float] = field(default_factory=list)
    """How long it took to recover, of those that no other fault got in the way of."""
    all_seconds: list[float] = field(default_factory=list)


class World:
    """One campaign."""

    def __init__(
        self,
        *,
        directory: Path,
        store: JobStore,
        sight: LedgerSight,
        fleet: Fleet,
        proxy: Proxy,
        s3: S3Server,
        models: Models,
        postgres: PostgresServer | None,
        rng: random.Random,
        num_jobs: int,
        mounts: dict[str, str | None],
        say: Callable[[str], None],
    ) -> None:
        self.directory, self.store, self.sight, self.fleet, self.proxy = directory, store, sight, fleet, proxy
        self.s3, self.models, self.postgres, self.rng, self.num_jobs, self.say = (
            s3,
            models,
            postgres,
            rng,
            num_jobs,
            say,
        )
        self.mounts = mounts
        """By directory, why it is no file system of its own."""
        self.releases = directory / "releases" / "out"
        self.requests: list[dict[str, Any]] = []
        self.cancelled: set[str] = set()
        """Jobs that a person cancelled at any time."""
        self.tallies: dict[str, Tally] = {}
        self.problems: list[str] = []
        self.num_hit = 0
        """Kills of drivers, supervisors and Ray's services that found jobs at work."""
        self.lasting: dict[str, int] = {}
        self._watches: list[Watch] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.RLock()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def feed(self, number: int = 1, kind: str | None = None) -> list[str]:
        """Submit some more jobs; return their ids."""
        with self._lock:
            new = [
                draw_request(self.models, self.releases, len(self.requests) + index, self.rng, kind)
                for index in range(number)
            ]
            if new:
                self.insist(lambda: self.store.submit(parsed(new)))
                self.requests += new
                write_file(self.directory / "requests.yaml", self.requests)
            return [each["id"] for each in new]

    def insist(self, what: Callable[[], Any]) -> Any:
        """Do something with the store, again and again while it does not answer."""
        from jobs.errors import NoCapacityError, TransientIOError

        end = time.monotonic() + 120
        while True:
            try:
                return what()
            except (TransientIOError, NoCapacityError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.5)

    def tally(self, name: str) -> Tally:
        """Return what became of the faults of one kind."""
        return self.tallies.setdefault(name, Tally())

    def catch(self, state: str | None, seconds: float = 45.0) -> Any:
        """Wait for a job in a state, or at any work; return its row, or None when none came."""
        end = time.monotonic() + seconds
        states = AT_WORK if state is None else (state,)
        while time.monotonic() < end:
            if found := self.sight.jobs(*states):
                return self.rng.choice(found)
            time.sleep(0.02)
        return None

    def is_up(self, seconds: float = 0.0) -> bool:
        """Whether a worker of the fleet can work, or does; waits for that."""
        end = time.monotonic() + seconds
        while not any(self.fleet.workers(slot, busy=False) for slot in self.fleet.slots):
            if time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    def slot_of(self, row: Any) -> Slot:
        """Return the slot whose driver holds a job; any one where that is gone."""
        for slot in self.fleet.slots:
            driver = self.fleet.driver(slot)
            if driver is not None and row is not None and f"-{driver.pid}-" in str(row.owner):
                return slot
        return self.rng.choice(self.fleet.slots)

    def at_work_again(self, name: str, lost: list[tuple[str, int]]) -> None:
        """Watch for one of some jobs, each with its last event, to be begun again, or any job where there are none."""
        num_begun = self.sight.count("PLANNING")

        def is_back() -> bool:
            if not lost:
                return self.sight.count("PLANNING") > num_begun
            for job_id, last in lost:
                states = [each.state for each in self.sight.events_of(job_id, last)]
                if "PLANNING" in states or "PUBLISHED" in states:
                    return True
            return False

        self.watch(name, is_back)

    def publishing_again(self, name: str) -> None:
        """Watch for the next job to be published."""
        before = self.sight.count("PUBLISHED")
        self.watch(name, lambda: self.sight.count("PUBLISHED") > before)

    def watch(self, name: str, is_back: Callable[[], bool]) -> None:
        """Note how long it takes until something is as it should be."""
        with self._lock:
            self._watches.append(Watch(name, time.monotonic(), is_back, calm=not self.lasting))

    def _watch(self) -> None:
        while True:
            with self._lock:
                watches = list(self._watches)
            for each in watches:
                each.calm &= not self.lasting
                took = time.monotonic() - each.since
                if each.is_back():
                    tally = self.tally(each.what)
                    tally.recovered += 1
                    tally.all_seconds.append(took)
                    if each.calm:
                        tally.seconds.append(took)
                elif took < _LATE_SECONDS:
                    continue
                with self._lock:
                    self._watches.remove(each)
            time.sleep(0.15)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note that a fault lasts: what is measured meanwhile is not its own."""
        with self._lock:
            self.lasting[name] = self.lasting.get(name, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self.lasting[name] -= 1
                if not self.lasting[name]:
                    del self.lasting[name]

    def beside(self, name: str, what: Callable[[], None]) -> None:
        """Have a fault last while the campaign goes on."""

        def run() -> None:
            try:
                with self.span(name):
                    what()
            except Exception as error:  # noqa: BLE001 - told, and counted
                self.problems.append(f"the campaign could not inject {name}: {type(error).__name__}: {error}")
            self.publishing_again(name)

        thread = threading.Thread(target=run, name=name)
        self._threads.append(thread)
        thread.start()

    def settle_spans(self) -> None:
        """Wait for all faults to end."""
        for thread in self._threads:
            thread.join()

    def active(self) -> list[tuple[str, int]]:
        """Return the jobs that drivers hold, each with its last event."""
        return [(row.id, row.num_events) for row in self.sight.jobs(*(str(state) for state in ACTIVE_STATES))]


@contextlib.contextmanager
def tmpfs(path: Path, megabytes: int) -> Iterator[str | None]:
    """Mount a file system of its own while the block lasts; yield why it cannot be, or None."""
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    why = None if done.returncode == 0 else f"no tmpfs can be mounted here: {done.stderr.strip()}"
    try:
        yield why
    finally:
        if why is None and subprocess.run(["umount", str(path)], capture_output=True, check=False).returncode:
            subprocess.run(["umount", "-l", str(path)], check=True)


@contextlib.contextmanager
def filled(path: Path, stop: threading.Event | None = None) -> Iterator[None]:
    """Take all the room of a small file system while the block lasts."""
    done = stop or threading.Event()
    file = path / ".campaign-filler"

    def fill() -> None:
        with file.open("ab", buffering=0) as out:
            for size in (1 << 22, 1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while not done.is_set():
                        out.write(bytes(size))
            while not done.wait(0.1):
                with contextlib.suppress(OSError):
                    out.write(bytes(os.statvfs(path).f_bavail * 4096))

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        file.unlink(missing_ok=True)
