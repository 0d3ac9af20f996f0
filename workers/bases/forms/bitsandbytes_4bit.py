"""4 bits by bitsandbytes, as transformers saves them: codes under the weight's name, scales and state beside it."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from workers.bases.four_bit import BLOCK_SIZE, QuantizedWeight, quantized_names, quantized_owner, restore
from workers.files.layout import TensorSpec


class Bitsandbytes4bit:
    """The form, whichever type of codes it has: the tensors tell."""

    words = "bitsandbytes 4-bit"
    knows_shapes = False
    while_loading: Mapping[str, Any] = MappingProxyType({})
    """Nothing: a configuration of one's own would make transformers overlook the form."""

    def owners(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        """Find the weights; see `StoredForm`."""
        weights = quantized_names(specs)
        found = {name: quantized_owner(name, weights) for name in specs}
        return {name: owner for name, owner in found.items() if owner is not None}

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take, nested ones resolved; see `StoredForm`."""
        return math.ceil(num_elements / 2) + 4 * math.ceil(num_elements / BLOCK_SIZE)

    def misread(self, specs: Mapping[str, TensorSpec]) -> str | None:  # noqa: ARG002 - it reads all
        """Return None; see `StoredForm`."""
        return None

    def restore(
        self,
        name: str,
        stored: Mapping[str, torch.Tensor],
        dtype: torch.dtype,  # noqa: ARG002 - the state has it
        *,
        transposed: bool,
    ) -> QuantizedWeight:
        """Build a weight from its parts; see `StoredForm`."""
        return restore(name, stored, transposed=transposed)


BITSANDBYTES_4BIT = Bitsandbytes4bit()
