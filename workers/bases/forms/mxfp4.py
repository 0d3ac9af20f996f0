"""MXFP4, as gpt-oss is published: the experts of a layer in blocks of 32 codes of 4 bits, a power of two for each.

The maths is that of `convert_moe_packed_tensors` of transformers 5.23, a tile at a time: a code times its block's scale
is exact in 16 bits, but for what is out of their range.

Shape suffixes: E experts, O output features, I input features, G blocks along I, B bytes of a block.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import PartLayout, StoredParts, Wider, as_stored, tile_memory
from workers.bases.forms.compressed.compressing import MXFP4, compress
from workers.bases.forms.compressed.group import PACKED, SCALE
from workers.bases.forms.grouped import FP4
from workers.bases.forms.left_out import with_left_out
from workers.bases.forms.refusals import nothing_stored, nothing_wider, stored_twice
from workers.files.layout import TensorSpec
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.kernels.four_bit import dequantize_groups

_CODES, _SCALES = "_blocks", "_scales"
_BLOCK_BYTES = 16
_BLOCK_SIZE = 32
"""Weights in a block, two codes a byte."""
_POWERS = torch.ldexp(torch.ones(256), torch.arange(256) - 127)
"""float32 [256]: what each scale stands for."""
_STEP_ELEMENTS = 1 << 20
"""Weights that are dequantized at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4Weight:
    """The same projection of all experts of a layer, [E, I, O] as numbers: the model keeps its transpose."""

    codes: torch.Tensor
    """uint8 [E, O, G, B]."""
    scales: torch.Tensor
    """uint8 [E, O, G]: exponents of two, plus 127."""
    dtype: torch.dtype
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E, I, O]."""
        return _shape(tuple(self.codes.shape))

    @property
    def row_alignment(self) -> int:
        """A block of each output: what lies between are the elements of 32 inputs."""
        return _BLOCK_SIZE * self.shape[2]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.codes.numel() + self.scales.numel()

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize elements [start, stop); see `StoredWeight`."""
        num_blocks = self.codes.shape[2]
        device = self.codes.device if self.device is None else self.device
        weight = tile_memory(memory, (stop - start, 1), self.dtype, device)
        block, last = start // self.row_alignment, stop // self.row_alignment
        while block < last:  # no temporary grows with the tile
            expert, place = divmod(block, num_blocks)
            taken = min(last - block, num_blocks - place, max(1, _STEP_ELEMENTS // self.row_alignment))
            at = slice(expert, expert + 1), slice(None), slice(place, place + taken)
            codes_EOGB, scales_EOG = self.codes[at].to(device), self.scales[at].to(device)
            begin = block * self.row_alignment - start
            target_IO = weight[begin : begin + taken * self.row_alignment].view(taken * _BLOCK_SIZE, -1)
            if device.type == "cpu" and self.dtype in ARRAY_DTYPES:
                numbers_OI = torch.empty(target_IO.shape[::-1], dtype=self.dtype)
                codes, scales = array(codes_EOGB.contiguous()), array(_POWERS[scales_EOG.long()])
                dequantize_groups(codes, scales, FP4, _BLOCK_SIZE, array(numbers_OI))
                target_IO.copy_(numbers_OI.T)
            else:
                target_IO.copy_(convert_moe_packed_tensors(codes_EOGB, scales_EOG, dtype=self.dtype)[0])
            block += taken
        return weight

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        return dataclasses.replace(self, codes=self.codes.to(device), scales=self.scales.to(device))

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)


class Mxfp4:
    """The form."""

    words = "MXFP4"

    def __init__(self, content: Mapping[str, Any]) -> None:
        """Take the content of a declaration."""
        self._content = content
        self.loaded_as: Mapping[str, Any] | None = {**content, "dequantize": True}

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights, and check their scales; see `StoredForm`."""
        found = {}
        for stored, spec in specs.items():
            name = stored.removesuffix(_CODES)
            if name != stored and spec.code == "U8":
                self._check(spec, specs.get(name + _SCALES), f"{name}{_SCALES}")
                if name in specs:
                    raise stored_twice(name, specs[name].code, stored)
                found[name] = StoredParts(
                    codes=stored, beside={_SCALES: f"{name}{_SCALES}"}, shape=_shape(tuple(spec.shape))
                )
        for stored, spec in specs.items():
            name = stored.removesuffix(_SCALES)
            if name != stored and spec.code == "U8" and name not in found:
                raise BadInputError(
                    f"tensor {stored} holds the scales of {name}, and no file holds {name}{_CODES} as U8; the "
                    "checkpoint is not whole, or was put together from two"
                )
        if not found:
            raise nothing_stored("config.json", self.words, f"stored as {_CODES} of U8")
        return found

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take; see `StoredForm`."""
        return math.ceil(num_elements * (_BLOCK_BYTES + 1) / _BLOCK_SIZE)

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:  # noqa: ARG002 - it reads all
        """Return None; see `StoredForm`."""
        return None

    def restore(
        self,
        name: str,  # noqa: ARG002 - what may be wrong is told by the headers
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,  # noqa: ARG002 - no Conv1D has experts
    ) -> Mxfp4Weight:
        """Build a weight from its parts; see `StoredForm`."""
        return Mxfp4Weight(codes=tensors[parts.codes], scales=tensors[parts.beside[_SCALES]], dtype=dtype)

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
        """Quantize a weight again, an expert at a time, by the compressor of the same codes in compressed-tensors."""
        codes_EOGB, scales_EOG = (torch.empty_like(tensors[stored]) for stored in parts.names)
        for expert, weight_IO in enumerate(weight):
            found = compress(weight_IO.T.contiguous(), MXFP4, torch.uint8)
            codes_EOGB[expert] = found[PACKED].view(codes_EOGB.shape[1:])
            scales_EOG[expert] = found[SCALE]
        return {parts.codes: codes_EOGB, parts.beside[_SCALES]: scales_EOG}

    def check_wider(self, weights: Mapping[str, StoredParts], *, in_8_bits: bool) -> None:
        """Refuse 8 bits, of which the declaration knows nothing; see `WideningForm`."""
        if in_8_bits:
            raise nothing_wider(next(iter(weights)), self.words)

    def declared_with(self, wider: Wider) -> Mapping[str, Any]:
        """Return the declaration with modules that are not converted; see `WideningForm`."""
        return with_left_out(self._content, wider)

    def _check(self, codes: TensorSpec, scales: TensorSpec | None, name: str) -> None:
        if len(codes.shape) != 4 or codes.shape[-1] != _BLOCK_BYTES:
            raise UnsupportedError(
                f"tensor {codes.name} has shape {list(codes.shape)}; expected experts, outputs, blocks and "
                f"{_BLOCK_BYTES} bytes of each, as gpt-oss is stored"
            )
        expected = codes.shape[:-1]
        if scales is None:
            raise BadInputError(
                f"tensor {codes.name} holds codes, and no file holds {name}: expected a scale for each of its blocks, "
                f"{list(expected)}, without which they are another weight"
            )
        if scales.code != "U8" or scales.shape != expected:
            raise BadInputError(
                f"tensor {name} is {scales.code} {list(scales.shape)}; expected U8 {list(expected)}, a scale for each "
                f"block of {codes.name}"
            )


def _shape(codes: tuple[int, ...]) -> tuple[int, int, int]:
    num_experts, num_outputs, num_blocks, _ = codes
    return num_experts, num_blocks * _BLOCK_SIZE, num_outputs
