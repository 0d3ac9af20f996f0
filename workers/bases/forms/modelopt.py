"""ModelOpt of NVIDIA: FP8 with a scale for each weight or row, and NVFP4.

W = code x scale in float32, rounded once; in NVFP4 the scale is that of the group times that of the weight, in float32,
too. What is checked of the parts is what compressed-tensors has of the same kind.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import PartLayout, StoredParts, as_stored
from workers.bases.forms.block_scaled import BlockScaledWeight
from workers.bases.forms.compressed.compressing import (
    FP8_BY_CHANNEL,
    FP8_BY_TENSOR,
    NVFP4,
    compress,
    stored_as,
)
from workers.bases.forms.compressed.fused import refuse_fused
from workers.bases.forms.compressed.group import GLOBAL_SCALE, PACKED, PLAIN, SCALE, WEIGHT, Group
from workers.bases.forms.grouped import FP4, GroupedWeight
from workers.bases.forms.refusals import nothing_stored, transpose_in_codes
from workers.files.layout import TensorSpec

_SECOND_SCALE = "weight_scale_2"
_OF_ACTIVATIONS = ("input_scale", "output_scale")
"""Beside a weight, in its module, where the scales of activations are fixed: without meaning for numbers."""
_SMOOTHING = "pre_quant_scale"
"""What the input of a module is multiplied by, and its weight was divided by."""
_ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")


class ModelOpt:
    """The form, whichever of its formats weights have: the tensors tell."""

    words = "FP8 or NVFP4 of ModelOpt"
    loaded_as: Mapping[str, Any] | None = None

    def __init__(self, place: str) -> None:
        """Take the place of the declaration, for messages."""
        self._place = place

    @classmethod
    def declared(cls, place: str, content: Mapping[str, Any]) -> Self | None:
        """Return the form that a configuration declares; None where it quantizes the KV cache alone.

        Args:
            place: of the declaration, for messages.
            content: of it: of `config.json`, or of a file of its own.

        Raises:
            UnsupportedError: weights are in another format.
        """
        inner = content.get("quantization")
        algorithm = (inner if isinstance(inner, Mapping) else content).get("quant_algo")
        if not algorithm:
            return None
        if algorithm not in _ALGORITHMS:
            raise UnsupportedError(
                f"{place}: declares weights of ModelOpt in {algorithm!r}; expected one of {', '.join(_ALGORITHMS)}; "
                "name such a base, or one in 16 bits"
            )
        return cls(place)

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights, and check their scales; see `StoredForm`."""
        refuse_fused(specs, self.words)
        found = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in specs):
            parts = {
                name: specs[stored]
                for name in (WEIGHT, SCALE, _SECOND_SCALE, _SMOOTHING)
                if (stored := f"{module}.{name}") in specs
            }
            if all(name == WEIGHT and spec.code in PLAIN for name, spec in parts.items()):
                continue
            if _SMOOTHING in parts:
                raise UnsupportedError(
                    f"tensor {parts[_SMOOTHING].name}: says that inputs of {module} are scaled, which a plain model "
                    "does not do; such a base is not merged: name one in 16 bits"
                )
            if WEIGHT not in parts:
                raise BadInputError(
                    f"tensor {next(iter(parts.values())).name} holds scales of {module}, and no file holds {module}."
                    f"{WEIGHT}; the checkpoint is not whole"
                )
            try:
                shape = _group_of(parts[WEIGHT], parts.get(SCALE)).check(module, _renamed(parts))
            except (BadInputError, UnsupportedError) as error:
                told = str(error).replace(PACKED, WEIGHT).replace(GLOBAL_SCALE, _SECOND_SCALE)
                raise type(error)(told) from error
            beside = {name: spec.name for name, spec in parts.items() if name != WEIGHT}
            beside |= {name: stored for name in _OF_ACTIVATIONS if (stored := f"{module}.{name}") in specs}
            found[f"{module}.{WEIGHT}"] = StoredParts(codes=parts[WEIGHT].name, beside=beside, shape=shape)
        if not found:
            raise nothing_stored(self._place, self.words, "a part of any")
        return found

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take; see `StoredForm`."""
        return math.ceil(num_elements * max(FP8_BY_CHANNEL.bytes_per_weight, NVFP4.bytes_per_weight))

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:  # noqa: ARG002 - in any
        """Name any weight: transformers 5.23 knows no ModelOpt."""
        return f"{next(iter(self.weights(specs)))}, as it is in a form that it does not know"

    def restore(
        self,
        name: str,
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,
    ) -> BlockScaledWeight | GroupedWeight:
        """Build a weight from its parts; see `StoredForm`."""
        if transposed:
            raise transpose_in_codes(name, self.words)
        codes, scales = tensors[parts.codes], tensors[parts.beside[SCALE]]
        if codes.dtype == torch.uint8:
            second = tensors[parts.beside[_SECOND_SCALE]].float().reshape(1)
            return GroupedWeight(codes=codes, scales=scales, second=second, scaling=_product, values=FP4, dtype=dtype)
        block = codes.shape if scales.numel() == 1 else (1, codes.shape[1])
        return BlockScaledWeight(
            codes=codes, scales=scales.float().reshape(-1, 1), block=(block[0], block[1]), dtype=dtype
        )

    def requantized(self, name: str, parts: StoredParts, specs: Mapping[str, TensorSpec]) -> Mapping[str, PartLayout]:  # noqa: ARG002 - of any
        """Return what parts are stored as again: as they are; see `StoredForm`."""
        return as_stored(parts, specs)

    def quantize(
        self,
        name: str,  # noqa: ARG002 - nothing of it can be wrong
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
    ) -> Mapping[str, torch.Tensor]:
        """Quantize a weight again; see `StoredForm`. What fixes activations stays."""
        codes, scales = tensors[parts.codes], tensors[parts.beside[SCALE]]
        if codes.dtype != torch.uint8:
            group = FP8_BY_TENSOR if scales.numel() == 1 else FP8_BY_CHANNEL
            found = compress(weight, group, scales.dtype)
            return {**tensors, parts.codes: found[WEIGHT], parts.beside[SCALE]: stored_as(found, SCALE, scales)}
        second = tensors[parts.beside[_SECOND_SCALE]]
        # ModelOpt multiplies by what compressed-tensors divides by.
        found = compress(weight, NVFP4, scales.dtype, second.float().reshape(1).reciprocal())
        kept = torch.equal(found[GLOBAL_SCALE], second.float().reshape(1).reciprocal())
        other = second if kept else found[GLOBAL_SCALE].reciprocal().to(second.dtype).reshape(second.shape)
        return {
            **tensors,
            parts.codes: found[PACKED],
            parts.beside[SCALE]: found[SCALE],
            parts.beside[_SECOND_SCALE]: other,
        }


def _product(scales: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    assert second is not None
    return scales.float() * second


def _group_of(codes: TensorSpec, scales: TensorSpec | None) -> Group:
    if codes.code == "U8":
        return NVFP4
    return FP8_BY_TENSOR if scales is None or scales.num_elements == 1 else FP8_BY_CHANNEL


def _renamed(parts: Mapping[str, TensorSpec]) -> Mapping[str, TensorSpec]:
    """Return parts by what compressed-tensors calls them, scales of rows as a column."""
    names = {WEIGHT: PACKED, _SECOND_SCALE: GLOBAL_SCALE} if parts[WEIGHT].code == "U8" else {}
    found = {names.get(name, name): spec for name, spec in parts.items()}
    if SCALE in found and found[SCALE].shape == parts[WEIGHT].shape[:1]:
        found[SCALE] = dataclasses.replace(found[SCALE], shape=(*found[SCALE].shape, 1))
    return found
