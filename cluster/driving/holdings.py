"""The jobs a driver holds leases of: those that wait, and those on a worker. State only; it decides nothing."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cluster.driving.scheduler import UnitAssignment, WaitingJob
from cluster.driving.sharing import SharedPass
from jobs.ledger.records import Lease, Publication
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.states import JobState
from workers.merging.outcomes import JobOutcome


@dataclass(slots=True)
class Held:
    """One job and its lease."""

    lease: Lease
    as_waiting: WaitingJob
    """As the scheduler knows it, asked for in every round."""
    state: JobState = JobState.LEASED
    """As this driver last wrote it."""
    beside: bool = False
    """Whether what ended its unit may not be its doing: other jobs were in it, or others died at the same pass."""
    outcome: JobOutcome | None = None
    """Set when it is staged, and is being published."""
    began_at: float = 0.0
    """When its attempt began, on the driver's clock."""
    host: str | None = None
    """Machine of the worker that it was given to."""
    is_probe: bool = False
    """Whether it tells whether a place works again."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.lease.job_id


@dataclass(slots=True)
class Flight:
    """A unit on a worker, with those of its jobs that are not settled yet."""

    unit: UnitAssignment
    held: dict[str, Held]
    shared: SharedPass | None = None
    """Set when other workers help; stays so when it is staged."""

    def name(self, what: str, more: str = "") -> str:
        """Return what a call about it is named on the dashboard."""
        requests = self.requests
        return f"{what}:{requests[0].base.name}:{len(requests)} adapter{'s' if len(requests) > 1 else ''}{more}"

    @property
    def requests(self) -> tuple[MergeRequest, ...]:
        """Of its jobs."""
        return tuple(held.lease.request for held in self.held.values())


@dataclass(slots=True)
class Holdings:
    """Every job is in one place: waiting, in the flight of a worker (the one that leads), or published."""

    waiting: dict[str, Held] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)
    published: dict[str, tuple[Held, Publication]] = field(default_factory=dict)
    """Releases that are visible and not in the store yet, by job."""
    num_claimed: int = 0
    dropped: dict[str, set[str]] = field(default_factory=dict)
    """By worker, jobs that have ended and that it may still be at: it is told until it has let go of them."""
    shunned: dict[str, frozenset[str]] = field(default_factory=dict)
    """By job, workers that cannot do it: its next attempt is to be elsewhere. Not in the store: names of workers mean
    nothing to other drivers."""
    _tokens: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.flights or self.published)

    def add(self, leases: Iterable[Lease]) -> None:
        """Take in newly claimed jobs."""
        for lease in leases:
            waiting = WaitingJob(
                job_id=lease.job_id,
                pass_key=lease.request.pass_key(),
                priority=lease.request.priority,
                sequence=self.num_claimed,
                share=lease.share,
                alone=lease.suspect,
                not_on=self.shunned.get(lease.job_id, frozenset()),
            )
            self.waiting[lease.job_id] = Held(lease, waiting, is_probe=lease.is_probe)
            self._tokens[lease.job_id] = lease.token
            self.num_claimed += 1

    @property
    def tokens(self) -> Mapping[str, int]:
        """Job id to fencing token, of every job that is held."""
        return self._tokens

    def waiting_jobs(self) -> tuple[WaitingJob, ...]:
        """Return what the scheduler needs to know of the waiting jobs."""
        return tuple(held.as_waiting for held in self.waiting.values())

    def start(self, unit: UnitAssignment) -> Flight:
        """Move a unit's jobs from waiting to its worker."""
        assert unit.worker not in self.flights
        flight = Flight(unit, {job_id: self.waiting.pop(job_id) for job_id in unit.job_ids})
        for held in flight.held.values():
            held.beside = len(unit.job_ids) > 1
        self.flights[unit.worker] = flight
        return flight

    def on_worker(self, worker: str) -> list[Held]:
        """Return the jobs of the unit a worker is at; none when it has none, or none of them is held any more."""
        flight = self.flights.get(worker)
        return list(flight.held.values()) if flight else []

    def at_work(self, worker: str) -> list[Held]:
        """Return the jobs on a worker that are not staged yet."""
        return [held for held in self.on_worker(worker) if held.outcome is None]

    def not_staged(self) -> list[Held]:
        """Return the jobs that wait or are on a worker and are not being published."""
        on_workers = [held for flight in self.flights.values() for held in flight.held.values()]
        return [*self.waiting.values(), *(held for held in on_workers if held.outcome is None)]

    def shared(self, pass_id: str) -> tuple[str, Flight, SharedPass] | None:
        """Return a shared pass with the worker that leads it, or None when none of its jobs is held any more."""
        return next((found for found in self.shared_passes() if found[2].pass_id == pass_id), None)

    def shared_passes(self) -> Iterator[tuple[str, Flight, SharedPass]]:
        """Yield the passes that several workers share, each with the worker that leads it."""
        for worker, flight in self.flights.items():
            if flight.shared is not None:
                yield worker, flight, flight.shared

    def crew(self, worker: str) -> frozenset[str]:
        """Return the workers that are at the unit this worker leads."""
        flight = self.flights.get(worker)
        return frozenset({worker}) | (flight.shared.at_work if flight and flight.shared else frozenset())

    def helpers(self, worker: str) -> frozenset[str]:
        """Return the other workers that may know of the unit this worker leads."""
        flight = self.flights.get(worker)
        return frozenset(flight.shared.takers) - {worker} if flight and flight.shared else frozenset()

    def led_by(self, worker: str) -> str | None:
        """Return the leader of the unit a worker is at: itself, or the one it helps."""
        if worker in self.flights:
            return worker
        return next((leader for leader, _, shared in self.shared_passes() if worker in shared.at_work), None)

    def hand_on(self, leader: str, candidates: Collection[str] | None = None) -> bool:
        """Have a shared pass led by another worker that leads none; False when there is none.

        Args:
            leader: that cannot go on.
            candidates: workers that can take part; None for those that do.
        """
        flight = self.flights[leader]
        shared = flight.shared
        assert shared is not None
        wanted = shared.takers if candidates is None else set(candidates)
        able = sorted(wanted - shared.barred - self.flights.keys(), key=lambda name: (name not in shared.takers, name))
        if not able:
            return False
        self.flights[able[0]] = self.flights.pop(leader)
        shared.takers.add(able[0])
        return True

    def find(self, worker: str, job_id: str) -> Held | None:
        """Return a job that is on this worker, or None when this driver no longer holds it."""
        flight = self.flights.get(worker)
        return flight.held.get(job_id) if flight else None

    def remove(self, job_id: str) -> None:
        """Forget a job, and the flight it was the last of."""
        self._tokens.pop(job_id, None)
        self.waiting.pop(job_id, None)
        self.published.pop(job_id, None)
        self._land(job_id)

    def let_go(self, worker: str, job_ids: Iterable[str]) -> None:
        """Take in that a worker has let go of jobs."""
        if worker in self.dropped:
            self.dropped[worker].difference_update(job_ids)
            if not self.dropped[worker]:
                del self.dropped[worker]

    def publish(self, held: Held, release: Release, report_path: str | None) -> None:
        """Take a job off its worker: its release is visible, and only the store does not know it yet."""
        self.waiting.pop(held.job_id, None)
        self._land(held.job_id)
        publication = Publication(job_id=held.job_id, token=held.lease.token, release=release, report_path=report_path)
        self.published[held.job_id] = held, publication

    def _land(self, job_id: str) -> None:
        for worker, flight in list(self.flights.items()):
            if flight.held.pop(job_id, None) is not None:
                takers = set[str]() if flight.shared is None else flight.shared.takers
                for each in {worker} | takers:
                    self.dropped.setdefault(each, set()).add(job_id)
                if not flight.held:
                    del self.flights[worker]
                return
