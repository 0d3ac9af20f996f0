"""One base in a stored form, as a worker has it: mapped from its own files or the cache's, or held in memory."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from jobs.errors import BadInputError, InternalError
from workers.bases.forms import StoredForm, StoredParts, StoredWeight
from workers.bases.forms.bitsandbytes_4bit import BITSANDBYTES_4BIT
from workers.files.layout import CheckpointLayout
from workers.files.local import file_errors
from workers.files.tensor_io import opened as opened_descriptor


class QuantizedBase:
    """The weights of one base in a stored form. On the CPU: views of mapped files, shared by the workers of a node."""

    def __init__(
        self,
        key: str,
        names: Collection[str],
        device: torch.device,
        transposed: Collection[str] = (),
        *,
        form: StoredForm = BITSANDBYTES_4BIT,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """Start without values; `add` brings them.

        Args:
            key: digest of all that decides the bits; of a base stored in a form, its own.
            names: of all weights in the form, as they are stored.
            device: where they are dequantized.
            transposed: those that are converted as their transpose.
            form: what they are stored in.
            dtype: what they are dequantized to, where the form does not say.
        """
        self.key = key
        self.names = frozenset(names)
        self.errors: dict[str, float] = {}
        """What 4 bits changed of stored tensors, as the Frobenius norm of the difference; empty where not known."""
        self._device = device
        self._holds = True
        self._transposed = frozenset(transposed)
        self._form = form
        self._dtype = dtype
        self._parts: dict[str, StoredParts] = {}
        self._files: dict[str, Path] = {}
        """Where each stored tensor of a weight is."""
        self._num_stored_bytes: dict[str, int] = {}
        self._opened: dict[Path, Any] = {}
        self._held: dict[str, StoredWeight] = {}
        self._directories: set[Path] = set()

    @classmethod
    def stored(
        cls,
        base: Path,
        layout: CheckpointLayout,
        device: torch.device,
        transposed: Collection[str],
        *,
        form: StoredForm,
        dtype: torch.dtype,
    ) -> Self:
        """Return a base that is stored in a form itself."""
        made = cls(base.name, (), device, transposed, form=form, dtype=dtype)
        made.add(base, layout, {})
        made.names = frozenset(made._parts)
        return made

    def hold(self, *, whole: bool) -> None:
        """Say whether weights stay on the device once they are used, or are brought there tile by tile.

        One that is larger than the device has room for is not held: its codes are mapped, and cross the bus whenever
        a tile is dequantized. The bits are the same. On the CPU weights are mapped either way.
        """
        self._holds = whole
        if not whole:
            self._held.clear()

    @property
    def num_device_bytes(self) -> int:
        """Bytes held on a device other than the CPU."""
        return sum(weight.num_bytes for weight in self._held.values())

    @property
    def directories(self) -> frozenset[Path]:
        """Where it is kept."""
        return frozenset(self._directories)

    def add(self, directory: Path, layout: CheckpointLayout, errors: Mapping[str, float]) -> None:
        """Take in some of the weights.

        Args:
            directory: of the files.
            layout: of the files.
            errors: of their weights.
        """
        found = self._form.weights({name: spec for name, (_, spec) in layout.tensors.items()})
        for name, parts in found.items():
            tensors = [layout.tensors[stored] for stored in parts.names]
            self._files |= {spec.name: directory / shard.name for shard, spec in tensors}
            self._num_stored_bytes[name] = sum(spec.num_bytes for _, spec in tensors)
        self._parts |= found
        self.errors |= errors
        self._directories.add(directory)

    def num_stored_bytes(self, name: str) -> int:
        """Return the bytes of its files that hold a weight."""
        return self._num_stored_bytes[name]

    def weight(self, name: str) -> StoredWeight:
        """Return one weight, which is dequantized on this base's device.

        Raises:
            BadInputError: the stored parts do not make a weight.
            NotFoundError, TransientIOError: they cannot be read, by kind of fault.
            InternalError: its values were not brought.
        """
        if name in self._held:
            return self._held[name]
        if name not in self._parts:
            raise InternalError(f"the stored values of {name} were not asked for before they were used")
        parts = self._parts[name]
        tensors = {stored: self._tensor(stored) for stored in parts.names}
        weight = self._form.restore(name, parts, tensors, self._dtype, transposed=name in self._transposed)
        if self._device.type != "cpu" and not self._holds:
            return weight.brought_to(self._device)
        if self._device.type != "cpu":
            weight = self._held[name] = weight.to(self._device)
            if self._held.keys() >= self._parts.keys():
                self._opened.clear()  # the files are not read again
        return weight

    def _tensor(self, name: str) -> torch.Tensor:
        path = self._files[name]
        try:
            with file_errors(f"reading {path}", path):
                opened = self._opened.get(path)
                if opened is None:  # its header is read once, however many weights it has
                    with opened_descriptor(path) as descriptor:
                        opened = self._opened[path] = safe_open(f"/proc/self/fd/{descriptor}", framework="pt")
                tensor: torch.Tensor = opened.get_tensor(name)
        except SafetensorError as error:
            raise BadInputError(f"{path}: tensor {name} cannot be read: {error}") from error
        return tensor
