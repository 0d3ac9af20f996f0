"""How far a batch is, from what the store knows of its jobs: bytes for each base, stages, and the time left."""

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.ledger.records import Work
from jobs.locations import parse_location
from jobs.request import BaseQuantization, MergeRequest
from jobs.states import FINAL_STATES

_WINDOW_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseProgress:
    """The jobs of one base."""

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
    if request.base_quantization in (BaseQuantization.NONE, BaseQuantization.STORED):
        return request.base.name
    return f"{request.base.name} ({request.base_quantization})"


def by_base(work: Sequence[Work]) -> tuple[BaseProgress, ...]:
    """Return the progress of each base, by name.

    A job that has not been planned counts with the mean size of its base's other jobs.
    """
    groups: dict[str, list[Work]] = defaultdict(list)
    for each in work:
        groups[each.base].append(each)
    return tuple(_progress(base, group) for base, group in groups.items())


def _progress(base: str, group: list[Work]) -> BaseProgress:
    num_planned = sum(each.num_planned for each in group)
    known = sum(each.bytes_total for each in group)
    mean = known // num_planned if num_planned else None
    num_jobs = sum(each.num_jobs for each in group)
    done = 0
    for each in group:
        is_final = each.state in FINAL_STATES
        whole = each.bytes_total + (mean or 0) * (each.num_jobs - each.num_planned)
        done += whole if is_final else each.bytes_done
    stages: Counter[str] = Counter()
    for each in group:
        stages[_stage(each)] += each.num_jobs
    return BaseProgress(
        name=parse_location(base).name,
        num_jobs=num_jobs,
        num_final=sum(each.num_jobs for each in group if each.state in FINAL_STATES),
        bytes_done=done,
        bytes_total=None if mean is None else known + mean * (num_jobs - num_planned),
        stages=stages,
    )


def _stage(work: Work) -> str:
    return work.state.value.lower() if work.stage is None else work.stage


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
