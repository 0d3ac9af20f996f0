"""Bases in 4-bit: made once, kept on disk in the bnb-4bit checkpoint format, mapped or held by workers."""

import hashlib
import json
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jobs.errors import BadInputError, NoCapacityError, NotFoundError
from workers.checkpoint import INDEX_FILE, CheckpointLayout, read_checkpoint, read_json
from workers.conversions import Conversions, Group
from workers.files import file_errors, sha256_of, sync_tree
from workers.quant import (
    QuantizedWeight,
    quantize_rows,
    quantized_names,
    quantized_owner,
    restore,
    row_alignment,
    stored_tensors,
)
from workers.scratch import OwnedDirectory, exclusive, sweep
from workers.tensor_io import read_rows

_GROUP_BYTES = 64 << 20
"""Size of a cache file: bounds the memory that quantizing takes beyond its largest weight."""

_DIGESTS_NAME = "digests.json"
_TILE_ELEMENTS = 1 << 18

logger = logging.getLogger(__name__)


class QuantizedBase:
    """The 4-bit weights of one base. On the CPU they are views of mapped files, which all workers of a node share."""

    def __init__(
        self, directory: Path, layout: CheckpointLayout, device: torch.device, transposed: Collection[str] = ()
    ) -> None:
        self.directory = directory
        """Where it is kept: the name of the directory is its content's key."""
        self._device = device
        self._transposed = frozenset(transposed)
        self._parts: dict[str, dict[str, str]] = {name: {} for name in quantized_names(layout.tensors)}
        for stored, (shard, _) in layout.tensors.items():
            name = quantized_owner(stored, self._parts)
            if name is not None:
                self._parts[name][stored.removeprefix(name)] = shard.name
        self._held: dict[str, QuantizedWeight] = {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the weights in 4-bit."""
        return frozenset(self._parts)

    @property
    def num_device_bytes(self) -> int:
        """Bytes held on a device other than the CPU."""
        return sum(weight.num_bytes for weight in self._held.values())

    def weight(self, name: str) -> QuantizedWeight:
        """Return one weight, on this base's device.

        Raises:
            BadInputError: the stored parts do not make a weight.
            NotFoundError, TransientIOError: they cannot be read, by kind of fault.
        """
        if name in self._held:
            return self._held[name]
        stored = {}
        for suffix, shard in self._parts[name].items():
            path = self.directory / shard
            try:
                with file_errors(f"reading {path}"), safe_open(path, framework="pt") as file:
                    stored[suffix] = file.get_tensor(f"{name}{suffix}")
            except SafetensorError as error:
                raise BadInputError(f"{path}: tensor {name}{suffix} cannot be read: {error}") from error
        weight = restore(name, stored, transposed=name in self._transposed)
        if self._device.type != "cpu":
            weight = self._held[name] = weight.to(self._device)
        return weight


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationTask:
    """What decides the bits of a quantized base."""

    base: Path
    base_digest: str
    layout: CheckpointLayout
    weights: tuple[str, ...]
    """Names in the checkpoint of the weights to convert that are stored as they are."""
    transposed: frozenset[str]
    """Those of them that are converted as their transpose."""
    made: frozenset[str]
    """Names in the model of weights to convert that are made of several stored tensors, or of a part of one."""
    conversions: Conversions
    """How they are made."""
    quant_type: str
    double_quant: bool
    dtype: torch.dtype | None
    """Weights are cast to this first, as `from_pretrained(dtype=...)` does; None keeps their own."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups in which some weight is converted."""
        return tuple(group for group in self.conversions.groups if not self.made.isdisjoint(group.parameters))

    @property
    def converted(self) -> frozenset[str]:
        """Names of the stored tensors whose values go through 4 bits, in part at least."""
        return frozenset(self.weights).union(*(group.stored for group in self.groups))

    @property
    def num_weights(self) -> int:
        """Number of weights to convert."""
        return len(self.weights) + len(self.made)

    def key(self, device: torch.device) -> str:
        """Return the digest under which the result is kept. Devices may round differently, so each has its own."""
        decides = {
            "base": self.base_digest,
            "weights": self.weights,
            "transposed": sorted(self.transposed),
            "made": {name: self.conversions.group_of[name].stored for name in self.made},
            "transformers": transformers.__version__ if self.made else None,
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "dtype": str(self.dtype),
            "device": device.type,
            "bitsandbytes": bitsandbytes.__version__,
        }
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


class QuantizedCache:
    """Quantized bases under one directory, by content. Several processes may share it; each base is made once."""

    def __init__(self, root: Path, device: torch.device, num_threads: int) -> None:
        self._root = root
        self._device = device
        self._num_threads = num_threads

    def open(self, task: QuantizationTask, on_bytes: Callable[[int], None]) -> QuantizedBase:
        """Return the quantized base, made now if no process has made it yet.

        Args:
            task: what to quantize.
            on_bytes: told the bytes of the base read, as they are; may raise to stop.

        Raises:
            NoCapacityError: the disk is full.
            AuthError, TransientIOError: base or cache cannot be used, by kind of fault.
        """
        directory = self._root / task.key(self._device)
        with file_errors(f"keeping a quantized base in {self._root}"), exclusive(directory.with_suffix(".lock")):
            if not self._is_whole(directory):
                self._make(task, directory, on_bytes)
        return QuantizedBase(directory, read_checkpoint(directory), self._device, task.transposed)

    def _is_whole(self, directory: Path) -> bool:
        if not directory.exists():
            return False
        try:
            digests = dict(read_json(directory / _DIGESTS_NAME))
            changed = [name for name in {INDEX_FILE, *digests} if sha256_of(directory / name) != digests.get(name)]
        except (NotFoundError, BadInputError, OSError, TypeError, ValueError) as error:
            changed = [str(error)]
        if changed:
            logger.warning("a cached quantized base is damaged and is made anew", extra={"damage": changed})
        return not changed

    def _make(self, task: QuantizationTask, directory: Path, on_bytes: Callable[[int], None]) -> None:
        sweep(self._root, "making-")
        staging = OwnedDirectory(self._root, "making-")
        try:
            self._fill(task, staging.path, on_bytes)
            if directory.exists():
                shutil.rmtree(directory)
            sync_tree(staging.path)
            staging.path.rename(directory)
        except SafetensorError as error:
            raise NoCapacityError(f"cannot keep a quantized base in {self._root}: {error}; free space there") from error
        finally:
            staging.remove()

    def _fill(self, task: QuantizationTask, directory: Path, on_bytes: Callable[[int], None]) -> None:
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        for number, tensors in enumerate(self._groups(task, on_bytes)):
            name = f"model-{number:05d}.safetensors"
            save_file(tensors, directory / name, metadata={"format": "pt"})
            digests[name] = sha256_of(directory / name)
            weight_map |= dict.fromkeys(tensors, name)
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index))
        digests[INDEX_FILE] = sha256_of(directory / INDEX_FILE)
        (directory / _DIGESTS_NAME).write_text(json.dumps(digests))

    def _groups(self, task: QuantizationTask, on_bytes: Callable[[int], None]) -> Iterator[dict[str, torch.Tensor]]:
        group: dict[str, torch.Tensor] = {}
        with ThreadPoolExecutor(self._num_threads, thread_name_prefix="quantize") as pool:
            for name, tensors in _quantized(task, self._device, pool, on_bytes):
                group |= {f"{name}{suffix}": tensor for suffix, tensor in tensors.items()}
                if sum(tensor.numel() * tensor.itemsize for tensor in group.values()) >= _GROUP_BYTES:
                    yield group
                    group = {}
        if group:
            yield group


def _quantized(
    task: QuantizationTask, device: torch.device, pool: ThreadPoolExecutor, on_bytes: Callable[[int], None]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield each weight's name, and the tensors it is stored as in 4-bit."""

    def read(name: str) -> torch.Tensor:
        shard, spec = task.layout.tensors[name]
        tensor = read_rows(task.base / shard.name, spec, 0, spec.shape[0] if spec.shape else 1)
        on_bytes(tensor.numel() * tensor.itemsize)
        return tensor.to(task.dtype or spec.dtype)

    for name in task.weights:
        if name in task.transposed:
            # As transformers does, over the whole transpose: its blocks take a value from every row of the file.
            yield name, _quantize_whole(task, read(name).T, device)
        else:
            yield name, _quantize_rows(task, name, device, pool, on_bytes)
    for group in task.groups:
        for name, tensor in task.conversions.load(group, read).items():
            if name in task.made:
                yield name, _quantize_whole(task, tensor, device)


def _quantize_whole(task: QuantizationTask, weight: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    codes, absmax = quantize_rows(weight.to(device).contiguous(), task.quant_type)
    num_rows, num_columns = weight.shape
    return stored_tensors(
        codes,
        absmax,
        quant_type=task.quant_type,
        double_quant=task.double_quant,
        shape=(num_rows, num_columns),
        dtype=weight.dtype,
    )


def _quantize_rows(
    task: QuantizationTask,
    name: str,
    device: torch.device,
    pool: ThreadPoolExecutor,
    on_bytes: Callable[[int], None],
) -> dict[str, torch.Tensor]:
    shard, spec = task.layout.tensors[name]
    num_rows, num_columns = spec.shape
    alignment = row_alignment(num_columns)
    rows_per_tile = max(1, _TILE_ELEMENTS // (num_columns * alignment)) * alignment
    dtype = task.dtype or spec.dtype

    def quantize_tile(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        stop = min(start + rows_per_tile, num_rows)
        tile = read_rows(task.base / shard.name, spec, start, stop)
        on_bytes(tile.numel() * tile.itemsize)
        return quantize_rows(tile.to(device=device, dtype=dtype), task.quant_type)

    tiles = list(pool.map(quantize_tile, range(0, num_rows, rows_per_tile)))
    return stored_tensors(
        torch.cat([codes for codes, _ in tiles]),
        torch.cat([absmax for _, absmax in tiles]),
        quant_type=task.quant_type,
        double_quant=task.double_quant,
        shape=(num_rows, num_columns),
        dtype=dtype,
    )


class ResidentBases:
    """Quantized bases a worker keeps between units: least recently used first out, under a budget of device bytes."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._bases: OrderedDict[str, QuantizedBase] = OrderedDict()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the bases held, least recently used first."""
        return tuple(self._bases)

    def get(self, key: str, content: str, load: Callable[[], QuantizedBase]) -> QuantizedBase:
        """Return the base held under a key, loaded now if it is not there.

        Args:
            key: what requests have in common that use it.
            content: digest of what it is made from; a base that has changed since is loaded anew.
            load: makes or opens it.
        """
        if key not in self._bases or self._bases[key].directory.name != content:
            self._bases[key] = load()
        self._bases.move_to_end(key)
        return self._bases[key]

    def trim(self) -> None:
        """Let go of bases until the rest fit the budget; the one used last always stays."""
        while len(self._bases) > 1 and sum(base.num_device_bytes for base in self._bases.values()) > self._budget_bytes:
            self._bases.popitem(last=False)
