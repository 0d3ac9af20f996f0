"""How far a batch is, from what the store knows of its jobs: bytes for each base, stages, and the time left."""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.ledger.records import JobRecord
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import FINAL_STATES, JobState

if TYPE_CHECKING:
    from jobs.ledger.store import JobStore

_WINDOW_SECONDS = 60.0
_NOT_FINAL = frozenset(JobState) - FINAL_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseProgress:
    """The jobs of one base and quantization."""

    name: str
    num_jobs: int
    num_final: int
    bytes_done: int
    bytes_total: int | None
    """None while no job of this base has been planned."""
    stages: Mapping[str, int]
    """What its jobs are at, and how many: worker stages where there is one, else states."""


def base_name(request: MergeRequest) -> str:
    """Return what a person calls the base of a request: its name and what is done to it."""
    if request.base_quantization is BaseQuantization.NONE:
        return request.base.name
    return f"{request.base.name} ({request.base_quantization})"


def by_base(records: Sequence[JobRecord]) -> tuple[BaseProgress, ...]:
    """Return the progress of each base, in the order of their first jobs.

    A job that has not been planned counts with the mean size of its base's other jobs.
    """
    groups: dict[str, list[JobRecord]] = defaultdict(list)
    for record in records:
        groups[record.request.pass_key()].append(record)
    return tuple(_progress(group) for group in groups.values())


def _progress(records: list[JobRecord]) -> BaseProgress:
    known = [record.bytes_total for record in records if record.bytes_total > 0]
    mean = sum(known) // len(known) if known else None
    done = sum(
        (record.bytes_total or mean or 0) if record.state in FINAL_STATES else record.bytes_done for record in records
    )
    return BaseProgress(
        name=base_name(records[0].request),
        num_jobs=len(records),
        num_final=sum(record.state in FINAL_STATES for record in records),
        bytes_done=done,
        bytes_total=None if mean is None else sum(record.bytes_total or mean for record in records),
        stages=Counter(_stage(record) for record in records),
    )


def _stage(record: JobRecord) -> str:
    if record.state in FINAL_STATES or record.state in (JobState.QUEUED, JobState.RETRY_WAIT) or record.stage is None:
        return record.state.value.lower()
    return record.stage


class ByteClock:
    """Estimates the time left from how fast bytes went by lately."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def seconds_left(self, at: float, progress: Sequence[BaseProgress]) -> float | None:
        """Take a sample and return the seconds left, or None when it cannot be said yet.

        Args:
            at: seconds, on a clock that only goes forward.
            progress: of every base.
        """
        done = sum(each.bytes_done for each in progress)
        if self._samples and done < self._samples[-1][1]:
            self._samples.clear()  # a job began anew
        self._samples.append((at, done))
        while at - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()
        begun_at, begun_with = self._samples[0]
        if done == begun_with or at == begun_at or any(each.bytes_total is None for each in progress):
            return None
        left = sum(each.bytes_total - each.bytes_done for each in progress if each.bytes_total is not None)
        return left * (at - begun_at) / (done - begun_with)


class Batch:
    """The jobs on display: all that were not final when first seen, and what became of them."""

    def __init__(self, store: "JobStore") -> None:
        self._store = store
        self._records: dict[str, JobRecord] = {}

    def refresh(self) -> tuple[JobRecord, ...]:
        """Return the jobs as they stand, in the order of their submission. Final ones are not asked for again."""
        live = {record.id: record for record in self._store.jobs(states=_NOT_FINAL)}
        ended = [id_ for id_, record in self._records.items() if record.state in _NOT_FINAL and id_ not in live]
        self._records |= live
        self._records |= {record.id: record for record in self._store.jobs(ids=ended)}
        return tuple(sorted(self._records.values(), key=lambda record: (record.created_at, record.id)))
