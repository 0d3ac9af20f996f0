"""The geometry of the pictures in a parity report: numbers become places in an SVG, the template draws them."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH = 960
"""Of every picture, in SVG units."""

NUM_COLOURS = 7
"""Kinds of modules told apart by colour; the rest share one more, which `Series.colour` counts as this number."""

_TOP, _RIGHT, _BOTTOM, _LEFT = 10, 12, 26, 64
_PLOT_HEIGHT = 170
_ROW_HEIGHT = 26
_ROW_LABEL_WIDTH = 250
_MAX_COLUMN_LABELS = 17
_MAX_FINITE = 1e300
"""What is not finite arrives as the largest float, since JSON knows no infinity."""
_MAX_RATIO = 1e12
"""Between the ends of a logarithmic scale; what is larger still is drawn at its end."""

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Where a value is drawn: `low` at `start`, `high` at `stop`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool

    def place(self, value: float) -> float:
        """Return the coordinate of a value; what lies outside is drawn at the end."""
        low, high, x = (math.log10(v) if self.is_log else v for v in (self.low, self.high, self._clip(value)))
        return round(self.start + (x - low) / (high - low) * (self.stop - self.start), 1)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Return coordinates and labels of round values."""
        values = _log_ticks(self.low, self.high) if self.is_log else _linear_ticks(self.low, self.high)
        return tuple((self.place(value), figure(value)) for value in values)

    def _clip(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """One value."""

    x: float
    y: float
    words: str
    """What it is and its value, shown on pointing at it."""
    is_beyond: bool = False
    """Whether it is beyond the threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The values of one kind of module, layer by layer."""

    colour: int
    dots: tuple[Dot, ...]
    line: str
    """Points of a polyline through them; empty where a layer has several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChart:
    """Values of tensors: layers from left to right, tensors outside of layers at the right end."""

    title: str
    explanation: str
    height: int
    series: tuple[Series, ...]
    columns: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    """y of the threshold."""
    left: int = _LEFT
    right: int = WIDTH - _RIGHT


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of a row chart."""

    y: float
    label: str
    dots: tuple[tuple[int, Dot], ...]
    """With the number of the reference they belong to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowChart:
    """A value for each prompt and reference: prompts from top to bottom."""

    title: str
    explanation: str
    height: int
    rows: tuple[Row, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    """x of the threshold."""
    left: int = _ROW_LABEL_WIDTH
    right: int = WIDTH - _RIGHT
    bottom: float


def kind_of(tensor: str) -> str:
    """Return what a tensor is in its layer: `self_attn.q_proj` for `model.layers.3.self_attn.q_proj.weight`."""
    inner = tensor[match.end() + 1 :] if (match := _NUMBER.search(tensor)) else tensor
    return _NUMBER.sub("*", inner).removesuffix(".weight")


def layer_of(tensor: str) -> int | None:
    """Return the number of a tensor's layer, or None for one outside of layers."""
    return int(match[0]) if (match := _NUMBER.search(tensor)) else None


def layer_chart(
    title: str,
    explanation: str,
    values: Mapping[str, float],
    colours: Mapping[str, int],
    *,
    is_log: bool = False,
    limit: float | None = None,
    include: Iterable[float] = (),
) -> LayerChart | None:
    """Place one value for each tensor.

    Args:
        title: of the picture.
        explanation: what is drawn, in a sentence.
        values: by tensor.
        colours: by kind of module.
        is_log: logarithmic; values that are not positive are left out.
        limit: threshold; drawn, and values beyond it are marked.
        include: values that the scale shows whether or not they occur.

    Returns:
        The picture; None when there is nothing to show.
    """
    values = {name: value for name, value in values.items() if value > 0 or not is_log}
    if not values:
        return None
    y = _fit([*values.values(), *include, *([limit] if limit else [])], _TOP + _PLOT_HEIGHT, _TOP, is_log=is_log)
    layers = sorted({layer for name in values if (layer := layer_of(name)) is not None})
    columns: list[int | None] = [*layers, *([None] if any(layer_of(name) is None for name in values) else [])]
    step = (WIDTH - _LEFT - _RIGHT) / len(columns)
    x_of = {layer: round(_LEFT + step * (n + 0.5), 1) for n, layer in enumerate(columns)}
    by_kind: dict[str, list[str]] = {}
    for name in values:
        by_kind.setdefault(kind_of(name), []).append(name)
    series = []
    for kind, names in by_kind.items():
        names.sort(key=lambda name: math.inf if (layer := layer_of(name)) is None else layer)
        dots = tuple(
            Dot(
                x=x_of[layer_of(name)],
                y=y.place(values[name]),
                words=f"{name}: {figure(values[name])}",
                is_beyond=limit is not None and not values[name] <= limit,
            )
            for name in names
        )
        in_order = all(left.x < right.x for left, right in pairwise(dots))
        line = " ".join(f"{dot.x},{dot.y}" for dot in dots) if in_order and len(dots) > 1 else ""
        series.append(Series(colour=colours.get(kind, NUM_COLOURS), dots=dots, line=line))
    every = math.ceil(len(layers) / _MAX_COLUMN_LABELS) or 1
    labels = [(x_of[layer], str(layer)) for layer in layers[::every]] + (
        [(x_of[None], "other")] if None in x_of else []
    )
    return LayerChart(
        title=title,
        explanation=explanation,
        height=_TOP + _PLOT_HEIGHT + _BOTTOM,
        # What is beyond the threshold is drawn last, on top of the rest.
        series=tuple(sorted(series, key=lambda one: (any(dot.is_beyond for dot in one.dots), -one.colour))),
        columns=tuple(labels),
        ticks=y.ticks(),
        limit=y.place(limit) if limit else None,
    )


def row_chart(
    title: str,
    explanation: str,
    labels: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    limit: float | None = None,
) -> RowChart | None:
    """Place one value for each prompt and reference, on a logarithmic scale.

    Args:
        title: of the picture.
        explanation: what is drawn, in a sentence.
        labels: prompts.
        values: for each reference, one value for each prompt; the first reference is the one that gates.
        limit: threshold of the first reference.

    Returns:
        The picture; None when there is nothing to show.
    """
    positive = [value for per_prompt in values for value in per_prompt if value > 0]
    if not positive:
        return None
    x = _fit([*positive, *([limit] if limit else [])], _ROW_LABEL_WIDTH + 14, WIDTH - _RIGHT - 14, is_log=True)
    bottom = _TOP + _ROW_HEIGHT * len(labels)
    rows = []
    for number, label in enumerate(labels):
        y = _TOP + _ROW_HEIGHT * (number + 0.5)
        dots = [
            Dot(
                x=x.place(per_prompt[number]),
                y=y,
                words=f"{label}: {figure(per_prompt[number])}",
                is_beyond=reference == 0 and limit is not None and not per_prompt[number] <= limit,
            )
            for reference, per_prompt in enumerate(values)
        ]
        rows.append(Row(y=y, label=label, dots=tuple(enumerate(dots))[::-1]))
    return RowChart(
        title=title,
        explanation=explanation,
        height=bottom + _BOTTOM,
        rows=tuple(rows),
        ticks=x.ticks(),
        limit=x.place(limit) if limit else None,
        bottom=bottom,
    )


def figure(value: float | None) -> str:
    """Return a number in three digits."""
    if value is None:
        return "-"
    return "not finite" if abs(value) > _MAX_FINITE else f"{value:.3g}"


def _fit(values: Sequence[float], start: float, stop: float, *, is_log: bool) -> Scale:
    finite = [min(max(value, -_MAX_FINITE), _MAX_FINITE) for value in values]
    low, high = min(finite), max(finite)
    if is_log:
        low, high = low / 1.25, min(high, low * _MAX_RATIO) * 1.25
    else:
        margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = low - margin, high + margin
    return Scale(low=low, high=high, start=start, stop=stop, is_log=is_log)


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    choices: tuple[Callable[[], list[float]], ...] = (
        lambda: [10.0**n for n in decades[:: math.ceil(len(decades) / 6)]],
        lambda: [digit * 10.0**n for n in decades for digit in (1, 2, 5)],
        lambda: _linear_ticks(low, high),
    )
    for choice in choices:
        ticks = [value for value in choice() if low <= value <= high]
        if len(ticks) >= 3:
            return ticks
    return ticks
