"""Bases in 4-bit: whether one is stored as it was asked for, and what 4-bit loading would convert of others."""

import torch
from transformers.quantizers.quantizers_utils import should_convert_module

from jobs.errors import BadInputError, UnsupportedError
from jobs.request import MergeRequest, QuantizationOptions
from workers.bases.conversions import Conversions
from workers.bases.model import quantized_weights, skeleton, stored_quantization
from workers.bases.quantization_task import QuantizationTask
from workers.files.layout import CheckpointLayout
from workers.sources.fetch import Source


def stored_as_asked(source: Source, request: MergeRequest, types: frozenset[str]) -> bool:
    """Return whether a base is stored in 4-bit, and check that it is in the way that was asked for.

    Args:
        source: the base.
        request: what is asked of it.
        types: 4-bit types of its tensors.

    Raises:
        BadInputError: configuration and tensors contradict each other.
        UnsupportedError: it is stored in 4-bit, and the request wants other weights than those.
    """
    stored = stored_quantization(source.directory)
    declared = frozenset({stored.quantization.value}) if stored else frozenset()
    if declared != types:
        raise BadInputError(
            f"{source.directory}: config.json says that weights are stored in "
            f"{', '.join(declared) or 'no 4-bit type'}, the tensors say "
            f"{', '.join(sorted(types)) or 'no 4-bit type'}; the checkpoint is inconsistent"
        )
    if stored is None:
        return False
    if request.base_quantization is not stored.quantization:
        raise UnsupportedError(
            f"{source.directory}: the base is stored in {stored.quantization}, so there are no other weights to merge "
            f"into; request base_quantization: {stored.quantization}, or name the 16-bit base (found "
            f"base_quantization: {request.base_quantization})"
        )
    if request.quantization_options not in (QuantizationOptions(), stored.options):
        raise UnsupportedError(
            f"{source.directory}: the base is stored in 4-bit with {stored.options!r}; quantization_options cannot "
            f"change that: leave them out (found {request.quantization_options!r})"
        )
    return True


def plan_quantization(
    source: Source,
    layout: CheckpointLayout,
    request: MergeRequest,
    *,
    conversions: Conversions,
    transposed: frozenset[str],
    dtype: torch.dtype | None,
) -> QuantizationTask:
    """Ask transformers what 4-bit loading would convert of a base that is stored otherwise.

    Args:
        source: the base.
        layout: its tensors.
        request: quantization and options.
        conversions: between the base's tensors and its model's.
        transposed: stored weights that are converted as their transpose.
        dtype: the model is loaded in; None for the base's own.

    Raises:
        BadInputError: nothing would be converted, or the skip list names nothing.
        UnsupportedError: a weight would be converted that the base does not store.
    """
    options = request.quantization_options
    model = skeleton(source.directory, tied=False)
    module_names = [name for name, _ in model.named_modules()]
    for entry in options.llm_int8_skip_modules or ():
        if all(should_convert_module(name, [entry]) for name in module_names if name):
            raise BadInputError(
                f"quantization_options.llm_int8_skip_modules: {entry!r} names no module of {source.directory}"
            )
    names = quantized_weights(model, request.base_quantization, options)
    # A weight that is tied to one the checkpoint stores under another name is never converted by default, but an
    # explicit skip list replaces that default.
    absent = [name for name in names if name not in conversions.covered]
    if absent:
        raise UnsupportedError(
            f"{source.directory}: 4-bit loading would convert {absent[0]}, which the base stores tied to another "
            "tensor; add its module to quantization_options.llm_int8_skip_modules"
        )
    if not names:
        raise BadInputError(
            f"{source.directory}: 4-bit loading converts no weight of this base with these quantization_options; "
            "request base_quantization: none"
        )
    weights = tuple(conversions.stored_names[name] for name in names if name in conversions.stored_names)
    return QuantizationTask(
        base=source.directory,
        base_digest=source.digest,
        layout=layout,
        weights=weights,
        transposed=transposed.intersection(weights),
        made=frozenset(name for name in names if name in conversions.group_of),
        conversions=conversions,
        quant_type=request.base_quantization.value,
        double_quant=options.bnb_4bit_use_double_quant,
        dtype=dtype,
        unchanged=source.check_unchanged,
    )
