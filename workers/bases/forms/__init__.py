"""Stored forms: how a base keeps weights that are no plain numbers, and how tiles of them are made numbers.

Extend: write a module with a class that implements `StoredForm`, add it to the table in `forms/declared.py`, and run
the contract suite (`tests/contract/test_forms.py`) over it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import torch

from workers.files.layout import TensorSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParts:
    """Which tensors of a checkpoint make one weight, as their headers tell."""

    codes: str
    """The tensor in whose place a release has the weight."""
    beside: Mapping[str, str]
    """The others: scales, and what else goes with the codes; names by what the form calls them."""
    shape: tuple[int, ...] | None
    """Of the weight; None where headers do not tell."""
    at_most: tuple[int, ...] | None = None
    """Where headers tell no shape: that of the weight if its codes fill the words that they are packed into."""

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors that make the weight, its codes first."""
        return (self.codes, *self.beside.values())


PartLayout = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a stored tensor."""


def as_stored(parts: StoredParts, specs: Mapping[str, TensorSpec]) -> Mapping[str, PartLayout]:
    """Return dtype and shape of the parts of a weight as they are stored.

    Args:
        parts: of the weight.
        specs: of all tensors of the checkpoint, by name.
    """
    return {stored: (specs[stored].dtype, specs[stored].shape) for stored in parts.names}


def tile_memory(
    memory: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return where a tile is dequantized to: the caller's memory, where that is on the device; else new one."""
    if memory is not None and memory.device == device:
        return memory
    return torch.empty(shape, dtype=dtype, device=device)


class StoredWeight(Protocol):
    """One weight, on the device where it is dequantized, or brought there tile by tile.

    Its rows are those of a matrix as `Tiling` cuts it: [O, I]; a weight of more dimensions is a column of its elements.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of its codes."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it dequantizes to."""
        ...

    @property
    def row_alignment(self) -> int:
        """Rows are dequantized from and in multiples of this."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        ...

    def dequantize_rows(self, start: int, stop: int, memory: torch.Tensor | None = None) -> torch.Tensor:
        """Dequantize rows [start, stop).

        Args:
            start: a multiple of `row_alignment`.
            stop: a multiple of `row_alignment`, or the number of rows.
            memory: [stop - start, columns] of `dtype`, on the CPU: may become the result, where the codes are there,
                too.

        Returns:
            A tensor [stop - start, columns] of `dtype`, on the device where it is dequantized.
        """
        ...

    def to(self, device: torch.device) -> Self:
        """Return this weight with its codes and scales on another device."""
        ...

    def brought_to(self, device: torch.device) -> Self:
        """Return this weight with tiles of it brought to a device to be dequantized; codes and scales stay."""
        ...


class StoredForm(Protocol):
    """One form, as one base declares it."""

    @property
    def words(self) -> str:
        """What people call it."""
        ...

    @property
    def loaded_as(self) -> Mapping[str, Any] | None:
        """The `quantization_config` with which transformers loads its weights as numbers; None for its own."""
        ...

    def weights(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, StoredParts]:
        """Find the weights of this form among the tensors of a checkpoint.

        Args:
            specs: all of its tensors, by name.

        Returns:
            By name of the weight, what it is made of.

        Raises:
            BadInputError: parts are missing, or do not fit together; names the tensor.
            UnsupportedError: parts are of a kind that is not read; names the tensor.
        """
        ...

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales of some weights take in memory, at most."""
        ...

    def misread(self, specs: Mapping[str, TensorSpec], dtype: torch.dtype) -> str | None:
        """Name a weight that transformers refuses or reads wrongly as `loaded_as`; None where it reads all of them.

        Args:
            specs: of all tensors of the checkpoint, by name.
            dtype: of the model.
        """
        ...

    def restore(
        self,
        name: str,
        parts: StoredParts,
        tensors: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
        *,
        transposed: bool,
    ) -> StoredWeight:
        """Build a weight from its parts.

        Args:
            name: of the weight, for messages.
            parts: as `weights` has found them.
            tensors: those, by name; views of mapped files are kept as they are.
            dtype: what it dequantizes to, where the form does not say.
            transposed: whether they hold the transpose of the weight.

        Raises:
            BadInputError: parts are missing, or do not fit together.
        """
        ...


@runtime_checkable
class QuantizingForm(StoredForm, Protocol):
    """A form that merged weights are quantized to again."""

    def requantized(self, name: str, parts: StoredParts, specs: Mapping[str, TensorSpec]) -> Mapping[str, PartLayout]:
        """Return what the parts of a weight are stored as once it is quantized again, by their names.

        Args:
            name: of the weight, for messages.
            parts: as `weights` has found them.
            specs: of all tensors of the checkpoint, by name.

        Raises:
            UnsupportedError: this weight is not quantized again; says why, and what to do.
        """
        ...

    def quantize(
        self, name: str, parts: StoredParts, tensors: Mapping[str, torch.Tensor], weight: torch.Tensor
    ) -> Mapping[str, torch.Tensor]:
        """Quantize a weight again, as the library of the form quantizes such a weight without data.

        Args:
            name: of the weight, for messages.
            parts: as `weights` has found them; `requantized` has taken them.
            tensors: those, by name, as the base stores them: what the weight's values do not decide stays.
            weight: its new values, in 16 or 32 bits, of its shape, on the CPU; may be mapped.

        Returns:
            All parts by name, in the dtypes and shapes that `requantized` tells.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wider:
    """Weights of a checkpoint in a form that are kept in more bits, and the others: by names of their modules.

    A module has the names that files have for it, which servers go by, and those of the model, which transformers does.
    """

    as_numbers: Sequence[str]
    """Modules whose weights are plain numbers, and were to be codes."""
    in_8_bits: Sequence[str]
    """Modules whose weights are 8-bit integers."""
    in_form: Mapping[str, Sequence[str]]
    """Names of modules by the weights that stay codes."""
    plain: Sequence[str]
    """Linear modules whose weights are numbers in any case."""


@runtime_checkable
class WideningForm(StoredForm, Protocol):
    """A form some of whose weights may be kept in more bits: its declaration says which, in its own words."""

    def check_wider(self, weights: Mapping[str, StoredParts], *, in_8_bits: bool) -> None:
        """Refuse what the declaration has no words for, or what nothing here proves to load.

        Args:
            weights: those that may be kept in more bits, by name.
            in_8_bits: whether as 8-bit integers; as numbers otherwise.

        Raises:
            UnsupportedError: says why, and what to request.
        """
        ...

    def declared_with(self, wider: Wider) -> Mapping[str, Any]:
        """Return the content of the declaration of such a checkpoint."""
        ...
