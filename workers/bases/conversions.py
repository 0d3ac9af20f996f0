"""How the files of a base hold its weights, against how its model does: renamed, fused or split while loading.

transformers owns the rules (`conversion_mapping` of 5.23) and applies them in `from_pretrained` and `save_pretrained`;
here they are asked for one weight at a time, so that a base can be merged in the layout it is stored in.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    dot_natural_key,
    revert_weight_conversion,
)

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.model import ignores_missing
from workers.bases.routes import REFUSALS, Routes, convert
from workers.bases.ties import tied_names


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of a model that are made of tensors of a checkpoint, all of them together."""

    parameters: tuple[str, ...]
    """Their names in the model."""
    stored: tuple[str, ...]
    """Names in the checkpoint of what they are made of, in the order in which they are put together."""


class Conversions:
    """The way from the tensors of one checkpoint to those of its model, and back."""

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, torch.Tensor]) -> None:
        """Find out what becomes of each stored tensor.

        Args:
            model: skeleton on the meta device; kept.
            stored: the checkpoint's tensors by name, on the meta device.

        Raises:
            UnsupportedError: a conversion of transformers fails on these tensors, or its way back leads elsewhere.
        """
        self._model = model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        """Of the model's tensors, by their names in the model."""
        transforms = get_model_conversion_mapping(model)
        routes = Routes(model, transforms)
        self._rename = routes.rename
        self.stored_shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
        """Of the checkpoint's tensors, by their names there."""
        names: dict[str, str] = {}
        self._converters: dict[str, WeightConverter] = {}
        self._patterns: dict[str, str] = {}
        parts: dict[str, list[str]] = defaultdict(list)
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = routes.of(name)
            if target not in self.shapes:
                continue  # the model does not take it; it is kept as it is
            if pattern is None:
                names[target] = name
            else:
                self._converters.setdefault(target, routes.by_pattern[pattern])
                self._patterns[name] = pattern
                parts[target].append(name)
        self.stored_names: Mapping[str, str] = names
        """Names in the checkpoint of the model's tensors that are there as they are, by their names in the model."""
        # What `save_pretrained` goes by, as after `from_pretrained`.
        used: Any = [transform for transform in transforms if transform.was_used()]
        model._weight_conversions = used  # noqa: SLF001
        self.groups = tuple(self._group(target, tuple(members), stored) for target, members in parts.items())

    @functools.cached_property
    def parameter_names(self) -> Mapping[str, str]:
        """Names in the model by names in the checkpoint, of tensors that are there as they are."""
        return {stored: name for name, stored in self.stored_names.items()}

    @functools.cached_property
    def group_of(self) -> Mapping[str, Group]:
        """Groups by the names of their parameters in the model."""
        return {name: group for group in self.groups for name in group.parameters}

    @functools.cached_property
    def group_behind(self) -> Mapping[str, Group]:
        """Groups by the names of their tensors in the checkpoint."""
        return {name: group for group in self.groups for name in group.stored}

    @functools.cached_property
    def covered(self) -> AbstractSet[str]:
        """Names of all tensors of the model that the checkpoint has values for."""
        return self.stored_names.keys() | self.group_of.keys()

    def load(self, group: Group, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the model's tensors of a group.

        Args:
            group: of this checkpoint.
            read: returns a stored tensor by name.

        Returns:
            The group's parameters by their names in the model.
        """
        return self._convert(self._target(group), {name: read(name) for name in group.stored})

    def revert(self, group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Make the checkpoint's tensors of a group, as `save_pretrained` would.

        Args:
            group: of this checkpoint.
            tensors: all its parameters, by their names in the model.

        Returns:
            The stored tensors of the group, by name.
        """
        reverted: dict[str, torch.Tensor] = revert_weight_conversion(
            self._model, {name: tensors[name] for name in group.parameters}
        )
        return reverted

    def parameter_of(self, stored: str) -> str:
        """Return what a tensor of the checkpoint would be in the model, or a part of, whether it is there or not."""
        return str(self._rename(stored)[0])

    def new_name(self, name: str) -> str:
        """Return what a tensor of the model is called in the checkpoint that does not hold it yet."""
        (stored,) = revert_weight_conversion(self._model, {name: torch.empty(self.shapes[name], device="meta")})
        return str(stored)

    def _target(self, group: Group) -> str:
        return next(name for name in group.parameters if name in self._converters)

    def _convert(self, target: str, parts: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        patterns = {name: self._patterns[name] for name in parts}
        return convert(self._model, self._converters[target], target, parts, patterns)

    def _group(self, target: str, members: tuple[str, ...], stored: Mapping[str, torch.Tensor]) -> Group:
        parts = {name: stored[name] for name in members}
        try:
            parameters = self._convert(target, parts)
            group = Group(tuple(parameters), members)
            back = self.revert(group, parameters)
        except REFUSALS as error:
            raise UnsupportedError(
                f"tensors {members[0]} and {len(members) - 1} more become {target} in {type(self._model).__name__}, "
                f"and transformers cannot convert them there and back: {type(error).__name__}: {error}"
            ) from error
        found = {name: tuple(tensor.shape) for name, tensor in back.items()}
        expected = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        if found != expected:
            raise UnsupportedError(
                f"{target} of {type(self._model).__name__} is made of {sorted(expected)[:3]} ..., but transformers "
                f"would write it as {sorted(found)[:3]} ...; such a base cannot be merged in its own layout"
            )
        return group


def relate(
    directory: Path,
    model: PreTrainedModel,
    stored: Mapping[str, torch.Tensor],
    in_4bit: Collection[str],
    check: Callable[[Conversions], None] = lambda _: None,
) -> Conversions:
    """Relate a checkpoint to its model, and check that the two belong together.

    Args:
        directory: of the checkpoint, for messages.
        model: skeleton on the meta device; kept.
        stored: the checkpoint's tensors by name, on the meta device.
        in_4bit: those of them that are the codes of weights in 4-bit, whose shape is not theirs.
        check: raises where the checkpoint is of another kind, before the two are held against each other.

    Raises:
        UnsupportedError: transformers cannot convert the tensors, or only from 16 bits.
        BadInputError: the model has tensors that the checkpoint lacks, or that it would have in another shape.
    """
    try:
        conversions = Conversions(model, stored)
    except UnsupportedError as error:
        raise UnsupportedError(f"{directory}: {error}") from error
    check(conversions)
    own = conversions.shapes
    for group in conversions.groups:
        found = [name for name in group.stored if name in in_4bit]
        if found:
            raise UnsupportedError(
                f"{directory}: {group.parameters[0]} is made of {found[0]} and others, which are stored in 4-bit, and "
                "transformers puts weights together from 16 bits only. Name a base in 16 bits if its maker publishes "
                "one; if not, make it of this one as docs/stored-forms.md shows"
            )
        for name, tensor in conversions.load(group, stored.__getitem__).items():
            if own.get(name) != tuple(tensor.shape):
                raise BadInputError(
                    f"{directory}: {group.stored[0]} and {len(group.stored) - 1} more tensors make {name} of shape "
                    f"{list(tensor.shape)}, config.json makes it {list(own.get(name, ()))}; weights and configuration "
                    "are not of the same model"
                )
    tied = tied_names(model)
    missing = [
        name
        for name, _ in model.named_parameters()
        if conversions.covered.isdisjoint(tied.get(name, (name,))) and not ignores_missing(model, name)
    ]
    if missing:
        taken = conversions.parameter_names.keys() | conversions.group_behind.keys()
        foreign = sorted(stored.keys() - taken)
        instead = f"; it holds {foreign[0]} and {len(foreign) - 1} more that the model does not take" if foreign else ""
        could_be_tied: Any = model._tied_weights_keys or ()  # noqa: SLF001
        if missing[0] in could_be_tied and not getattr(model.config, "tie_word_embeddings", False):
            instead = (
                "; config.json says tie_word_embeddings: false, so the model has one of its own, and no file holds it: "
                "set tie_word_embeddings to true there if the base was trained with both as one" + instead
            )
        raise BadInputError(
            f"{directory}: {len(missing)} tensors of {type(model).__name__} are missing, first {missing[0]}{instead}"
        )
    return conversions
