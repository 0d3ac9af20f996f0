"""AWQ, as AutoAWQ writes it (version `gemm`): 4-bit integers with zero points, the transpose of the weight.

W = (code - zero point) x scale, in the dtype of the scales, then in the model's: what compressed-tensors 0.20 converts
it into, and decompresses. transformers runs such a base by kernels of a GPU alone.

Shape suffixes: I input features, O output features, G groups along I, P words of eight codes along O.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

from jobs.errors import BadInputError, UnsupportedError
from workers.bases.forms import StoredParts, tile_memory
from workers.bases.forms.refusals import nothing_stored, stored_twice
from workers.files.layout import TensorSpec

_CODES, _ZEROS, _SCALES = "qweight", "qzeros", "scales"
_NUM_BITS = 4
_CODES_PER_WORD = 8
_STEP_ELEMENTS = 1 << 19
"""Weights that are dequantized at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqWeight:
    """A linear weight in AWQ."""

    codes_IP: torch.Tensor
    """int32."""
    zeros_GP: torch.Tensor | None
    """int32; None for the middle of the codes."""
    scales_GO: torch.Tensor
    dtype: torch.dtype
    device: torch.device | None = None
    """Where tiles are brought to be dequantized; None for where the codes are."""

    row_alignment = _CODES_PER_WORD

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
        return self.scales_GO.shape[1], self.codes_IP.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        parts = (self.codes_IP, self.zeros_GP, self.scales_GO)
        return sum(part.numel() * part.dtype.itemsize for part in parts if part is not None)

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop); see `StoredWeight`."""
        device = self.codes_IP.device if self.device is None else self.device
        num_columns = self.shape[1]
        weight_OI = tile_memory(memory, (stop - start, num_columns), self.dtype, device)
        step = max(1, _STEP_ELEMENTS // (num_columns * _CODES_PER_WORD)) * _CODES_PER_WORD
        for begin in range(start, stop, step):  # no temporary grows with the tile
            end = min(begin + step, stop)
            words = slice(begin // _CODES_PER_WORD, end // _CODES_PER_WORD)
            zeros_GP = None if self.zeros_GP is None else self.zeros_GP[:, words].to(device)
            codes_IO, zeros_GO = AutoAWQConverter.reverse_awq_order(
                *AutoAWQConverter.unpack_awq(self.codes_IP[:, words].to(device), zeros_GP, _NUM_BITS), _NUM_BITS
            )
            scales_GO = self.scales_GO[:, begin:end].to(device)
            num_groups, num_rows = scales_GO.shape
            # Of words with a sign, the upper bits of a code are that sign.
            numbers = (codes_IO & 15).to(scales_GO.dtype).view(num_groups, -1, num_rows)
            numbers -= 8 if zeros_GO is None else (zeros_GO & 15).to(scales_GO.dtype)[:, None]
            numbers *= scales_GO[:, None]
            weight_OI[begin - start : end - start] = numbers.view(num_columns, num_rows).T
        return weight_OI

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        zeros_GP = None if self.zeros_GP is None else self.zeros_GP.to(device)
        return dataclasses.replace(
            self, codes_IP=self.codes_IP.to(device), zeros_GP=zeros_GP, scales_GO=self.scales_GO.to(device)
        )

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        return dataclasses.replace(self, device=device)


class Awq:
    """The form."""

    words = "AWQ"
    loaded_as: Mapping[str, Any] | None = None

    def __init__(self, *, group_size: int, has_zeros: bool) -> None:
        """Take what is declared.

        Args:
            group_size: inputs that share a scale; -1 for all.
            has_zeros: whether there are zero points.
        """
        self._group_size = group_size
        self._has_zeros = has_zeros

    @classmethod
    def declared(cls, place: str, content: Mapping[str, Any]) -> Self:
        """Return the form that a configuration declares.

        Args:
            place: of the declaration, for messages.
            content: of it: of `config.json`, or of AutoAWQ's own file.

        Raises:
            UnsupportedError: weights are in another version, or of another number of bits.
            BadInputError: the size of the groups is none.
        """
        num_bits = content.get("bits", content.get("w_bit", _NUM_BITS))
        version = str(content.get("version", "gemm")).lower()
        if num_bits != _NUM_BITS or version != "gemm":
            raise UnsupportedError(
                f"{place}: declares AWQ of {num_bits} bits in version {version!r}; expected {_NUM_BITS} in 'gemm', the "
                "only one whose layout is read; name a base in 16 bits"
            )
        group_size = content.get("group_size", content.get("q_group_size", 128))
        if type(group_size) is not int or (group_size < 1 and group_size != -1):
            raise BadInputError(f"{place}.group_size: expected how many inputs share a scale, found {group_size!r}")
        return cls(group_size=group_size, has_zeros=bool(content.get("zero_point", True)))

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights, and check their scales and zero points; see `StoredForm`."""
        found = {}
        for module in dict.fromkeys(name.rpartition(".")[0] for name in specs):
            parts = {
                name: specs[stored] for name in (_CODES, _ZEROS, _SCALES) if (stored := f"{module}.{name}") in specs
            }
            if parts:
                shape = self._checked(module, parts)
                if f"{module}.weight" in specs:
                    raise stored_twice(f"{module}.weight", specs[f"{module}.weight"].code, _CODES)
                beside = {name: spec.name for name, spec in parts.items() if name != _CODES}
                found[f"{module}.weight"] = StoredParts(codes=parts[_CODES].name, beside=beside, shape=shape)
        if not found:
            raise nothing_stored("config.json", self.words, f"called {_CODES}")
        return found

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales take; see `StoredForm`."""
        return math.ceil(num_elements / 2 + num_elements * 4.5 / (self._group_size if self._group_size > 0 else 64))

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:  # noqa: ARG002 - in any
        """Name any weight: transformers 5.23 runs AWQ by kernels of a GPU."""
        return next(iter(self.weights(specs)))

    def restore(
        self,
        name: str,  # noqa: ARG002 - what may be wrong is told by the headers
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,  # noqa: ARG002 - AutoAWQ knows no Conv1D
    ) -> AwqWeight:
        """Build a weight from its parts; see `StoredForm`."""
        return AwqWeight(
            codes_IP=tensors[parts.codes],
            zeros_GP=tensors[parts.beside[_ZEROS]] if self._has_zeros else None,
            scales_GO=tensors[parts.beside[_SCALES]],
            dtype=dtype,
        )

    def _checked(self, module: str, parts: Mapping[str, TensorSpec]) -> tuple[int, int]:
        for name in (_CODES, _SCALES, *([_ZEROS] if self._has_zeros else [])):
            if name not in parts:
                raise BadInputError(
                    f"{module} is stored in {self.words} ({', '.join(parts)}), and no file holds {module}.{name}, "
                    "without which the codes are another weight; the checkpoint is not whole"
                )
            expected = {"F16", "BF16"} if name == _SCALES else {"I32"}
            if parts[name].code not in expected:
                raise UnsupportedError(
                    f"tensor {parts[name].name} is stored as {parts[name].code}; expected "
                    f"{' or '.join(sorted(expected))} in {self.words}"
                )
        codes = parts[_CODES]
        if len(codes.shape) != 2 or (self._group_size > 0 and codes.shape[0] % self._group_size):
            raise BadInputError(
                f"tensor {codes.name} has shape {list(codes.shape)}; expected inputs in groups of {self._group_size}, "
                "and words of eight outputs"
            )
        num_inputs, num_words = codes.shape
        num_groups = num_inputs // self._group_size if self._group_size > 0 else 1
        for name, shape in ((_ZEROS, (num_groups, num_words)), (_SCALES, (num_groups, num_words * _CODES_PER_WORD))):
            if name in parts and parts[name].shape != shape:
                raise BadInputError(
                    f"tensor {parts[name].name} has shape {list(parts[name].shape)}; expected {list(shape)}, as "
                    f"{codes.name} is {list(codes.shape)} in groups of {self._group_size}"
                )
        return num_words * _CODES_PER_WORD, num_inputs
