"""The way of each tensor of a checkpoint into its model, by its name alone, and what several of them make there.

transformers owns the rules (`core_model_loading` of 5.23); here they are asked without a weight.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from jobs.errors import UnsupportedError

REFUSALS = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What the conversions of transformers raise on tensors that they are not made for."""


class Routes:
    """Where each tensor of a checkpoint goes in a model, by its name alone."""

    def __init__(self, model: PreTrainedModel, transforms: Sequence[Any] | None = None) -> None:
        """Ask transformers for its rules.

        Args:
            model: skeleton on the meta device.
            transforms: the rules, where they were asked for already.
        """
        transforms = get_model_conversion_mapping(model) if transforms is None else transforms
        self._expected = model.state_dict()
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.rename: Callable[[str], tuple[str, str | None]] = functools.partial(
            rename_source_key,
            weight_renamings=[transform for transform in transforms if isinstance(transform, WeightRenaming)],
            weight_converters=converters,
            base_model_prefix=model.base_model_prefix,
            meta_state_dict=self._expected,
        )
        self._add_prefix = functools.partial(
            rename_source_key,
            weight_renamings=[],
            weight_converters=[],
            base_model_prefix=model.base_model_prefix,
            meta_state_dict=self._expected,
        )
        self.by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        """The rules that put tensors together, by the pattern of one of those."""

    def of(self, name: str) -> tuple[str, str | None]:
        """Return what a stored tensor becomes, or a part of, and the pattern of the rule that puts it together.

        The order and the choices are those of `convert_and_load_state_dict_in_model`.
        """
        target, pattern = self.rename(name)
        if target not in self._expected and name in self._expected:
            target, pattern = self._add_prefix(name)
        return target, pattern


def convert(
    model: PreTrainedModel,
    converter: WeightConverter,
    target: str,
    parts: Mapping[str, torch.Tensor],
    patterns: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """Put stored tensors together by a rule.

    Args:
        model: skeleton on the meta device.
        converter: the rule.
        target: the model's tensor that all of them are a part of.
        parts: the stored tensors, by name.
        patterns: of the rule, by stored name: which part each is.

    Returns:
        The model's tensors that they make, by name.
    """
    own: Any = copy.deepcopy(converter)
    for name, tensor in parts.items():
        own.add_tensor(target, name, patterns[name], tensor)
    converted = own.convert(target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def converted_shapes(
    model: PreTrainedModel, routes: Routes, target: str, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what stored tensors are put together into.

    Args:
        model: skeleton on the meta device.
        routes: of it.
        target: the model's tensor that all of them are a part of.
        stored: their shapes, by name.

    Raises:
        UnsupportedError: the rule of transformers fails on these shapes.
    """
    ordered = sorted(stored, key=dot_natural_key)
    patterns = {name: str(routes.of(name)[1]) for name in ordered}
    parts = {name: torch.empty(stored[name], device="meta") for name in ordered}
    try:
        made = convert(model, routes.by_pattern[patterns[ordered[0]]], target, parts, patterns)
    except REFUSALS as error:
        raise UnsupportedError(f"{target}: {type(error).__name__}: {error}") from error
    return {name: tuple(tensor.shape) for name, tensor in made.items()}
