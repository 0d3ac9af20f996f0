"""4 bits by bitsandbytes, as transformers saves them: codes under the weight's name, scales and state beside it."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from jobs.errors import BadInputError
from workers.bases.forms import StoredParts
from workers.bases.four_bit import BLOCK_SIZE, QuantizedWeight, quantized_names, quantized_owner, restore
from workers.files.layout import TensorSpec


class Bitsandbytes4bit:
    """The form, whichever type of codes it has: the tensors tell."""

    words = "bitsandbytes 4-bit"
    loaded_as: Mapping[str, Any] | None = None
    """transformers keeps it in codes while it is loaded, and dequantizes it after."""

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights; see `StoredForm`."""
        names = quantized_names(specs)
        beside: dict[str, dict[str, str]] = defaultdict(dict)
        for stored in specs:
            name = quantized_owner(stored, names)
            if name is not None and stored != name:
                beside[name][stored.removeprefix(name)] = stored
        for name, others in beside.items():
            if name not in specs:
                raise BadInputError(
                    f"tensor {next(iter(others.values()))} is a part of {name}, and no file holds the codes of that: "
                    "the checkpoint is not whole"
                )
        return {name: StoredParts(codes=name, beside=others, shape=None) for name, others in beside.items()}

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take, nested ones resolved; see `StoredForm`."""
        return math.ceil(num_elements / 2) + 4 * math.ceil(num_elements / BLOCK_SIZE)

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:  # noqa: ARG002 - it reads all
        """Return None; see `StoredForm`."""
        return None

    def restore(
        self,
        name: str,
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,  # noqa: ARG002 - the state has it
        *,
        transposed: bool,
    ) -> QuantizedWeight:
        """Build a weight from its parts; see `StoredForm`."""
        by_suffix = {suffix: tensors[stored] for suffix, stored in parts.beside.items()}
        return restore(name, {"": tensors[parts.codes]} | by_suffix, transposed=transposed)


BITSANDBYTES_4BIT = Bitsandbytes4bit()
