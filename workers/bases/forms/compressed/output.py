"""Schemes of compressed-tensors that need no data: a release can be stored in one, from a base in any form."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    preset_name_to_scheme,
)

from jobs.output_form import OutputForm
from workers.bases.forms import PartLayout, StoredParts
from workers.bases.forms.compressed.compressing import compress, global_scale
from workers.bases.forms.compressed.form import CompressedTensors
from workers.bases.forms.compressed.group import SHAPE, WEIGHT, Group
from workers.bases.forms.compressed.wider import in_8_bits

PRESETS: Mapping[OutputForm, str] = {
    OutputForm.FP8_DYNAMIC: "FP8_DYNAMIC",
    OutputForm.FP8_BLOCK: "FP8_BLOCK",
    OutputForm.INT8_W8A16: "W8A16",
    OutputForm.INT4_W4A16: "W4A16",
    OutputForm.MXFP4: "MXFP4A16",
    OutputForm.NVFP4A16: "NVFP4A16",
}
"""Names of the library's own schemes."""


class CompressedOutput:
    """One scheme for the linear weights of a release."""

    def __init__(self, scheme: QuantizationScheme, words: str, dtype: torch.dtype) -> None:
        """Take the scheme.

        Args:
            scheme: of the weights.
            words: for it.
            dtype: of the model.
        """
        self._scheme = scheme
        self._dtype = dtype
        self.words = f"{words} (compressed-tensors)"

    @classmethod
    def of(cls, output: OutputForm, dtype: torch.dtype) -> Self:
        """Return the scheme that a request names, for a model of a dtype."""
        return cls(preset_name_to_scheme(PRESETS[output], ["Linear"]), output.value, dtype)

    @classmethod
    def wider(cls, dtype: torch.dtype) -> Self:
        """Return the scheme of weights that are kept in 8 bits, for a model of a dtype."""
        return cls(in_8_bits(), "8-bit integers by row", dtype)

    @cached_property
    def group(self) -> Group:
        """The one group of its configuration."""
        return Group.declared(self.words, self._scheme.model_copy(deep=True), "")

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight can be stored in it: a matrix whose rows fall into whole groups."""
        return len(shape) == 2 and 0 not in shape and shape[1] % (self.group.group_size or 1) == 0

    def parts(self, name: str, shape: tuple[int, ...]) -> tuple[StoredParts, Mapping[str, PartLayout]]:
        """Return what a weight is stored as.

        Args:
            name: of the weight, which ends with `.weight`.
            shape: [O, I], which `takes` has taken.

        Returns:
            Its parts; and their dtypes and shapes, by their names.
        """
        owner = name.removesuffix(WEIGHT)
        layout = self.group.layout(shape[0], shape[1], self._dtype)
        beside = {part: f"{owner}{part}" for part in layout if part != self.group.codes}
        parts = StoredParts(codes=f"{owner}{self.group.codes}", beside=beside, shape=shape)
        return parts, {f"{owner}{part}": each for part, each in layout.items()}

    @property
    def shares_scales(self) -> bool:
        """Whether weights have a scale for all of them, which servers take to be that of all that they fuse."""
        return self.group.strategy is QuantizationStrategy.TENSOR_GROUP

    @property
    def row_alignment(self) -> int | None:
        """So many rows of a weight are stored as if they were a weight; None where a scale reaches further."""
        if self.group.strategy in (QuantizationStrategy.TENSOR, QuantizationStrategy.TENSOR_GROUP):
            return None
        return self.group.block[0]

    def quantize(
        self,
        name: str,
        weight_OI: torch.Tensor,
        together: Sequence[torch.Tensor],
        codes: torch.Tensor | None = None,
    ) -> Mapping[str, torch.Tensor]:
        """Return what a weight is stored as, by name.

        Args:
            name: of the weight.
            weight_OI: its numbers.
            together: those of all weights that share its global scale, its own included.
            codes: memory for its codes, in their dtype and shape.
        """
        owner, (num_rows, num_columns) = name.removesuffix(WEIGHT), weight_OI.shape
        layout = self.group.layout(num_rows, num_columns, self._dtype)
        second = global_scale(together) if self.shares_scales else None
        found = compress(weight_OI, self.group, self._dtype, second, codes)
        return {f"{owner}{part}": found[part].to(dtype).reshape(shape) for part, (dtype, shape) in layout.items()}

    def joined(
        self, name: str, shape: tuple[int, ...], pieces: Sequence[Mapping[str, torch.Tensor]]
    ) -> Mapping[str, torch.Tensor]:
        """Return what goes with the codes of a weight, where rows were quantized one group of them after the other.

        Args:
            name: of the weight.
            shape: [O, I].
            pieces: what goes with the codes of all rows, in their order, by stored name.
        """
        shape_is = f"{name.removesuffix(WEIGHT)}{SHAPE}"
        return {
            stored: torch.tensor(shape) if stored == shape_is else torch.cat([piece[stored] for piece in pieces])
            for stored in pieces[0]
        }

    def declaration(self, ignored: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config` of a release.

        Args:
            ignored: modules with a matrix for weight that are not stored in it.
        """
        config = QuantizationConfig(
            config_groups={"group_0": self._scheme},
            format=self.group.format.value,
            ignore=list(ignored),
            quantization_status="compressed",
        )
        declared: dict[str, Any] = json.loads(config.model_dump_json(exclude_none=True))
        return {**declared, "quant_method": "compressed-tensors"}

    def form(self, ignored: Sequence[str]) -> CompressedTensors:
        """Return the form of such a release, to read it."""
        found = CompressedTensors.declared("quantization_config", self.declaration(ignored))
        assert found is not None
        return found
