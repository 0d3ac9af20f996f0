"""Parameters that share their values: in a model, and in the files of a base.

A configuration says which parameters of a model are one; whether a base's files follow it, transformers decides by
their values (`tie_weights` of transformers 5.23).
"""

import math
from collections import defaultdict
from collections.abc import Collection, Container, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from workers.files.layout import CheckpointLayout
from workers.files.tensor_io import read_rows
from workers.numerics.tiles import TILE_ELEMENTS, rows_per_tile

COMPUTES_WITH_FLAG = frozenset({"longt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"})
"""Types of models that scale what their head is given if `tie_word_embeddings` says so, whether it is tied or not."""


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the names of parameters that stand for the same values, all of them for each."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: tuple(group) for group in names.values() if len(group) > 1 for name in group}


def stored_apart(
    directory: Path,
    layout: CheckpointLayout,
    in_form: Container[str],
    stored_names: Mapping[str, str],
    model: PreTrainedModel,
) -> frozenset[str]:
    """Find the parameters that are tied by the configuration and have values of their own in the files.

    The values of tensors that are stored twice are read; where the files follow the configuration, none are.

    Args:
        directory: of the base.
        layout: its tensors.
        in_form: weights that are stored as codes: those of two are no copies of each other.
        stored_names: names in the files of the model's tensors, by their names in the model.
        model: skeleton of the base; its ties are those of the configuration.

    Returns:
        Names in the model.
    """
    apart = set()
    first: dict[str, str] = {}
    """By source: the parameter that the others of its group are compared with."""
    for target, source in model.all_tied_weights_keys.items():
        there = [name for name in (source, target) if name in stored_names]
        if there:
            same = first.setdefault(source, there[0])
            if target in there and target != same:
                names = [stored_names[name] for name in (same, target)]
                if any(name in in_form for name in names) or not _are_equal(directory, layout, names):
                    apart.add(target)
    return frozenset(apart)


def come_apart(model: PreTrainedModel, names: Collection[str]) -> None:
    """Give some parameters of a skeleton values of their own.

    Args:
        model: on the meta device.
        names: of parameters that are tied to others.
    """
    for name in names:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, key, nn.Parameter(torch.empty_like(getattr(module, key)), requires_grad=False))
        model.all_tied_weights_keys.pop(name, None)


def _are_equal(directory: Path, layout: CheckpointLayout, names: Sequence[str]) -> bool:
    places = [(shard.name, spec) for shard, spec in (layout.tensors[name] for name in names)]
    (_, spec), (_, other) = places
    if spec.shape != other.shape:
        return False
    num_rows = spec.shape[0] if spec.shape else 1
    step = max(1, rows_per_tile(num_rows, max(1, math.prod(spec.shape[1:])), 1, TILE_ELEMENTS["cpu"]))
    for start in range(0, num_rows, step):
        rows = [read_rows(directory / shard, each, start, min(start + step, num_rows)) for shard, each in places]
        dtype = torch.promote_types(*(each.dtype for each in rows))
        if not torch.equal(*(each.to(dtype) for each in rows)):
            return False
    return True
