"""Adapters of a resized vocabulary: tokens were added to the base, or taken away, before the training."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import UnsupportedError
from workers.adapters.names import PREFIX
from workers.bases.model import input_embedding
from workers.files.layout import TensorSpec

_ROWS = (("weight", 0), ("bias", 0), ("lora_B.weight", 0), ("lora_embedding_A", 1))
"""Ends of names of what has an entry for every row of a weight, with the dimension of these entries."""


def num_tokens_of(
    where: str,
    tensors: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: Callable[[], PreTrainedModel],
) -> int | None:
    """Return the size of the vocabulary that an adapter was trained with, or None where it is the base's.

    Args:
        where: the adapter's file, for messages.
        tensors: of the adapter, by PEFT's names, as the base has them.
        shapes: of all tensors of the base's model, by name.
        skeleton: makes the base's model; asked only where a tensor has another number of rows.

    Raises:
        UnsupportedError: it is another one, and the adapter does not bring all that depends on it.
    """
    rows = {name: found for name, spec in tensors.items() if (found := _rows(name, spec)) is not None}
    if all(num_rows == shapes[name][0] for name, num_rows in rows.values() if shapes.get(name)):
        return None
    model = skeleton()
    parts = _vocabulary_of(model)
    of_tokens = {name: found for name, found in rows.items() if found[0] in parts}
    first = next((name for name, (weight, size) in of_tokens.items() if size != shapes[weight][0]), None)
    if first is None:
        return None
    weight, num_tokens = of_tokens[first]
    told = (
        f"{where}: tensor {tensors[first].name} is of a vocabulary of {num_tokens} tokens, and {weight} of the base "
        f"has {shapes[weight][0]}: tokens were added or taken away before the training"
    )
    resize = (
        f"resize the base to {num_tokens} as the training did, with the same values, save it, and name that as base"
    )
    if others := {size for _, size in of_tokens.values()} - {num_tokens}:
        raise UnsupportedError(
            f"{told}, and others of its tensors are of {min(others)}; {resize}, or save the adapter with "
            "embedding and head in modules_to_save"
        )
    brought = {plain for name in tensors if (plain := plain_name(name)) is not None}
    needed = defaultdict(set)
    for name, parameter in parts.items():
        needed[id(parameter)].add(name)
    for same in needed.values():
        if same.isdisjoint(brought):
            raise UnsupportedError(
                f"{told}; the adapter does not bring {min(same)} whole, so nothing says what its rows are; {resize}, "
                "or train with embedding and head in modules_to_save"
            )
    return num_tokens


def resize_vocabulary(model: PreTrainedModel, num_tokens: int | None) -> None:
    """Give a model the vocabulary of an adapter, as `resize_token_embeddings` does; new rows are zero.

    Args:
        model: changed, unless it is of that size.
        num_tokens: None leaves it as it is.
    """
    if num_tokens is None:
        return
    before = {len(parameter) for parameter in _vocabulary_of(model).values()}
    if before == {num_tokens}:
        return
    apart = len(set(map(id, _vocabulary_of(model).values())))
    model.resize_token_embeddings(num_tokens, mean_resizing=False)
    if len(set(map(id, _vocabulary_of(model).values()))) < apart:
        # It has tied them as the configuration says, which the base's files do not follow.
        head: Any = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    with torch.no_grad():
        for parameter in _vocabulary_of(model).values():
            parameter[min(before) :] = 0  # the adapter brings all rows; until then they are the same everywhere


def _vocabulary_of(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters with a row for every token, by name: those of embedding and head, under both where tied."""
    ends = {id(input_embedding(model)), id(model.get_output_embeddings())}
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if id(module) in ends
        for key, parameter in module.named_parameters(recurse=False)
    }


def check_brought(
    where: str,
    tensors: Mapping[str, TensorSpec],
    num_tokens: int,
    *,
    tied: Mapping[str, tuple[str, ...]],
    untied: Collection[str],
    resized: Collection[str],
) -> None:
    """Check that an adapter of another vocabulary brings all that has an entry for each token and is not one with such.

    Args:
        where: the adapter's file, for messages.
        tensors: of the adapter, by PEFT's names, as the base has them.
        num_tokens: that it was trained with.
        tied: names of the base's tensors that share their values, for each of them.
        untied: those that come apart.
        resized: tensors of the model that have another shape with that vocabulary.

    Raises:
        UnsupportedError: it does not.
    """
    brought = {plain_name(name) for name in tensors}
    told = f"{where}: the adapter is of a vocabulary of {num_tokens} tokens, which the base does not have"
    if left := [name for name in sorted(untied) if name not in brought]:
        raise UnsupportedError(
            f"{told}, and takes {' and '.join(tied[left[0]])} apart; it does not bring {left[0]}, so nothing says what "
            "its new rows are; train with both in modules_to_save, or with ensure_weight_tying"
        )
    if left := [name for name in sorted(resized) if brought.isdisjoint(tied.get(name, (name,)))]:
        raise UnsupportedError(
            f"{told}, and {left[0]} of the base has an entry for each token, too, which the adapter does not bring; "
            f"resize the base to {num_tokens} as the training did, with the same values, save it, and name that as base"
        )


def check_indices(where: str, config: PeftConfig, num_tokens: int) -> None:
    """Check that the tokens which were trained by their numbers are in the vocabulary.

    Args:
        where: the configuration, for messages.
        config: of the adapter.
        num_tokens: of the base, or of the adapter where it brings a vocabulary of its own.

    Raises:
        UnsupportedError: they are not.
    """
    for indices in trained_indices(config):
        beyond = [index for index in indices if isinstance(index, int) and index >= num_tokens]
        if beyond:
            raise UnsupportedError(
                f"{where}: token {max(beyond)} was trained, and the vocabulary has {num_tokens}: tokens were added "
                f"before the training; resize the base to {max(beyond) + 1} or more as the training did, with the same "
                "values, save it, and name that as base"
            )


def trained_indices(config: PeftConfig) -> list[Sequence[object]]:
    """Return the numbers of the tokens that an adapter was trained on one by one, for each embedding."""
    found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    listed = list(found.values()) if isinstance(found, dict) else [found]
    return [indices for indices in listed if isinstance(indices, list)]


def plain_name(name: str) -> str | None:
    """Return the name in the model of a tensor that an adapter brings whole; None for what a tuner adds."""
    if not name.startswith(PREFIX) or "lora_" in name:
        return None
    return name[len(PREFIX) :].replace(".token_adapter", "").replace(".base_layer", "")


def _rows(name: str, spec: TensorSpec) -> tuple[str, int] | None:
    """Return the weight that a tensor belongs to, and the number of rows that it has for it."""
    inner = name.removeprefix(PREFIX).replace(".token_adapter", "").replace(".base_layer", "")
    for end, dimension in reversed(_ROWS):
        if inner.endswith(f".{end}") and len(spec.shape) > dimension:
            return f"{inner.removesuffix(end)}weight", spec.shape[dimension]
    return None
