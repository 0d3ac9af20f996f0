"""What tools fold into neighbours without changing what the model computes, decided from the tensors themselves.

- A norm that was divided by some ratio, where columns of weights in its layer are multiplied by it (AWQ, SmoothQuant);
  norms that compute with 1 + weight (Gemma) included.
- A weight whose rows were divided, where the columns of another one in its layer are multiplied (AWQ: values and
  output, up and down).
- A bias beside either.

What no neighbour takes back is a change, and is told as one, or, where it is small, part of the error of its weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from workers.against.figures import Figures
from workers.against.scales import matches, spread

_NO_ROUNDING = 0.2
"""Scales that are spread wider are no work of rounding: where weights lie on a grid already, as those of a base in few
bits do, new extremes move all of a group by 1 part in 7 (4 bits), and of a row, where groups are as long as rows."""
_LAYER = re.compile(r"^(.*?\.\d+\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A small tensor in numbers that is another one in the checkpoint: a norm, or a bias."""

    name: str
    ratios: tuple[torch.Tensor, ...]
    """What it was divided by, as it is, and as 1 + it; float64, without those that are not finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foldings:
    """What is folded, and what is left."""

    small: Mapping[str, str] = field(default_factory=dict)
    """By norm or bias, what takes its change back."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """By weight, what its scales are of: to be compared by behaviour alone."""
    unexplained: Mapping[str, str] = field(default_factory=dict)
    """By weight, which scales of it nothing takes back."""


def layer_of(name: str) -> str:
    """Return the layer that a tensor is in, by the beginning of its name; empty for one outside of layers."""
    return match[1] if (match := _LAYER.match(name)) else ""


def changed(name: str, release: torch.Tensor, checkpoint: torch.Tensor) -> Changed:
    """Return a small tensor that was changed.

    Args:
        name: of the release's.
        release: its values, float64.
        checkpoint: what stands for it.
    """
    ratios = (release / checkpoint, (1 + release) / (1 + checkpoint))
    return Changed(name=name, ratios=tuple(ratio for ratio in ratios if bool(ratio.isfinite().all())))


def ratios_of(small: Iterable[Changed]) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Return what columns may be scaled by, by layer and by the name of what was changed, numbered by convention."""
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for each in small:
        for number, ratio in enumerate(each.ratios):
            found[layer_of(each.name)][f"{number} {each.name}"] = ratio
    return found


def explain(figures: Sequence[Figures], small: Sequence[Changed]) -> Foldings:
    """Decide what is folded into what.

    Args:
        figures: of all tensors.
        small: the norms and biases that were changed.
    """
    by_layer: dict[str, list[Figures]] = defaultdict(list)
    for each in figures:
        if each.scaled is not None and (each.scaled.columns_I is not None or each.scaled.rows_O is not None):
            by_layer[layer_of(each.pair.release)].append(each)
    weights: dict[str, str] = {}
    unexplained: dict[str, str] = {}
    readers: dict[str, list[str]] = defaultdict(list)
    for scaled in by_layer.values():
        for each in scaled:
            name = each.pair.release
            sources, open_ends = _sources(each, scaled)
            if open_ends:
                unexplained[name] = " and ".join(open_ends)
            elif sources:
                weights[name] = " and ".join(sources)
            assert each.scaled is not None
            for norm in _names(each.scaled.norms):
                readers[norm].append(name)
    return Foldings(small=_of_small(small, readers, by_layer), weights=weights, unexplained=unexplained)


def _sources(each: Figures, scaled: Sequence[Figures]) -> tuple[list[str], list[str]]:
    """Return what the scales of a weight are of, and which of them nothing takes back."""
    assert each.scaled is not None
    columns, rows = each.scaled.columns_I, each.scaled.rows_O
    sources, open_ends = [], []
    others = [(other.pair.release, other.scaled) for other in scaled if other is not each]
    if columns is not None:
        norms = _names(each.scaled.norms)
        partner = next((name for name, o in others if o is not None and _take_back(columns, o.rows_O)), None)
        if norms:
            sources.append(f"columns by {', '.join(norms)}")
        elif partner is not None:
            sources.append(f"columns by the rows of {partner}")
        elif spread(columns) > _NO_ROUNDING:
            open_ends.append("columns")
    if rows is not None:
        partner = next((name for name, o in others if o is not None and _take_back(rows, o.columns_I)), None)
        if partner is not None:
            sources.append(f"rows by the columns of {partner}")
        elif spread(rows) > _NO_ROUNDING:
            open_ends.append("rows")
    return sources, open_ends


def _names(norms: Sequence[str]) -> list[str]:
    """Return norms by name, each once, of which `ratios_of` has two ratios."""
    return sorted({norm.partition(" ")[2] for norm in norms})


def _take_back(scales: torch.Tensor, of_other: torch.Tensor | None) -> bool:
    return of_other is not None and matches(scales, 1 / of_other)


def _of_small(
    small: Sequence[Changed], readers: Mapping[str, Sequence[str]], by_layer: Mapping[str, Sequence[Figures]]
) -> dict[str, str]:
    found = {}
    for each in small:
        module = each.name.rpartition(".")[0]
        if each.name in readers:
            found[each.name] = f"the columns of {', '.join(readers[each.name])}"
        elif each.name.endswith(".bias") and f"{module}.weight" in readers:
            beside = next((other for other in small if other.name == f"{module}.weight"), None)
            if beside is not None and any(_alike(ratio, each.ratios) for ratio in beside.ratios):
                found[each.name] = f"the columns of {', '.join(readers[f'{module}.weight'])}"
        elif each.name.endswith(".bias"):
            for weight in by_layer.get(layer_of(each.name), ()):
                rows = None if weight.scaled is None else weight.scaled.rows_O
                is_beside = weight.pair.release == f"{module}.weight"
                if is_beside and rows is not None and any(_alike(1 / rows, [ratio]) for ratio in each.ratios[:1]):
                    found[each.name] = f"the rows of {weight.pair.release}"
    return found


def _alike(ratio: torch.Tensor, others: Sequence[torch.Tensor]) -> bool:
    return any(matches(other, ratio.double()) for other in others)
