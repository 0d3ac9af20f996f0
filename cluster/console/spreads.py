"""Distributions of parity figures over the releases of a batch, as the geometry of histograms."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.console.lanes import Box

WIDTH = 480
HEIGHT = 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 12, 10, 24
_NUM_BINS = 32
_NUM_TICKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of every release that has it."""

    title: str
    note: str
    values: Sequence[tuple[str, float]]
    """By job."""
    limit: float | None
    """The threshold, where all requests have the same."""
    is_best_high: bool = False
    is_log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A histogram of one figure."""

    title: str
    note: str
    boxes: tuple[Box, ...]
    ticks: tuple[tuple[float, str], ...]
    most: int
    """Releases in the highest column."""
    limit: float | None
    """x of the threshold."""
    limit_words: str
    worst: tuple[str, str]
    """The release that is worst, and its value."""
    median: str
    num_releases: int


def spread(figure: Figure) -> Spread | None:
    """Return the histogram of a figure; None where no release has it."""
    if not figure.values:
        return None
    values = [value for _, value in figure.values]
    scale = _Scale(values, figure.limit, is_log=figure.is_log)
    counts = [0] * _NUM_BINS
    for value in values:
        counts[scale.column(value)] += 1
    most = max(counts)
    room = HEIGHT - _TOP - _BOTTOM
    boxes = []
    for number, count in enumerate(counts):
        if count:
            low, high = scale.bounds(number)
            tall = round(max(room * count / most, 2.0), 1)
            words = f"{count} of {len(values)}: {number_words(low)} to {number_words(high)}"
            x, width = scale.place(number), round(scale.width - 1, 1)
            boxes.append(Box(x=x, y=HEIGHT - _BOTTOM - tall, width=width, height=tall, kind="value", words=words))
    pick = min if figure.is_best_high else max
    bound = "least" if figure.is_best_high else "most"
    job_id, worst = pick(figure.values, key=lambda one: one[1])
    return Spread(
        title=figure.title,
        note=figure.note,
        boxes=tuple(boxes),
        ticks=scale.ticks(),
        most=most,
        limit=None if figure.limit is None else scale.at(figure.limit),
        limit_words="" if figure.limit is None else f"at {bound} {number_words(figure.limit)}",
        worst=(job_id, number_words(worst)),
        median=number_words(sorted(values)[len(values) // 2]),
        num_releases=len(values),
    )


def number_words(value: float) -> str:
    """Return a figure with as many digits as a person compares."""
    return f"{value:.4g}"


class _Scale:
    def __init__(self, values: Sequence[float], limit: float | None, *, is_log: bool) -> None:
        drawn = [value for value in (*values, *(() if limit is None else (limit,))) if math.isfinite(value)]
        positive = [value for value in drawn if value > 0]
        self._is_log = is_log and bool(positive)
        ends = self._all(positive if self._is_log else drawn or [0.0])
        self._low, high = min(ends), max(ends)
        if high - self._low < 1e-12 * max(1.0, abs(high)):
            margin = max(abs(high) * 0.01, 1e-9)
            self._low, high = self._low - margin, high + margin
        self._span = high - self._low
        self._num_decimals = max(0, 1 - math.floor(math.log10(self._span)))  # ticks are told apart
        self.width = (WIDTH - _LEFT - _RIGHT) / _NUM_BINS

    def _all(self, values: Iterable[float]) -> list[float]:
        return [math.log10(value) if self._is_log else value for value in values]

    def _share(self, value: float) -> float:
        if self._is_log and value <= 0:
            return 0.0  # an exact zero is as good as it gets
        (place,) = self._all([value]) if math.isfinite(value) else (self._low + self._span,)
        return min(max((place - self._low) / self._span, 0.0), 1.0)

    def column(self, value: float) -> int:
        return min(int(self._share(value) * _NUM_BINS), _NUM_BINS - 1)

    def place(self, number: int) -> float:
        return round(_LEFT + number * self.width, 1)

    def at(self, value: float) -> float:
        return round(_LEFT + self._share(value) * _NUM_BINS * self.width, 1)

    def bounds(self, number: int) -> tuple[float, float]:
        low, high = (self._low + self._span * (number + side) / _NUM_BINS for side in (0, 1))
        return (10.0**low, 10.0**high) if self._is_log else (low, high)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        shares = [number / (_NUM_TICKS - 1) for number in range(_NUM_TICKS)]
        found = []
        for share in shares:
            value = self._low + self._span * share
            words = f"{10.0**value:.2g}" if self._is_log else f"{value:.{self._num_decimals}f}"
            found.append((round(_LEFT + share * _NUM_BINS * self.width, 1), words))
        return tuple(found)
