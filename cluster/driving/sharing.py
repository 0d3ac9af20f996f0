"""A pass that several workers work on: which of its pieces are done, and who is at the others. State only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jobs.request import MergeRequest
from workers.merging.outcomes import MergedShards, PassOpened, PassWork, Piece, ShardsOutcome, Usage
from workers.releases.sinks import Ticket


@dataclass(slots=True)
class SharedPass:
    """One pass from the call that opens it to the call that finishes it."""

    pass_id: str
    tickets: Mapping[str, Ticket] = field(default_factory=dict)
    """By job; empty until it is open."""
    finishing: bool = False
    """Whether its last call is under way."""
    takers: set[str] = field(default_factory=set)
    """Workers that may know of it: they are told when a job of it has ended."""
    barred: set[str] = field(default_factory=set)
    """Workers that cannot take part."""
    stranded_since: float | None = None
    """When the last worker went that could work on it; None while there is one."""
    usage: Usage = field(default_factory=Usage)
    """Of the calls before the last one."""
    bytes_total: int = 0
    _bytes_done: dict[str, int] = field(default_factory=dict)
    """By worker, as it last told."""
    _todo: list[Piece] = field(default_factory=list)
    _at_work: dict[str, tuple[Piece, ...]] = field(default_factory=dict)
    _merged: dict[str, list[MergedShards]] = field(default_factory=dict)
    _finished: dict[str, frozenset[str]] = field(default_factory=dict)
    """Shards that were there when it was opened, by job."""
    num_losses: int = 0
    """Workers that were lost while they were at it. After the first it is given to one worker at a time."""
    is_blamed: bool = False
    """Whether the last one of them had it alone after another was lost."""
    _alone: str | None = None
    """The worker that got pieces after a loss, while no other was at any."""

    @property
    def is_open(self) -> bool:
        """Whether its pieces are known."""
        return bool(self.tickets)

    @property
    def is_merged(self) -> bool:
        """Whether nothing is left but to finish it."""
        return self.is_open and not self._todo and not self._at_work

    @property
    def at_work(self) -> frozenset[str]:
        """The workers that merge pieces of it now."""
        return frozenset(self._at_work)

    @property
    def todo(self) -> tuple[Piece, ...]:
        """The pieces without a worker."""
        return tuple(self._todo)

    @property
    def bytes_done(self) -> int:
        """As far as the workers have told."""
        return sum(self._bytes_done.values())

    def open(self, outcome: PassOpened) -> None:
        """Take in what there is to do."""
        self.tickets = outcome.tickets
        self.usage = outcome.usage
        self.bytes_total = outcome.bytes_total
        self._todo = list(outcome.pieces)
        self._merged = {job_id: [] for job_id in outcome.tickets}
        for job_id, resumed in outcome.resumed.items():
            self._merged[job_id].append(resumed)
            self._finished[job_id] = resumed.names

    def work(self, name: str, requests: Sequence[MergeRequest]) -> PassWork:
        """Return what a worker needs to work on some of its jobs.

        Args:
            name: of the work, for people.
            requests: of the jobs.
        """
        tickets = {request.id: self.tickets[request.id] for request in requests}
        return PassWork(
            pass_id=self.pass_id, name=name, requests=tuple(requests), tickets=tickets, finished=self._finished
        )

    def give(self, worker: str, num_pieces: int) -> tuple[Piece, ...]:
        """Give the next pieces to a worker."""
        assert worker not in self._at_work
        pieces, self._todo = tuple(self._todo[:num_pieces]), self._todo[num_pieces:]
        self._alone = worker if self.num_losses and not self._at_work else None
        self._at_work[worker] = pieces
        self.takers.add(worker)
        return pieces

    def take(self, worker: str, outcome: ShardsOutcome) -> None:
        """Take in what a worker has merged; for the second time it changes nothing."""
        if self._at_work.pop(worker, None) is None:
            return
        self.usage = self.usage.plus(outcome.usage)
        for job_id, merged in outcome.merged.items():
            self._merged[job_id].append(merged)

    def take_back(self, worker: str) -> None:
        """Have others do what a worker was given."""
        self._todo = [*self._at_work.pop(worker, ()), *self._todo]

    def lose(self, worker: str) -> bool:
        """Have others do what a dead worker was given.

        Returns:
            Whether it has cost a worker before, at whichever pieces: then the pass itself may be what kills them.
        """
        if self.finishing or worker in self._at_work:
            self.is_blamed = self.num_losses > 0 and (self.finishing or worker == self._alone)
            self.num_losses += 1
        self.take_back(worker)
        return self.num_losses > 1

    def note_progress(self, worker: str, bytes_done: int) -> None:
        """Note how much a worker says it has done of this pass."""
        self._bytes_done[worker] = bytes_done

    def merged(self, requests: Sequence[MergeRequest]) -> Mapping[str, tuple[MergedShards, ...]]:
        """Return what was merged of some jobs."""
        return {request.id: tuple(self._merged[request.id]) for request in requests}
