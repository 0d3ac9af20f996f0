"""One tensor of a release beside what stands for it in a checkpoint, tile by tile: how far off, what of the delta.

Sums are taken in float64, of strips that stay in a core's cache.

Shape suffixes: O output features, I input features.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch

from workers.against.accounts import Pair
from workers.against.scales import Marginals, follows, is_scaled, is_spread
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.output import OutputTensor
from workers.numerics.rounding import BITS
from workers.numerics.tiles import TILE_ELEMENTS, Tiling, strips_of

_STRIP_ELEMENTS = 1 << 15
_NUM_ROUNDS = 3
"""Of fitting rows and columns in turns: they are far apart, or were found by the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One of the three checkpoints, and what reads its weights as numbers."""

    plan: BasePlan
    reader: ArithmeticCheck


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Scales that were found in a weight: B = diag(rows) A diag(columns) + noise."""

    columns_I: torch.Tensor | None
    """None where columns are scaled alike."""
    rows_O: torch.Tensor | None
    norms: tuple[str, ...]
    """Changed norms whose change the columns follow."""
    error: float
    """Relative, with the scales taken out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was found of one tensor."""

    pair: Pair
    in_form: bool
    """Whether it is stored as codes."""
    num_different: int
    """Elements with other bits, or, where its dtype is another one, with other bits than casting gives; 0 of codes."""
    cast: bool
    """Whether its dtype is another one."""
    error: float
    """|B - A| / |A|, Frobenius norms."""
    delta: float | None
    """|A - W| / |W|; None where W is not known."""
    survival: float | None
    """<B - W, A - W> / <A - W, A - W>; None without an adapter's delta, or where W is not known."""
    scaled: Scaled | None = None


@dataclass(slots=True)
class _Sums:
    num_different: int = 0
    error: float = 0.0
    release: float = 0.0
    weight: float = 0.0
    delta: float = 0.0
    kept: float = 0.0


@dataclass(frozen=True, slots=True)
class _Strip:
    rows: slice
    release_OI: torch.Tensor
    checkpoint_OI: torch.Tensor
    weight_OI: torch.Tensor | None
    num_different: int


class Examiner:
    """Compares tensors of a release with a checkpoint's; threads share it."""

    def __init__(
        self,
        release: Model,
        checkpoint: Model,
        base: Model | None,
        *,
        touched: Collection[str],
        on_bytes: Callable[[int], None],
    ) -> None:
        """Start.

        Args:
            release: A, in plain numbers.
            checkpoint: B, in any form that is read.
            base: W, what the release was merged into; None where it cannot be had.
            touched: tensors of the release that the adapter changes: of others, what differs from W is no delta.
            on_bytes: is told of bytes of the release that were looked at; may raise to stop.
        """
        self._release, self._checkpoint, self._base = release, checkpoint, base
        self._touched = touched
        self._on_bytes = on_bytes
        task = None if base is None else base.plan.quantization
        self._together = frozenset() if task is None else {name for group in task.groups for name in group.stored}

    def examine(self, pair: Pair, ratios: Mapping[str, torch.Tensor]) -> Figures:
        """Compare one tensor.

        Args:
            pair: of the release and of the checkpoint.
            ratios: by changed norm of the same layer, what it was divided by: scales that columns may have.
        """
        in_form = self._there(pair).stored is None
        shape = self._here(pair).shape
        is_matrix = len(shape) == 2 and math.prod(shape) > 0
        marginals = _marginals_of(shape) if is_matrix and in_form else None
        sums = _Sums()
        for strip in self._strips(pair, with_weight=True):
            a, b = strip.release_OI, strip.checkpoint_OI
            error = b - a
            sums.num_different += strip.num_different
            sums.error += float(error.view(-1).dot(error.view(-1)))
            sums.release += float(a.view(-1).dot(a.view(-1)))
            if strip.weight_OI is not None:
                delta = a - strip.weight_OI
                sums.weight += float(strip.weight_OI.view(-1).dot(strip.weight_OI.view(-1)))
                sums.delta += float(delta.view(-1).dot(delta.view(-1)))
                sums.kept += float(delta.view(-1).dot(error.view(-1)))  # B - W is A - W and the error
            if marginals is not None:
                _add(marginals, strip)
        if is_matrix and sums.num_different and marginals is None:
            marginals = _marginals_of(shape)
            for strip in self._strips(pair, with_weight=False):
                _add(marginals, strip)
        known = self._weight(pair) is not None
        kept = sums.kept + sums.delta
        measured = pair.release in self._touched and sums.delta > 0 and math.isfinite(kept)
        return Figures(
            pair=pair,
            in_form=in_form,
            num_different=0 if in_form else sums.num_different,
            cast=not in_form and self._there(pair).dtype != self._here(pair).dtype,
            error=_relative(sums.error, sums.release),
            delta=_relative(sums.delta, sums.weight) if known else None,
            survival=kept / sums.delta if measured else None,
            scaled=None if marginals is None else self._scaled(pair, *marginals, sums, ratios),
        )

    def values(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a small tensor of the release, and what stands for it, as float64."""
        strips = list(self._strips(pair, with_weight=False))
        release = torch.cat([strip.release_OI.reshape(-1) for strip in strips])
        return release, torch.cat([strip.checkpoint_OI.reshape(-1) for strip in strips])

    def _scaled(
        self, pair: Pair, columns: Marginals, rows: Marginals, sums: _Sums, ratios: Mapping[str, torch.Tensor]
    ) -> Scaled | None:
        if not math.isfinite(sums.error) or not sums.release:
            return None
        num_rows, num_columns = len(rows.aa), len(columns.aa)
        norms = [
            name for name, ratio in ratios.items() if len(ratio) == num_columns and follows(columns, ratio, num_rows)
        ]
        if not norms and not is_scaled(columns, rows, sums.error):
            return None
        columns_I = ratios[norms[0]] if norms else columns.fitted
        by_column = columns
        for _ in range(_NUM_ROUNDS):
            by_row = self._products(pair, columns_I=columns_I)
            rows_O = by_row.fitted
            by_column = self._products(pair, rows_O=rows_O)
            columns_I = by_column.fitted
        error = _relative(by_column.residual, sums.release)
        return Scaled(
            columns_I=columns_I.float() if norms or is_spread(columns_I, error, num_rows) else None,
            rows_O=rows_O.float() if is_spread(rows_O, error, num_columns) else None,
            norms=tuple(norms),
            error=error,
        )

    def _products(
        self, pair: Pair, columns_I: torch.Tensor | None = None, rows_O: torch.Tensor | None = None
    ) -> Marginals:
        """Sum products over the axis whose scales are given, with them applied to A."""
        num_rows, num_columns = self._here(pair).shape
        found = Marginals.zeros(num_columns if columns_I is None else num_rows)
        for strip in self._strips(pair, with_weight=False):
            a, b = strip.release_OI, strip.checkpoint_OI
            if columns_I is not None:
                a = a * columns_I
                found.bb[strip.rows] = (b * b).sum(1)
                found.ab[strip.rows] = (a * b).sum(1)
                found.aa[strip.rows] = (a * a).sum(1)
            else:
                assert rows_O is not None
                a = a * rows_O[strip.rows, None]
                found.bb.add_((b * b).sum(0))
                found.ab.add_((a * b).sum(0))
                found.aa.add_((a * a).sum(0))
        return found

    def _strips(self, pair: Pair, *, with_weight: bool) -> Iterator[_Strip]:
        here, there = self._here(pair), self._there(pair)
        was = self._weight(pair) if with_weight else None
        alignments = [self._release.reader.row_alignment(here), self._checkpoint.reader.row_alignment(there)]
        if was is not None:
            assert self._base is not None
            alignments.append(self._base.reader.row_alignment(was))
        for rows in Tiling.of(here.shape, math.lcm(*alignments), TILE_ELEMENTS["cpu"]).rows:
            if rows.stop == rows.start:
                continue
            a = self._release.reader.weight(here, rows)
            b = self._checkpoint.reader.weight(there, rows)
            w = None if was is None or self._base is None else self._base.reader.weight(was, rows)
            if with_weight:
                self._on_bytes(a.numel() * a.dtype.itemsize)
            for part in strips_of(a.shape[0], a.shape[1], _STRIP_ELEMENTS):
                yield _Strip(
                    rows=slice(rows.start + part.start, rows.start + part.stop),
                    release_OI=a[part].to(torch.float64, copy=True),
                    checkpoint_OI=b[part].to(torch.float64, copy=True),
                    weight_OI=None if w is None else w[part].to(torch.float64, copy=True),
                    num_different=_num_different(a[part], b[part]) if there.stored is not None else 0,
                )

    def _here(self, pair: Pair) -> OutputTensor:
        return self._release.plan.by_name[pair.release]

    def _there(self, pair: Pair) -> OutputTensor:
        return self._checkpoint.plan.by_name[pair.checkpoint]

    def _weight(self, pair: Pair) -> OutputTensor | None:
        """Return what a tensor of the release was merged into; None where that cannot be read tile by tile."""
        if self._base is None:
            return None
        here, plan = self._here(pair), self._base.plan
        found = plan.by_name.get(here.name)
        if found is None:  # a head that the base ties to its embedding
            stored = plan.stored_name(self._release.plan.conversions.parameter_of(here.name))
            found = None if stored is None else plan.by_name.get(stored)
        return None if found is None or found.shape != here.shape or found.name in self._together else found


def _marginals_of(shape: tuple[int, ...]) -> tuple[Marginals, Marginals]:
    """Return empty sums by column and by row."""
    num_rows, num_columns = shape
    return Marginals.zeros(num_columns), Marginals.zeros(num_rows)


def _add(marginals: tuple[Marginals, Marginals], strip: _Strip) -> None:
    columns, rows = marginals
    a, b = strip.release_OI, strip.checkpoint_OI
    for product, by_column, by_row in (
        (b * b, columns.bb, rows.bb),
        (a * b, columns.ab, rows.ab),
        (a * a, columns.aa, rows.aa),
    ):
        by_column.add_(product.sum(0))
        by_row[strip.rows] = product.sum(1)


def _num_different(release: torch.Tensor, checkpoint: torch.Tensor) -> int:
    cast = release.to(checkpoint.dtype)
    bits = BITS[cast.dtype.itemsize]
    return int((cast.contiguous().view(bits) != checkpoint.contiguous().view(bits)).sum())


def _relative(squared: float, squared_of: float) -> float:
    if not math.isfinite(squared):
        return math.inf
    return math.sqrt(squared / squared_of) if squared_of > 0 else (math.inf if squared > 0 else 0.0)
