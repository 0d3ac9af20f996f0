"""What decides the bits of a base in 4-bit."""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers.quantizers.quantizers_utils import should_convert_module

from jobs.errors import BadInputError, UnsupportedError
from jobs.request import MergeRequest
from workers.bases.conversions import Conversions, Group
from workers.bases.four_bit import BITSANDBYTES_VERSION
from workers.bases.model import quantized_weights, skeleton
from workers.files.layout import CheckpointLayout
from workers.sources.fetch import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationTask:
    """What decides the bits of a quantized base."""

    base: Path
    base_digest: str
    layout: CheckpointLayout
    weights: tuple[str, ...]
    """Names in the checkpoint of the weights to convert that are stored as they are."""
    transposed: frozenset[str]
    """Those of them that are converted as their transpose."""
    made: frozenset[str]
    """Names in the model of weights to convert that are made of several stored tensors, or of a part of one."""
    conversions: Conversions
    """How they are made."""
    quant_type: str
    double_quant: bool
    dtype: torch.dtype | None
    """Weights are cast to this first, as `from_pretrained(dtype=...)` does; None keeps their own."""
    unchanged: Callable[[], None] = field(default=lambda: None, compare=False)
    """Raises TransientIOError where the base has changed since its digest was taken."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in which some weight is converted."""
        return tuple(group for group in self.conversions.groups if not self.made.isdisjoint(group.parameters))

    @property
    def converted(self) -> frozenset[str]:
        """Names of the stored tensors whose values go through 4 bits, in part at least."""
        return frozenset(self.weights).union(*(group.stored for group in self.groups))

    @property
    def num_weights(self) -> int:
        """Number of weights to convert."""
        return len(self.weights) + len(self.made)

    @property
    def by_shard(self) -> Mapping[str, "QuantizationTask"]:
        """The same work, by shards of the base; what is made of several is with the shard of the first of them."""
        weights: dict[str, list[str]] = defaultdict(list)
        made: dict[str, set[str]] = defaultdict(set)
        for name in self.weights:
            weights[self._shard(name)].append(name)
        for group in self.groups:
            made[self._shard(group.stored[0])] |= self.made.intersection(group.parameters)
        return {
            shard.name: dataclasses.replace(
                self,
                weights=tuple(weights[shard.name]),
                transposed=self.transposed.intersection(weights[shard.name]),
                made=frozenset(made[shard.name]),
            )
            for shard in self.layout.shards
            if shard.name in weights or shard.name in made
        }

    def _shard(self, name: str) -> str:
        return self.layout.tensors[name][0].name

    def key(self, device: torch.device) -> str:
        """Return the digest under which the result is kept. Devices may round differently, so each has its own."""
        decides = {
            "base": self.base_digest,
            "weights": self.weights,
            "transposed": sorted(self.transposed),
            "made": {name: self.conversions.group_of[name].stored for name in self.made},
            "transformers": transformers.__version__ if self.made else None,
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "dtype": str(self.dtype),
            "device": device.type,
            "bitsandbytes": BITSANDBYTES_VERSION,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


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
