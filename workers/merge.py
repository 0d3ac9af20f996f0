"""The pass: one walk over a base that writes the merged shards of all its jobs.

Each tile of a weight is read (or dequantized) once; every adapter's delta is added to it in float32, rounded once to
the output's dtype, and written at its final offset. The order of operations is that of PEFT's `Linear.merge` with
`safe_merge=False` (0.21): (B @ A) in float32, times the scaling, plus W, one rounding.

Shape suffixes: O output features, I input features, R rank.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from jobs.errors import BadInputError, MergefleetError
from jobs.release import Artifact
from workers.files import file_errors
from workers.lanes.lora import ADAPTER_WEIGHTS, read_operand
from workers.plan import BasePlan, MergePlan, OutputTensor
from workers.quant import QuantizedWeight
from workers.quantized_base import QuantizedBase
from workers.tensor_io import read_into, tensor_bytes
from workers.tiles import TILE_ELEMENTS, TileBuffers, rows_per_tile, single_threads
from workers.writer import CheckpointWriter


@dataclass(frozen=True, slots=True, kw_only=True)
class PassJob:
    """One job of a pass."""

    plan: MergePlan
    directory: Path
    """Where the merged shards are written; empty."""
    on_file: Callable[[Artifact], None]
    """Told each file as it is closed, in a thread of the pass; an error of ours fails the job."""
    check: Callable[[], None]
    """Raises CancelledError when the job should stop; called once per tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass did."""

    artifacts: dict[str, tuple[Artifact, ...]]
    """The merged shards of the jobs that went well, by request id."""
    errors: dict[str, MergefleetError]
    """Why the other jobs failed, by request id."""
    num_base_bytes_read: int
    """Bytes of the base's own files read; those in 4-bit come out of the cache and do not count."""
    num_adapter_bytes_read: int
    num_bytes_written: int


def run_pass(
    base: BasePlan,
    quantized: QuantizedBase | None,
    jobs: Sequence[PassJob],
    *,
    device: torch.device,
    num_threads: int,
    on_bytes: Callable[[int], None],
) -> PassResult:
    """Merge several adapters into one base in one walk.

    Memory: tiles of each thread, and the adapter tensors of the weights in work; it does not grow with the model.

    Args:
        base: the planned base.
        quantized: its weights in 4-bit, where the plan asks for them.
        jobs: planned on this base; each fails alone.
        device: where tiles are computed.
        num_threads: threads that compute; as many again hash.
        on_bytes: told the bytes written, as they are.

    Returns:
        The files of the jobs that went well and the errors of the others.

    Raises:
        NotFoundError, BadInputError, TransientIOError: the base itself cannot be read.
    """
    hashing = ThreadPoolExecutor(num_threads, thread_name_prefix="hash")
    walk = _Walk(base=base, quantized=quantized, jobs=jobs, device=device, hashing=hashing, on_bytes=on_bytes)
    try:
        with single_threads(num_threads, "merge") as pool:
            for worker in [pool.submit(walk.work) for _ in range(num_threads)]:
                worker.result()
        hashing.shutdown()
        return walk.result()
    finally:
        hashing.shutdown()
        walk.close()


class _Weight:
    """What the tiles of one tensor share: loaded with the first, dropped with the last."""

    def __init__(self, tensor: OutputTensor, quantized: QuantizedWeight | None, num_tiles: int) -> None:
        self.tensor = tensor
        self.quantized = quantized
        self.num_tiles_left = num_tiles
        self.lock = threading.Lock()
        self.operands: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        """lora_A [R, I] and lora_B [O, R] of each job, float32, on the device."""


@dataclass(frozen=True, slots=True)
class _Tile:
    weight: _Weight
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.stop - self.start, self.weight.tensor.num_columns


class _Walk:
    """The state of one pass. Threads call `work` until nothing is left."""

    def __init__(
        self,
        *,
        base: BasePlan,
        quantized: QuantizedBase | None,
        jobs: Sequence[PassJob],
        device: torch.device,
        hashing: ThreadPoolExecutor,
        on_bytes: Callable[[int], None],
    ) -> None:
        self._base = base
        self._quantized = quantized
        self._jobs = {job.plan.request.id: job for job in jobs}
        self._writers = {
            name: CheckpointWriter(job.directory, job.plan.output, hashing, job.on_file)
            for name, job in self._jobs.items()
        }
        self._device = device
        self._on_bytes = on_bytes
        self._lock = threading.Lock()
        self._tiles = self._all_tiles()
        self._stopped = False
        self._descriptors: dict[str, int] = {}
        self._buffers = TileBuffers(device)
        self._num_base_bytes = 0
        self._num_adapter_bytes = 0
        self._num_written = 0

    def work(self) -> None:
        """Take tiles in order and finish them, until none is left or every job has failed."""
        stream = self._buffers.stream
        try:
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                while (tile := self._next_tile()) is not None:
                    if self._computed(tile.weight.tensor):
                        self._compute(tile)
                    else:
                        self._copy(tile.weight.tensor)
        except BaseException:
            self._stopped = True
            raise

    def close(self) -> None:
        """Close all files; call once all threads have ended, those that hash included."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        for writer in self._writers.values():
            writer.close()

    def result(self) -> PassResult:
        """Say what was done; call once all threads have ended, those that hash included."""
        artifacts = {name: writer.finished() for name, writer in self._writers.items()}
        errors = {name: writer.error for name, writer in self._writers.items() if writer.error is not None}
        return PassResult(
            artifacts={name: files for name, files in artifacts.items() if name not in errors},
            errors=errors,
            num_base_bytes_read=self._num_base_bytes,
            num_adapter_bytes_read=self._num_adapter_bytes,
            num_bytes_written=self._num_written,
        )

    def _next_tile(self) -> _Tile | None:
        with self._lock:
            if self._stopped or all(writer.error for writer in self._writers.values()):
                return None
            return next(self._tiles, None)

    def _all_tiles(self) -> Iterator[_Tile]:
        for tensor in self._base.tensors:
            quantized = None
            if tensor.stored is None:
                assert self._quantized is not None
                quantized = self._quantized.weight(tensor.name)
                if quantized.shape != tensor.shape:
                    raise BadInputError(
                        f"{self._base.source.directory}: tensor {tensor.name} is stored in 4-bit as "
                        f"{list(quantized.shape)}, config.json makes it {list(tensor.shape)}; the checkpoint is corrupt"
                    )
            step = tensor.num_rows
            if self._computed(tensor):
                alignment = quantized.row_alignment if quantized else 1
                step = rows_per_tile(tensor.num_rows, tensor.num_columns, alignment, TILE_ELEMENTS[self._device.type])
            starts = range(0, max(tensor.num_rows, 1), max(step, 1))
            weight = _Weight(tensor, quantized, len(starts))
            for start in starts:
                yield _Tile(weight, start, min(start + step, tensor.num_rows))

    def _computed(self, tensor: OutputTensor) -> bool:
        if tensor.num_bytes == 0:
            return False
        return not tensor.copied or any(tensor.name in job.plan.deltas for job in self._jobs.values())

    def _descriptor(self, shard: str) -> int:
        with self._lock:
            if shard not in self._descriptors:
                path = self._base.source.directory / shard
                with file_errors(f"reading {path}"):
                    self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[shard]

    def _copy(self, tensor: OutputTensor) -> None:
        assert tensor.stored is not None
        source = self._descriptor(tensor.shard)
        self._count(base=tensor.num_bytes)
        for name in self._jobs:
            with self._job(name) as writer:
                if writer is not None:
                    shard, spec = writer.locate(tensor.name)
                    shard.copy(source, tensor.stored.begin, spec.begin, tensor.num_bytes)
                    self._count(written=tensor.num_bytes)

    def _compute(self, tile: _Tile) -> None:
        tensor = tile.weight.tensor
        with_delta = [name for name, job in self._jobs.items() if tensor.name in job.plan.deltas]
        without = [name for name in self._jobs if name not in with_delta]
        weight_OI = self._read_tile(tile)
        rounded_OI = self._buffers.get("rounded", tensor.dtype, tile.shape, host=False)
        for name in with_delta:
            with self._job(name) as writer:
                if writer is not None:
                    self._add(weight_OI, tile, self._jobs[name], rounded_OI)
                    self._write(writer, tile, rounded_OI)
        if without:
            # Written from memory even where the base could be copied: the tile is here, and the base is read once.
            rounded_OI.copy_(weight_OI)
            largest = _largest(rounded_OI)
        for name in without:
            with self._job(name) as writer:
                if writer is not None:
                    _check_range(tensor, largest)
                    self._write(writer, tile, rounded_OI)
        with tile.weight.lock:
            tile.weight.num_tiles_left -= 1
            if tile.weight.num_tiles_left == 0:
                tile.weight.operands.clear()

    def _read_tile(self, tile: _Tile) -> torch.Tensor:
        if tile.weight.quantized is not None:
            return tile.weight.quantized.dequantize_rows(tile.start, tile.stop)
        tensor = tile.weight.tensor
        assert tensor.stored is not None
        host_OI = self._buffers.get("stored", tensor.stored.dtype, tile.shape, host=True)
        row_bytes = tensor.num_columns * tensor.stored.dtype.itemsize
        path = self._base.source.directory / tensor.shard
        read_into(self._descriptor(tensor.shard), path, host_OI, tensor.stored.begin + tile.start * row_bytes)
        self._count(base=host_OI.numel() * host_OI.itemsize)
        return host_OI.to(self._device, non_blocking=True)

    def _operands(self, tile: _Tile, job: PassJob) -> tuple[torch.Tensor, torch.Tensor]:
        delta = job.plan.deltas[tile.weight.tensor.name]
        name = job.plan.request.id
        with tile.weight.lock:
            if name not in tile.weight.operands:
                path = job.plan.adapter.directory / ADAPTER_WEIGHTS
                a_RI = read_operand(path, delta.a_RI).to(self._device)
                b_OR = read_operand(path, delta.b_OR).to(self._device)
                tile.weight.operands[name] = a_RI, b_OR
                self._count(adapter=delta.a_RI.num_bytes + delta.b_OR.num_bytes)
            return tile.weight.operands[name]

    def _add(self, weight_OI: torch.Tensor, tile: _Tile, job: PassJob, rounded_OI: torch.Tensor) -> None:
        a_RI, b_OR = self._operands(tile, job)
        scaling = job.plan.deltas[tile.weight.tensor.name].scaling
        sum_OI = self._buffers.get("sum", torch.float32, tile.shape, host=False)
        torch.mm(b_OR[tile.start : tile.stop], a_RI, out=sum_OI)
        if scaling != 1.0:
            sum_OI.mul_(scaling)
        sum_OI.add_(weight_OI)
        _check_range(tile.weight.tensor, _largest(sum_OI))
        rounded_OI.copy_(sum_OI)

    def _write(self, writer: CheckpointWriter, tile: _Tile, rounded_OI: torch.Tensor) -> None:
        host_OI = rounded_OI
        if self._buffers.stream is not None:
            host_OI = self._buffers.get("shipped", rounded_OI.dtype, tile.shape, host=True)
            host_OI.copy_(rounded_OI, non_blocking=True)
            self._buffers.stream.synchronize()
        shard, spec = writer.locate(tile.weight.tensor.name)
        data = tensor_bytes(host_OI)
        shard.write(spec.begin + tile.start * tile.weight.tensor.num_columns * rounded_OI.itemsize, data)
        self._count(written=len(data))

    @contextlib.contextmanager
    def _job(self, name: str) -> Iterator[CheckpointWriter | None]:
        """Hand out the writer of a job that is still well; what goes wrong inside is that job's failure alone."""
        writer = self._writers[name]
        if writer.error is None:
            try:
                self._jobs[name].check()
            except MergefleetError as error:
                writer.fail(error)
        if writer.error is not None:
            yield None
            return
        try:
            yield writer
        except MergefleetError as error:
            writer.fail(error)

    def _count(self, *, base: int = 0, adapter: int = 0, written: int = 0) -> None:
        with self._lock:
            self._num_base_bytes += base
            self._num_adapter_bytes += adapter
            self._num_written += written
        if written:
            self._on_bytes(written)


def _largest(values: torch.Tensor) -> float:
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def _check_range(tensor: OutputTensor, largest: float) -> None:
    if not largest <= torch.finfo(tensor.dtype).max:
        raise BadInputError(
            f"tensor {tensor.name}: merging gives {largest}, which {tensor.dtype} cannot hold; request another dtype, "
            "or look for NaN and overflow in base and adapter"
        )
