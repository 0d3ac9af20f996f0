"""The cache of bases in 4-bit: made once, kept on disk in the bnb-4bit checkpoint format."""

import itertools
import json
import logging
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jobs.errors import BadInputError, NoCapacityError, NotFoundError
from workers.bases.quantization_task import QuantizationTask
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantizing import Quantized, quantize_streamed, quantize_whole, streamed_layout
from workers.files.checkpoint import read_checkpoint, read_json
from workers.files.conveyor import Conveyor
from workers.files.layout import INDEX_FILE, CheckpointLayout
from workers.files.local import file_errors, sha256_of
from workers.files.scratch import OwnedDirectory, exclusive, sweep
from workers.files.writer import CheckpointWriter
from workers.numerics.tiles import results_of, single_threads

_GROUP_BYTES = 32 << 20
"""Size of a cache file of what cannot be streamed: bounds the memory that it takes beyond its largest weight."""
_THREADS_PER_SHARD = 4
"""Threads that a shard takes: so many keep up with the hashing of its codes, which is one after the other."""
_DIGESTS_NAME = "digests.json"
_ERRORS_NAME = "errors.json"


logger = logging.getLogger(__name__)


class QuantizedCache:
    """Quantized bases under one directory, by content and shard of the base.

    Several processes may share it: each shard is made once, and those who start together make different ones.
    """

    def __init__(self, root: Path, device: torch.device, num_threads: int) -> None:
        self._root = root
        self._device = device
        self._num_threads = num_threads
        self._whole = threading.Lock()
        """Of what takes weights as a whole, however many shards are worked on."""

    def open(self, task: QuantizationTask, on_bytes: Callable[[int], None]) -> QuantizedBase:
        """Return the whole quantized base, as `prepare` makes it."""
        base = self.empty(task)
        self.prepare(base, task, None, on_bytes)
        return base

    def empty(self, task: QuantizationTask) -> QuantizedBase:
        """Return a base without values."""
        return QuantizedBase(task.key(self._device), {*task.weights, *task.made}, self._device, task.transposed)

    def prepare(
        self,
        base: QuantizedBase,
        task: QuantizationTask,
        stored: Collection[str] | None,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Bring values into a base, made now where no process has made them yet.

        Args:
            base: made by `empty` for the same task.
            task: what to quantize.
            stored: names of the base's tensors whose shards are wanted; None for all.
            on_bytes: told the bytes of the base read, as they are; may raise to stop.

        Raises:
            NoCapacityError: the disk is full.
            AuthError, TransientIOError: base or cache cannot be used, by kind of fault.
        """
        parts = [part for part in task.by_shard.values() if stored is None or not part.converted.isdisjoint(stored)]
        missing = {self._root / part.key(self._device): part for part in parts}
        missing = {directory: part for directory, part in missing.items() if directory not in base.directories}
        num_abreast = max(1, self._num_threads // _THREADS_PER_SHARD)

        def keep(each: tuple[Path, QuantizationTask], *, wait: bool) -> bool:
            on_bytes(0)
            return self._keep(*each, self._num_threads // num_abreast, on_bytes, wait=wait)

        with single_threads(num_abreast, "shard") as pool:
            held = results_of([pool.submit(keep, each, wait=False) for each in missing.items()])
            busy = [each for each, was_held in zip(missing.items(), held, strict=True) if not was_held]
            # By now the process that was at it may be done, or dead.
            results_of([pool.submit(keep, each, wait=True) for each in busy])
        for directory in missing:
            base.add(directory, read_checkpoint(directory), read_json(directory / _ERRORS_NAME))

    def _keep(
        self, directory: Path, part: QuantizationTask, num_threads: int, on_bytes: Callable[[int], None], *, wait: bool
    ) -> bool:
        """Make one shard's part unless it is there; False where another process is at it, without waiting for it."""
        with (
            file_errors(f"keeping a quantized base in {self._root}", self._root),
            exclusive(directory.with_suffix(".lock"), wait=wait) as held,
        ):
            if held and not self._is_whole(directory):
                self._make(part, directory, num_threads, on_bytes)
            return held

    def _is_whole(self, directory: Path) -> bool:
        if not directory.exists():
            return False
        try:
            digests = dict(read_json(directory / _DIGESTS_NAME))
            changed = [
                name
                for name in {INDEX_FILE, _ERRORS_NAME, *digests}
                if sha256_of(directory / name) != digests.get(name)
            ]
        except (NotFoundError, BadInputError, OSError, TypeError, ValueError) as error:
            changed = [str(error)]
        if changed:
            logger.warning("a cached quantized base is damaged and is made anew", extra={"damage": changed})
        return not changed

    def _make(self, task: QuantizationTask, directory: Path, num_threads: int, on_bytes: Callable[[int], None]) -> None:
        sweep(self._root, "making-")
        staging = OwnedDirectory.make(self._root, "making-")
        try:
            self._fill(task, staging.path, num_threads, on_bytes)
            task.unchanged()  # what is kept is kept for the digest
            if directory.exists():
                shutil.rmtree(directory)
            # Not synced: what a crash leaves torn is found by its digests with the next `open`, and made anew.
            staging.path.rename(directory)
        except SafetensorError as error:
            raise NoCapacityError(f"cannot keep a quantized base in {self._root}: {error}; free space there") from error
        finally:
            staging.leave()

    def _fill(self, task: QuantizationTask, directory: Path, num_threads: int, on_bytes: Callable[[int], None]) -> None:
        weight_map: dict[str, str] = {}
        digests: dict[str, str] = {}
        errors: dict[str, float] = {}
        rest: list[Quantized] = []
        layout = streamed_layout(task)
        if layout.shards:
            rest, digests = self._stream(task, layout, directory, num_threads, on_bytes)
            weight_map |= {name: shard.name for name, (shard, _) in layout.tensors.items()}
        with self._whole:
            whole = quantize_whole(task, self._device, on_bytes)
            for number, tensors in enumerate(_groups(itertools.chain(rest, whole), errors)):
                name = f"others-{number:05d}.safetensors"
                save_file(tensors, directory / name, metadata={"format": "pt"})
                digests[name] = sha256_of(directory / name)
                weight_map |= dict.fromkeys(tensors, name)
        index = {"metadata": {}, "weight_map": weight_map}
        for name, content in ((INDEX_FILE, index), (_ERRORS_NAME, errors)):
            (directory / name).write_text(json.dumps(content))
            digests[name] = sha256_of(directory / name)
        (directory / _DIGESTS_NAME).write_text(json.dumps(digests))

    def _stream(
        self,
        task: QuantizationTask,
        layout: CheckpointLayout,
        directory: Path,
        num_threads: int,
        on_bytes: Callable[[int], None],
    ) -> tuple[list[Quantized], dict[str, str]]:
        """Write what grows with the weights; return what else belongs to them, and the digests of what is written."""
        conveyor = Conveyor.of_threads(num_threads)
        writer = CheckpointWriter(directory, layout, conveyor, direct=False, on_file=lambda _: None)

        def write(name: str, begin: int, data: torch.Tensor) -> None:
            writer.raise_error()
            shard, spec = writer.locate(name)
            shard.write_copy(spec.begin + begin, data)

        try:
            rest = list(quantize_streamed(task, self._device, num_threads, write=write, on_bytes=on_bytes))
        finally:
            conveyor.close()
            writer.close()
        writer.raise_error()
        return rest, {file.artifact.path: file.artifact.sha256 for file in writer.finished()}


def _groups(weights: Iterable[Quantized], errors: dict[str, float]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of each further cache file; put the error of each weight on the way."""
    group: dict[str, torch.Tensor] = {}
    for name, tensors, known in weights:
        errors |= known
        group |= {f"{name}{suffix}": tensor for suffix, tensor in tensors.items()}
        if sum(tensor.numel() * tensor.itemsize for tensor in group.values()) >= _GROUP_BYTES:
            yield group
            group = {}
    if group:
        yield group
