"""Which worker does which jobs next. Pure functions: the same jobs and workers give the same units.

Jobs with equal pass keys share one read of a base. The order is that of the claims, which take from shares in turn, and
inside of a share priority, then jobs that lost their worker, then age; among jobs of the highest priority that wait,
those whose base a free worker holds go first. What residency and priority may cost a base is bounded: when
`max_units_of_other_bases` units of other bases have gone before it, its oldest job is in the next unit.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A claimed job that no worker has yet."""

    job_id: str
    pass_key: str
    """Jobs with equal keys can be merged in one pass."""
    priority: int
    """Higher goes first."""
    sequence: int
    """Lower was claimed before; unique."""
    share: str = ""
    """The share that it belongs to; claims took from shares in turn."""
    alone: bool = False
    """It has lost a worker, and may be what has cost it: it must not take other jobs with it."""
    not_on: frozenset[str] = frozenset()
    """Workers that cannot do it (a GPU failed, a machine is too small): it goes to another, as long as there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What the scheduler knows of a worker."""

    name: str
    idle: bool
    residents: frozenset[str]
    """Pass keys whose base it holds in memory."""
    device: str = "cpu"
    """`cuda` or `cpu`. Their bits may differ, so that all of one merge is done on one kind."""
    up: bool = True
    """Whether it has started, and is neither lost nor benched."""
    has_failed: bool = False
    """Whether its GPU failed at work, and has done none since."""
    host: str | None = None
    """Its machine, once it has started."""
    log: str | None = None
    """Name of its log file there, where it has one."""

    @property
    def named(self) -> dict[str, Any]:
        """What a line of a log says of it."""
        return {"worker": self.name, "node": self.host, "log": self.log}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on a unit and on waiting."""

    max_jobs_per_pass: int
    max_units_of_other_bases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitAssignment:
    """One pass for one worker."""

    worker: str
    pass_key: str
    job_ids: tuple[str, ...]
    shared: bool = False
    """Whether other workers of its kind would be idle, and can help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenPass:
    """A pass with pieces that no worker is at."""

    pass_id: str
    pass_key: str
    leader: str
    """The worker that will finish it, and does nothing else until then."""
    piece_bytes: tuple[int, ...]
    """Sizes of those pieces, in the order in which they are handed out."""
    at_work: frozenset[str]
    """Workers that are at other pieces of it."""
    barred: frozenset[str]
    """Workers that cannot take part."""
    device: str = "cpu"
    """Of the workers that may take part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceAssignment:
    """The next pieces of a pass for one worker."""

    worker: str
    pass_id: str
    num_pieces: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The units to start now, and how often each base that still waits has been passed over."""

    units: tuple[UnitAssignment, ...]
    passed_over: dict[str, int]


def schedule(
    waiting: Sequence[WaitingJob], workers: Sequence[WorkerView], passed_over: Mapping[str, int], limits: Limits
) -> Schedule:
    """Assign waiting jobs to idle workers.

    No worker stays idle while a job waits that it may take, and no job is in two units; GPUs get theirs first. With
    fewer passes than idle workers, the largest passes are split by jobs, which reads a base twice but keeps all workers
    at work; where that is not enough, they are shared, and `share_out` splits them by shards. Neither is done between a
    GPU and a CPU: the one would have to wait for the other.

    Args:
        waiting: the claimed jobs without a worker.
        workers: all workers; only idle ones get a unit.
        passed_over: pass key to units of other bases started since a unit of this base was, from the last schedule.
        limits: bounds on a unit and on waiting.

    Returns:
        The units, at most one for each idle worker, and the new counts.
    """
    up = {worker.name for worker in workers if worker.up}
    left = in_turn(waiting)
    left = [job if up - job.not_on else dataclasses.replace(job, not_on=frozenset()) for job in left]
    idle = sorted((worker for worker in workers if worker.idle), key=lambda worker: worker.name)
    counts = {job.pass_key: passed_over.get(job.pass_key, 0) for job in left}
    units: list[UnitAssignment] = []
    while idle and (able := [job for job in left if any(worker.name not in job.not_on for worker in idle)]):
        worker, first = _next(able, idle, counts, limits)
        jobs = _fill(first, left, limits)
        units.append(UnitAssignment(worker=worker.name, pass_key=first.pass_key, job_ids=jobs))
        left = [job for job in left if job.job_id not in jobs]
        idle.remove(worker)
        counts = {key: 0 if key == first.pass_key else count + 1 for key, count in counts.items()}
    if not left:
        units = _spread(units, idle, {worker.name: worker.device for worker in workers})
        devices = {worker.name: worker.device for worker in workers}
        at_work = {unit.worker for unit in units}
        helping = {worker.device for worker in workers if worker.idle and worker.name not in at_work}
        alone = {job.job_id for job in waiting if job.alone}
        units = [
            dataclasses.replace(unit, shared=devices[unit.worker] in helping and alone.isdisjoint(unit.job_ids))
            for unit in units
        ]
    waiting_keys = {job.pass_key for job in left}
    return Schedule(
        units=tuple(units), passed_over={key: count for key, count in counts.items() if key in waiting_keys}
    )


def in_turn(waiting: Sequence[WaitingJob]) -> list[WaitingJob]:
    """Return jobs in their order: shares as they were claimed, and inside of each by priority, then by age.

    Jobs that have lost a worker go before others of their priority: they were at work already. A job of high priority
    takes the place of another one of its own share, and never of one of others.
    """
    by_share: dict[str, list[WaitingJob]] = {}
    for job in sorted(waiting, key=lambda job: job.sequence):
        by_share.setdefault(job.share, []).append(job)
    placed: list[tuple[int, WaitingJob]] = []
    for jobs in by_share.values():
        ranked = sorted(jobs, key=lambda job: (-job.priority, not job.alone, job.sequence))
        placed += zip((job.sequence for job in jobs), ranked, strict=True)
    return [job for _, job in sorted(placed, key=lambda place: place[0])]


def _next(
    left: Sequence[WaitingJob], idle: Sequence[WorkerView], counts: Mapping[str, int], limits: Limits
) -> tuple[WorkerView, WaitingJob]:
    """Return the next worker and the job that its unit is built around."""
    overdue = [job for job in left if counts[job.pass_key] >= limits.max_units_of_other_bases]
    if overdue:
        oldest = min(overdue, key=lambda job: (-counts[job.pass_key], job.sequence))
        return _best_worker(oldest.pass_key, left, [each for each in idle if each.name not in oldest.not_on]), oldest
    highest = {job.share: job.priority for job in reversed(left)}
    urgent = [job for job in left if job.priority == highest[job.share]]
    held = frozenset[str]().union(*(worker.residents for worker in idle))
    first = next((job for job in urgent if job.pass_key in held), urgent[0])
    return _best_worker(first.pass_key, left, [each for each in idle if each.name not in first.not_on]), first


def _best_worker(pass_key: str, left: Collection[WaitingJob], idle: Sequence[WorkerView]) -> WorkerView:
    """Return the idle worker that holds this base, else the one whose own bases are least wanted.

    GPUs go before all, but those that have failed come last.
    """
    wanted = {job.pass_key for job in left} - {pass_key}
    return min(
        idle,
        key=lambda worker: (
            worker.has_failed,
            worker.device != "cuda",
            pass_key not in worker.residents,
            len(worker.residents & wanted),
            len(worker.residents),
            worker.name,
        ),
    )


def _fill(first: WaitingJob, left: Sequence[WaitingJob], limits: Limits) -> tuple[str, ...]:
    """Return the jobs of the unit: `first`, then others of the same base in their order."""
    if first.alone:
        return (first.job_id,)
    others = [job.job_id for job in left if job.pass_key == first.pass_key and not job.alone and job is not first]
    return (first.job_id, *others[: limits.max_jobs_per_pass - 1])


def _spread(units: list[UnitAssignment], idle: list[WorkerView], devices: Mapping[str, str]) -> list[UnitAssignment]:
    """Halve the largest units until every idle worker has one or no unit of its kind can be halved."""
    units = list(units)
    idle = list(idle)
    while True:
        kinds = {worker.device for worker in idle}
        able = [n for n, each in enumerate(units) if len(each.job_ids) > 1 and devices[each.worker] in kinds]
        if not able:
            break
        largest = max(able, key=lambda index: (len(units[index].job_ids), -index))
        unit = units[largest]
        middle = (len(unit.job_ids) + 1) // 2
        worker = _best_worker(unit.pass_key, (), [each for each in idle if each.device == devices[unit.worker]])
        idle.remove(worker)
        units[largest] = UnitAssignment(worker=unit.worker, pass_key=unit.pass_key, job_ids=unit.job_ids[:middle])
        units.append(UnitAssignment(worker=worker.name, pass_key=unit.pass_key, job_ids=unit.job_ids[middle:]))
    return units


def share_out(passes: Sequence[OpenPass], workers: Sequence[WorkerView]) -> tuple[PieceAssignment, ...]:
    """Assign pieces of open passes to idle workers.

    A leader works on its own pass. The others go where most is left for each worker that is there, among passes
    of its kind, and where the base is held before others. What is handed out at once shrinks with what is left, so that
    all end together.

    Args:
        passes: with pieces left.
        workers: all workers that may work on pieces now; only idle ones get any.

    Returns:
        At most one assignment for each idle worker.
    """
    crews = {each.pass_id: set(each.at_work) for each in passes}
    left = {each.pass_id: list(each.piece_bytes) for each in passes}
    leading = {each.leader: each for each in passes}
    idle = sorted((worker for worker in workers if worker.idle), key=lambda worker: worker.name not in leading)
    given: list[PieceAssignment] = []
    for number, worker in enumerate(idle):

        def need(each: OpenPass, worker: WorkerView = worker) -> tuple[float, bool, str]:
            share = sum(left[each.pass_id]) / (len(crews[each.pass_id]) + 1)
            return -share, each.pass_key not in worker.residents, each.pass_id

        own = leading.get(worker.name)
        able = [each for each in passes if worker.name not in each.barred and worker.device == each.device]
        open_to = [own] if own else able
        wanted = min((each for each in open_to if left[each.pass_id]), key=need, default=None)
        if wanted is None:
            continue
        crew, pieces = crews[wanted.pass_id], left[wanted.pass_id]
        crew.add(worker.name)
        num_hands = len(crew) + len(idle) - number - 1
        num_pieces, num_bytes = 0, 0
        while num_pieces < len(pieces) and (
            num_pieces == 0 or num_bytes + pieces[num_pieces] <= sum(pieces) / (2 * num_hands)
        ):
            num_bytes += pieces[num_pieces]
            num_pieces += 1
        del pieces[:num_pieces]
        given.append(PieceAssignment(worker=worker.name, pass_id=wanted.pass_id, num_pieces=num_pieces))
    return tuple(given)
