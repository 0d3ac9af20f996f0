"""FP8 with a scale for each block, as DeepSeek-V3 and Qwen3-FP8 are published: `quant_method: fp8` of transformers.

Or, under another name, with one for each weight or row, as vLLM's first tools (`fp8`) and FBGEMM (`fbgemm_fp8`) do.

W = codes x scales, in float32, rounded once to the dtype of the model; what transformers 5.23 computes with
`FineGrainedFP8Config(dequantize=True)`. Blocks at the edges of a weight may be cut; transformers refuses or misreads
those (docs/upstream-faults.md).

Shape suffixes: O output features, I input features, B blocks.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Self

import torch
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import PartLayout, StoredParts, Wider, as_stored
from workers.bases.forms.block_scaled import BlockScaledWeight
from workers.bases.forms.compressed.codes import multiplied
from workers.bases.forms.compressed.compressing import (
    FP8_BY_CHANNEL,
    FP8_BY_TENSOR,
    compress,
    extremes_of_blocks,
    stored_as,
)
from workers.bases.forms.compressed.group import SCALE, WEIGHT
from workers.bases.forms.left_out import with_left_out
from workers.bases.forms.refusals import nothing_stored, nothing_wider, transpose_in_codes, unread_wider
from workers.files.layout import TensorSpec

_SCALE, _PLAIN_SCALE = "_scale_inv", "_scale"
"""What follows a weight's name: scales of blocks, or one of all; and what other tools write, one of all or of each row.
Codes are multiplied by either."""
_LEAST_COLUMNS = 64
"""Of a weight, where each of its rows may have a scale."""
_CODES = "F8_E4M3"
_SCALE_CODES = frozenset({"F32", "BF16", "F16"})
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_POWERS_OF_TWO = "ue8m0"
_WEIGHT = "module.weight"
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
"""Beside a weight, in its module, where the scales of activations are fixed: without meaning for numbers."""


class Fp8Blocks:
    """The form, with the blocks that a base declares."""

    words = "FP8"

    def __init__(self, block: tuple[int, int] | None, content: Mapping[str, Any]) -> None:
        """Take what is declared.

        Args:
            block: its size in rows and columns; None for a scale for each weight as a whole.
            content: of the declaration.
        """
        self._block = block
        self._content = content
        self.loaded_as: Mapping[str, Any] | None = {**content, "dequantize": True}

    @classmethod
    def declared(cls, place: str, content: Mapping[str, Any]) -> Self:
        """Return the form that a configuration declares.

        Args:
            place: of the declaration, for messages.
            content: of it.

        Raises:
            UnsupportedError: the codes are of another kind than E4M3.
            BadInputError: the size of the blocks is none.
        """
        if content.get("fmt", "e4m3") not in ("e4m3", "e4m3fn", "float8_e4m3fn"):
            raise UnsupportedError(f"{place}.fmt: expected e4m3, found {content['fmt']!r}: FP8 of another kind")
        block = content.get("weight_block_size", [128, 128])  # transformers' default
        if block is None:
            return cls(None, content)
        if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
            raise BadInputError(f"{place}.weight_block_size: expected rows and columns of a block, found {block!r}")
        return cls((block[0], block[1]), content)

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights, and check their scales; see `StoredForm`."""
        found = {}
        for name, spec in specs.items():
            if spec.code == _CODES:
                scale = name + (_PLAIN_SCALE if name + _PLAIN_SCALE in specs else _SCALE)
                self._check(spec, specs.get(scale))
                module = name.rpartition(".")[0]
                fixed = {each: part for each in _OF_ACTIVATIONS if (part := f"{module}.{each}") in specs}
                found[name] = StoredParts(codes=name, beside={_SCALE: scale} | fixed, shape=spec.shape)
        for name, spec in specs.items():
            weight = _scaled(name)
            if weight is not None and weight not in found:
                instead = f"it is stored as {specs[weight].code}" if weight in specs else "no file holds it"
                raise BadInputError(
                    f"tensor {name} ({spec.code}) holds the scales of {weight}: expected its codes as {_CODES}, and "
                    f"{instead}; the checkpoint is not whole, or was put together from two"
                )
        if not found:
            raise nothing_stored("config.json", self.words, f"stored as {_CODES}")
        return found

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take; see `StoredForm`."""
        each = _LEAST_COLUMNS if self._block is None else math.prod(self._block)
        return num_elements + 4 * math.ceil(num_elements / each)

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:  # noqa: ARG002 - in any
        """Name a weight with cut blocks: transformers takes as many equal ones as there are scales. Or with others."""
        for name, spec in specs.items():
            if spec.code == _CODES and name + _PLAIN_SCALE in specs:
                return f"{name}, as its scales are called {name}{_PLAIN_SCALE}"
            if spec.code == _CODES and any(
                size > step and size % step for size, step in zip(spec.shape, self._block_of(spec.shape), strict=True)
            ):
                return f"{name} of shape {list(spec.shape)}, whose last blocks of {list(self._block or ())} are cut"
        return None

    def restore(
        self,
        name: str,
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,
    ) -> BlockScaledWeight:
        """Build a weight from its parts; see `StoredForm`."""
        if transposed:
            raise transpose_in_codes(name, self.words)
        codes, scales = tensors[parts.codes], tensors[parts.beside[_SCALE]].float()
        block = self._block_of(codes.shape)
        if not parts.beside[_SCALE].endswith(_SCALE):
            block = (max(codes.shape[0] // scales.numel(), 1), max(codes.shape[1], 1))
        return BlockScaledWeight(
            codes=codes, scales=scales.reshape(_grid(codes.shape, block)), block=block, dtype=dtype
        )

    def requantized(self, name: str, parts: StoredParts, specs: Mapping[str, TensorSpec]) -> Mapping[str, PartLayout]:  # noqa: ARG002 - of any
        """Return what parts are stored as again: scales of blocks are float32, as transformers makes them."""
        found = dict(as_stored(parts, specs))
        scale = parts.beside[_SCALE]
        if scale.endswith(_SCALE):
            found[scale] = torch.float32, specs[scale].shape
        return found

    def quantize(
        self,
        name: str,  # noqa: ARG002 - nothing of it can be wrong
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        weight: torch.Tensor,
    ) -> Mapping[str, torch.Tensor]:
        """Quantize a weight again, by blocks as `Fp8Quantize` of transformers 5.23 does; see `StoredForm`."""
        scale = parts.beside[_SCALE]
        stored = tensors[scale]
        if not scale.endswith(_SCALE):
            group = FP8_BY_TENSOR if stored.numel() == 1 else FP8_BY_CHANNEL
            found = compress(weight, group, stored.dtype)
            return {**tensors, parts.codes: found[WEIGHT], scale: stored_as(found, SCALE, stored)}
        codes_OI, scales_BB = self._by_blocks(weight)
        return {**tensors, parts.codes: codes_OI, scale: scales_BB.reshape(stored.shape)}

    def check_wider(self, weights: Mapping[str, StoredParts], *, in_8_bits: bool) -> None:
        """Refuse 8 bits in their place, and scales that transformers does not read; see `WideningForm`."""
        for name, parts in weights.items():
            if in_8_bits:
                raise nothing_wider(name, self.words)
            if not parts.beside[_SCALE].endswith(_SCALE):
                raise unread_wider(name, parts.beside[_SCALE])

    def declared_with(self, wider: Wider) -> Mapping[str, Any]:
        """Return the declaration with modules that are not converted; see `WideningForm`."""
        return with_left_out(self._content, wider)

    def _by_blocks(self, weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        block = self._block_of(tuple(weight_OI.shape))
        low_BB, high_BB = extremes_of_blocks(weight_OI, *block)
        largest_BB = torch.maximum(-low_BB, high_BB)
        # What it makes of blocks of one weight each are the scales of blocks with those for the largest.
        scale_fmt = self._content.get("scale_fmt")
        config = SimpleNamespace(weight_block_size=[1, 1], scale_fmt=scale_fmt)
        given: Any = {_WEIGHT: largest_BB}  # its annotation says a tensor
        scales_BB = (
            Fp8Quantize(SimpleNamespace(quantization_config=config)).convert(given)[f"{_WEIGHT}{_SCALE}"].float()
        )
        factors_BB = torch.where(largest_BB > 0, _LARGEST / largest_BB, 1)
        if scale_fmt == _POWERS_OF_TWO:
            factors_BB = scales_BB.reciprocal()
        return multiplied(weight_OI, factors_BB, block), scales_BB

    def _block_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return self._block or (max(shape[0], 1), max(shape[1], 1))

    def _check(self, codes: TensorSpec, scales: TensorSpec | None) -> None:
        if len(codes.shape) != 2:
            raise UnsupportedError(
                f"tensor {codes.name} is stored as {_CODES} of shape {list(codes.shape)}; expected a matrix: weights "
                "of several experts in one tensor are not read in this form"
            )
        grid = _grid(codes.shape, self._block_of(codes.shape))
        expected = f"{list(grid)}" if self._block else "one"
        if scales is None:
            raise BadInputError(
                f"tensor {codes.name} is stored as {_CODES}, and no file holds {codes.name}{_SCALE}: expected "
                f"{expected} scales, without which the codes are another weight"
            )
        if not scales.name.endswith(_SCALE):
            if scales.shape not in {(), (1,), (1, 1), codes.shape[:1], (codes.shape[0], 1)}:
                raise BadInputError(
                    f"tensor {scales.name} has shape {list(scales.shape)}; expected one scale, or one for each row of "
                    f"{codes.name} {list(codes.shape)}"
                )
        elif scales.num_elements != math.prod(grid) or (self._block and scales.shape != grid):
            raise BadInputError(
                f"tensor {scales.name} has shape {list(scales.shape)}; expected {expected}, for blocks of "
                f"{list(self._block_of(codes.shape))} of {codes.name} {list(codes.shape)}"
            )
        if scales.code not in _SCALE_CODES:
            raise UnsupportedError(
                f"tensor {scales.name} is stored as {scales.code}; expected scales in {', '.join(sorted(_SCALE_CODES))}"
            )


def _grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def _scaled(name: str) -> str | None:
    """Return the weight that a tensor holds the scales of, by its name; None where it holds none."""
    if name.endswith(_SCALE):
        return name.removesuffix(_SCALE)
    return name.removesuffix(_PLAIN_SCALE) if name.endswith(f".weight{_PLAIN_SCALE}") else None
