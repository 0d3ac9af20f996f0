"""The places of a fleet: which actor is in each, what it is at, and what its answers say about it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.driving.scheduler import WorkerView
from cluster.fleet.actors import Actor, Answer
from cluster.fleet.calls import Call
from cluster.fleet.crews import Crew
from jobs.errors import FailureClass
from workers.merging.outcomes import PassOpened, PublishOutcome, ShardsOutcome, UnitOutcome

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 300.0
"""Between two attempts to fill a place whose workers do not start, or whose GPU fails; doubles with each of them."""
_LOADING_SECONDS = 30.0
"""How long a new actor counts as loading; then it may be waiting for room in the cluster, and holds no other up."""
_SLOW_START_SECONDS = 60.0
_MAX_REASON = 600


@dataclass(slots=True)
class Member:
    """One place in the fleet; the actor in it may change."""

    name: str
    crew: Crew
    actor: Actor | None = None
    ready: bool = False
    on_duty: bool = False
    """Whether it may get work; a worker that is ready and is not on duty stands by."""
    host: str | None = None
    """Name of the machine it is on, as it said itself."""
    log: str | None = None
    """Name of its log file there, as it said itself."""
    residents: frozenset[str] = frozenset()
    created_at: float = 0.0
    awaited: bool = False
    """Whether an event has told that it takes long to start."""
    failed_starts: int = 0
    """In a row."""
    device_faults: int = 0
    """At work, in a row."""
    rests_until: float = 0.0
    """When its place is filled again."""
    calls: dict[Answer, Call] = field(default_factory=dict)

    @property
    def view(self) -> WorkerView:
        """What the scheduler needs to know of it."""
        return WorkerView(
            name=self.name,
            idle=self.on_duty and not self.at_work,
            residents=self.residents,
            device=self.crew.device,
            up=self.on_duty,
            has_failed=self.device_faults > 0,
            host=self.host,
            log=self.log,
        )

    @property
    def at_work(self) -> bool:
        """Whether it has a call that is work."""
        return any(call.is_work for call in self.calls.values())

    def loads(self, now: float) -> bool:
        """Whether its actor was started less than half a minute ago and is not ready."""
        return self.actor is not None and not self.ready and now - self.created_at < _LOADING_SECONDS

    def take(self, actor: Actor, now: float) -> None:
        """Have an actor in this place that has yet to say that it is ready."""
        self.actor = actor
        self.residents = frozenset()
        self.awaited = False
        self.created_at = now

    def leave(self) -> None:
        """Empty the place. Its calls are forgotten: Ray keeps an actor's name as long as anything refers to it."""
        self.actor = None
        self.ready = self.on_duty = False
        self.host = None
        self.log = None
        self.calls.clear()

    @property
    def pause_seconds(self) -> float:
        """How long its place stays empty: the longer, the more often its workers could not work."""
        num_faults = self.failed_starts + self.device_faults
        return min(_MAX_PAUSE_SECONDS, _FIRST_PAUSE_SECONDS * 2.0 ** min(num_faults - 1, 32))


def may_load(crew: Crew, members: Iterable[Member], now: float) -> bool:
    """Whether one more actor of a crew may load now: as many as are missing on duty, and spares one at a time.

    Two spares that load together take the cores from each other, and from the workers.

    Args:
        crew: of the actor.
        members: of the fleet.
        now: the time.
    """
    of_crew = [member for member in members if member.crew == crew]
    num_missing = crew.num_workers - sum(member.on_duty for member in of_crew)
    return sum(member.loads(now) for member in of_crew) < max(1, num_missing)


def tell_slow_start(member: Member, now: float) -> None:
    """Log once that a worker takes long to start."""
    if now - member.created_at > _SLOW_START_SECONDS and not member.awaited:
        member.awaited = True
        logger.warning(
            "worker does not start yet; the cluster may have no free resources for it", extra={"worker": member.name}
        )


def device_fault(value: object) -> str | None:
    """Return how a worker lost its device at work, of which its answer says nothing else; None when it did not."""
    match value:
        case UnitOutcome(jobs=jobs) | PassOpened(ended=jobs) | ShardsOutcome(ended=jobs):
            failures = [job.failure for job in jobs]
        case PublishOutcome(failure=failure):
            failures = [failure]
        case _:
            return None
    lost = [each for each in failures if each is not None and each.failure_class is FailureClass.WORKER_LOST]
    return lost[0].message if lost else None


def one_line(error: BaseException) -> str:
    """Return an error as one line; of a long one, how it begins and how it ends, which is where the cause is."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_REASON else f"{text[: _MAX_REASON // 2]} … {text[-_MAX_REASON // 2 :]}"
