"""The geometry of a timeline: a lane for each worker, its attempts as bars, pauses of places as bands behind them.

Where there are too many attempts to see, a lane shows for each moment how many were at work, by their outcome.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.console.attempts import Attempt, Band, Outcome

WIDTH = 1040
LEFT = 190
_RIGHT = 14
_TOP = 26
_ROW = 9
_PADDING = 7
_SUMMED_HEIGHT = 44
_MAX_BARS = 2_000
"""Of all lanes: with more, lanes are summed up."""
_MAX_LANES = 48
"""With more workers, those of one machine share a lane."""
_MAX_CELLS = 6_000
_MIN_WIDTH = 1.4
_MIN_FAILED = 4.0
_MIN_GAP = 3.0
"""Between two bands of one place."""
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)
_MAX_TICKS = 9
_MAX_NAMED = 3
_TOUCHING = 0.05
"""Seconds that an attempt may begin before the one ended that it follows: both are written down a moment later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle with words to it."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One worker, or several."""

    label: str
    sublabel: str
    y: float
    height: float
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The whole picture."""

    height: float
    lanes: tuple[Lane, ...]
    bands: tuple[Box, ...]
    ticks: tuple[tuple[float, str], ...]
    is_summed: bool


class _Axis:
    def __init__(self, begin: float, end: float) -> None:
        self.begin = begin
        self.seconds = max(end - begin, 1.0)
        self.width = WIDTH - LEFT - _RIGHT

    def x(self, at: float) -> float:
        share = min(max((at - self.begin) / self.seconds, 0.0), 1.0)
        return round(LEFT + share * self.width, 1)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        step = next((each for each in _STEPS if self.seconds / each <= _MAX_TICKS), _STEPS[-1])
        while self.seconds / step > _MAX_TICKS:
            step *= 2
        first = -(-self.begin // step) * step
        return tuple(
            (self.x(at), self._label(at, step))
            for at in (first + step * number for number in range(int((self.begin + self.seconds - first) // step) + 1))
        )

    @staticmethod
    def _label(at: float, step: float) -> str:
        when = datetime.fromtimestamp(at, UTC)
        return f"{when:%b %d}" if step >= 86400 else f"{when:%H:%M}" if step >= 60 else f"{when:%H:%M:%S}"


def timeline(attempts: Sequence[Attempt], bands: Sequence[Band]) -> Timeline | None:
    """Return the picture of some attempts; None where there are none.

    Args:
        attempts: of all jobs.
        bands: pauses of places.
    """
    if not attempts:
        return None
    spans = [*((one.begin, one.end) for one in attempts), *((band.begin, band.end) for band in bands)]
    axis = _Axis(min(begin for begin, _ in spans), max(end for _, end in spans))
    groups = _groups(attempts)
    is_summed = len(attempts) > _MAX_BARS
    lanes: list[Lane] = []
    y = float(_TOP)
    num_columns = max(30, min(210, _MAX_CELLS // len(groups)))
    grids = {name: _grid(axis, group, num_columns) for name, group in groups.items()} if is_summed else {}
    most = max((sum(cell.values()) for grid in grids.values() for cell in grid.seconds), default=1.0)
    for (label, sublabel), group in groups.items():
        if is_summed:
            height = float(_SUMMED_HEIGHT)
            boxes = _summed(axis, grids[label, sublabel], y + _PADDING, height - 2 * _PADDING, most)
        else:
            rows = _rows(group)
            height = (max(row for row, _ in rows) + 1) * _ROW + 2 * _PADDING
            boxes = [_bar(axis, one, y + _PADDING + row * _ROW) for row, one in rows]
        lanes.append(Lane(label=label, sublabel=sublabel, y=y, height=height, boxes=tuple(boxes)))
        y += height
    behind = tuple(_band(axis, group, y) for group in _close_bands(axis, bands))
    return Timeline(height=y + 8, lanes=tuple(lanes), bands=behind, ticks=axis.ticks(), is_summed=is_summed)


def _close_bands(axis: _Axis, bands: Sequence[Band]) -> Iterable[list[Band]]:
    """Yield the bands of each place; those too near to each other to be told apart are one."""
    for place in dict.fromkeys(band.place for band in bands):
        group: list[Band] = []
        for band in (each for each in bands if each.place == place):
            if group and axis.x(band.begin) - axis.x(group[-1].end) >= _MIN_GAP:
                yield group
                group = []
            group.append(band)
        yield group


def _band(axis: _Axis, group: Sequence[Band], bottom: float) -> Box:
    begin, end = group[0].begin, max(band.end for band in group)
    times = f"{len(group)} times, first: " if len(group) > 1 else ""
    words = f"{group[0].place} at fault {clock(begin)} to {clock(end)}: {times}{group[0].words}"
    width = round(max(axis.x(end) - axis.x(begin), 2.0), 1)
    return Box(x=axis.x(begin), y=_TOP, width=width, height=bottom - _TOP, kind="pause", words=words)


def clock(at: float) -> str:
    """Return a time of the day (UTC)."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S}"


def _groups(attempts: Sequence[Attempt]) -> dict[tuple[str, str], list[Attempt]]:
    """Return the attempts of each lane, by its label: a worker, or a machine, or what is left of many."""
    workers: dict[tuple[str, str], list[Attempt]] = defaultdict(list)
    for one in sorted(attempts, key=lambda each: each.begin):
        workers[one.worker, one.node].append(one)
    if len(workers) <= _MAX_LANES:
        return dict(sorted(workers.items(), key=lambda item: _natural(item[0])))
    nodes: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for worker, node in workers:
        nodes[node].append((worker, node))
    found: dict[tuple[str, str], list[Attempt]] = {}
    names = sorted(nodes, key=lambda name: _natural((name, "")))
    shown, rest = (names, []) if len(names) <= _MAX_LANES else (names[: _MAX_LANES - 1], names[_MAX_LANES - 1 :])
    for name in shown:
        found[name, f"{len(nodes[name])} workers"] = [one for key in nodes[name] for one in workers[key]]
    if rest:
        keys = [key for name in rest for key in nodes[name]]
        label = f"{len(rest)} more machines", f"{len(keys)} workers"
        found[label] = [one for key in keys for one in workers[key]]
    return found


def _natural(names: tuple[str, str]) -> tuple[object, ...]:
    worker, node = names
    digits = "".join(letter for letter in worker if letter.isdigit())
    return node, int(digits[:18] or 0), worker


def _rows(group: Sequence[Attempt]) -> list[tuple[int, Attempt]]:
    """Return attempts with the row of each: jobs of one pass lie below each other."""
    ends: list[float] = []
    placed: list[tuple[int, Attempt]] = []
    for one in sorted(group, key=lambda each: (each.begin, each.job_id)):
        row = next((number for number, end in enumerate(ends) if end <= one.begin + _TOUCHING), len(ends))
        if row == len(ends):
            ends.append(one.end)
        else:
            ends[row] = one.end
        placed.append((row, one))
    return placed


def _bar(axis: _Axis, one: Attempt, y: float) -> Box:
    x = axis.x(one.begin)
    why = f": {one.words}" if one.words else ""
    words = f"{one.job_id}  {clock(one.begin)} to {clock(one.end)}, {one.end - one.begin:.1f} s, {one.outcome}{why}"
    width = round(max(axis.x(one.end) - x, _MIN_WIDTH), 1)
    return Box(x=x, y=y, width=width, height=_ROW - 2, kind=_kind(one.outcome), words=words)


def _kind(outcome: Outcome) -> str:
    return outcome.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class _Grid:
    seconds: list[dict[Outcome, float]]
    """At work in each column, by outcome."""
    ended: list[list[Attempt]]


def _grid(axis: _Axis, group: Iterable[Attempt], num_columns: int) -> _Grid:
    width = axis.seconds / num_columns
    grid = _Grid([defaultdict(float) for _ in range(num_columns)], [[] for _ in range(num_columns)])
    for one in group:
        begin, end = (one.begin - axis.begin) / width, (one.end - axis.begin) / width
        last = min(int(end), num_columns - 1)
        for column in range(min(int(begin), num_columns - 1), last + 1):
            grid.seconds[column][one.outcome] += max(min(end, column + 1) - max(begin, column), 0.0)
        grid.ended[last].append(one)
    return grid


def _summed(axis: _Axis, grid: _Grid, y: float, height: float, most: float) -> list[Box]:
    width = axis.width / len(grid.seconds)
    boxes: list[Box] = []
    for column, (seconds, ended) in enumerate(zip(grid.seconds, grid.ended, strict=True)):
        if not seconds:
            continue
        words = _cell_words(axis, column, len(grid.seconds), ended)
        bottom = y + height
        for outcome in Outcome:
            if outcome not in seconds:
                continue
            tall = height * seconds[outcome] / most
            if outcome is Outcome.FAILED:
                tall = max(tall, _MIN_FAILED)  # one among thousands is what is looked for
            tall = round(min(tall, bottom - y), 1)
            if tall <= 0:
                continue
            bottom -= tall
            x = round(LEFT + column * width, 1)
            boxes.append(
                Box(x=x, y=round(bottom, 1), width=round(width, 1), height=tall, kind=_kind(outcome), words=words)
            )
    return boxes


def _cell_words(axis: _Axis, column: int, num_columns: int, ended: Sequence[Attempt]) -> str:
    seconds = axis.seconds / num_columns
    begin = axis.begin + column * seconds
    counts = Counter(one.outcome for one in ended)
    wrong = [one.job_id for one in ended if one.outcome is Outcome.FAILED]
    named = f" ({', '.join(wrong[:_MAX_NAMED])}{' …' if len(wrong) > _MAX_NAMED else ''})"
    told = [f"{count} {outcome}{named if outcome is Outcome.FAILED else ''}" for outcome, count in counts.items()]
    return f"{clock(begin)} to {clock(begin + seconds)}: ended {', '.join(told) or 'none'}"
