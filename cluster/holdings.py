"""The jobs a driver holds leases of: those that wait, and those on a worker. State only; it decides nothing."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cluster.scheduler import UnitAssignment, WaitingJob
from jobs.states import JobState
from jobs.store import Lease
from workers.outcomes import JobOutcome


@dataclass(slots=True)
class Held:
    """One job and its lease."""

    lease: Lease
    sequence: int
    """Order of claiming; lower is older."""
    state: JobState = JobState.LEASED
    """As this driver last wrote it."""
    pass_key: str = field(init=False)
    """Of its request; asked for in every round."""
    cancel_sent: bool = False
    """Whether its worker was told to stop it."""
    outcome: JobOutcome | None = None
    """Set when it is staged, and is being published."""

    def __post_init__(self) -> None:
        self.pass_key = self.lease.request.pass_key()

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.lease.job_id


@dataclass(slots=True)
class Flight:
    """A unit on a worker, with those of its jobs that are not settled yet."""

    unit: UnitAssignment
    held: dict[str, Held]


@dataclass(slots=True)
class Holdings:
    """Every job is in one place: waiting, or in the flight of one worker."""

    waiting: dict[str, Held] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)
    num_claimed: int = 0
    _tokens: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.waiting or self.flights)

    def __iter__(self) -> Iterator[Held]:
        yield from self.waiting.values()
        for flight in self.flights.values():
            yield from flight.held.values()

    def add(self, leases: Iterable[Lease]) -> None:
        """Take in newly claimed jobs."""
        for lease in leases:
            self.waiting[lease.job_id] = Held(lease, self.num_claimed)
            self._tokens[lease.job_id] = lease.token
            self.num_claimed += 1

    @property
    def tokens(self) -> Mapping[str, int]:
        """Job id to fencing token, of every job that is held."""
        return self._tokens

    def waiting_jobs(self, alone_from_losses: int) -> tuple[WaitingJob, ...]:
        """Return what the scheduler needs to know of the waiting jobs.

        Args:
            alone_from_losses: a job that has cost so many workers must not take other jobs with it.
        """
        return tuple(
            WaitingJob(
                job_id=held.job_id,
                pass_key=held.pass_key,
                priority=held.lease.request.priority,
                sequence=held.sequence,
                alone=held.lease.worker_losses >= max(1, alone_from_losses),
            )
            for held in self.waiting.values()
        )

    def start(self, unit: UnitAssignment) -> Flight:
        """Move a unit's jobs from waiting to its worker."""
        assert unit.worker not in self.flights
        flight = Flight(unit, {job_id: self.waiting.pop(job_id) for job_id in unit.job_ids})
        self.flights[unit.worker] = flight
        return flight

    def on_worker(self, worker: str) -> list[Held]:
        """Return the jobs of the unit a worker is at; none when it has none, or none of them is held any more."""
        flight = self.flights.get(worker)
        return list(flight.held.values()) if flight else []

    def at_work(self, worker: str) -> list[Held]:
        """Return the jobs on a worker that are not staged yet."""
        return [held for held in self.on_worker(worker) if held.outcome is None]

    def find(self, worker: str, job_id: str) -> Held | None:
        """Return a job that is on this worker, or None when this driver no longer holds it."""
        flight = self.flights.get(worker)
        return flight.held.get(job_id) if flight else None

    def remove(self, job_id: str) -> str | None:
        """Forget a job, and the flight it was the last of; return the worker it was on, or None."""
        self._tokens.pop(job_id, None)
        self.waiting.pop(job_id, None)
        for worker, flight in list(self.flights.items()):
            if flight.held.pop(job_id, None) is not None:
                if not flight.held:
                    del self.flights[worker]
                return worker
        return None
