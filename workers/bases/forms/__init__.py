"""Stored forms: how a base keeps weights that are no plain numbers, and how tiles of them are made numbers.

Extend: write a module with a class that implements `StoredForm`, add it to the table in `forms/declared.py`, and run
the contract suite (`tests/contract/test_forms.py`) over it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch

from workers.files.layout import TensorSpec


class StoredWeight(Protocol):
    """One weight, on the device where it is dequantized, or brought there tile by tile."""

    @property
    def shape(self) -> tuple[int, int]:
        """[O, I]."""
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
            memory: [stop - start, I] of `dtype`, on the CPU: may become the result, where the codes are there, too.

        Returns:
            A tensor [stop - start, I] of `dtype`, on the device where it is dequantized.
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
    def knows_shapes(self) -> bool:
        """Whether codes have the shape of their weight, also of weights that the model does not take."""
        ...

    @property
    def while_loading(self) -> Mapping[str, Any]:
        """Arguments with which transformers' `from_pretrained` takes it, its weights as numbers where it can."""
        ...

    def owners(self, specs: Mapping[str, TensorSpec]) -> Mapping[str, str]:
        """Find the weights of this form among the tensors of a checkpoint.

        Args:
            specs: all of its tensors, by name.

        Returns:
            By stored tensor, the weight that it is a part of; a weight's codes are a part of it under its own name.

        Raises:
            BadInputError: parts are missing, or do not fit together; names the tensor.
        """
        ...

    def held_bytes(self, num_elements: int) -> int:
        """Return what codes and scales of some weights take in memory, at most."""
        ...

    def misread(self, specs: Mapping[str, TensorSpec]) -> str | None:
        """Name a weight that transformers refuses or reads wrongly `while_loading`; None where it reads all of them."""
        ...

    def restore(
        self, name: str, stored: Mapping[str, torch.Tensor], dtype: torch.dtype, *, transposed: bool
    ) -> StoredWeight:
        """Build a weight from its parts.

        Args:
            name: of the weight, for messages.
            stored: its parts by what their names have after the weight's; views of mapped files are kept as they are.
            dtype: what it dequantizes to, where the form does not say.
            transposed: whether they hold the transpose of the weight.

        Raises:
            BadInputError: parts are missing, or do not fit together.
        """
        ...
