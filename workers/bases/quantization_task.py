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

from workers.bases.conversions import Conversions, Group
from workers.bases.four_bit import BITSANDBYTES_VERSION
from workers.files.layout import CheckpointLayout


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
