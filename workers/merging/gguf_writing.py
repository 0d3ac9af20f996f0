"""The tensors of a GGUF file, written: rows of merged numbers, in the order and type of the file.

Memory: a tile of a matrix in each thread, in float32 where it is quantized.
"""

import functools
import math
from collections.abc import Callable, Iterator

import torch

from jobs.errors import BadInputError
from workers.bases.gguf_files.tensors import GgufTensor
from workers.files.shard import ShardWriter
from workers.merging.gguf_storage import GgufStorage, read_from
from workers.merging.job import Job
from workers.merging.passes import PassState
from workers.numerics.tiles import TILE_ELEMENTS, rows_per_tile

Read = Callable[[str, slice], torch.Tensor]


def tasks_of_file(job: Job, storage: GgufStorage, state: PassState) -> Iterator[Callable[[], None]]:
    """Yield what there is to do for the file of a job, in its order."""
    plan = job.in_work
    if not plan.output.shards:
        return
    read = read_from(plan.merged, job.merged_in)
    for tensor in storage.tensors:
        yield functools.partial(_write, tensor, job, state, read)


def tiles_of(tensor: GgufTensor, alignment: int = 1) -> Iterator[slice]:
    """Yield the rows of one source of a tensor, in tiles of whole heads.

    Args:
        tensor: of the file.
        alignment: tiles begin at multiples of this many rows, too.
    """
    num_rows, num_columns = tensor.matrix
    alignment = math.lcm(alignment, tensor.row_alignment)
    step = rows_per_tile(num_rows, num_columns, alignment, TILE_ELEMENTS["cpu"])
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _write(tensor: GgufTensor, job: Job, state: PassState, read: Read) -> None:
    with state.of(job) as writer:
        if writer is None:
            return
        shard, spec = writer.locate(tensor.name)
        at = spec.begin
        if tensor.values is not None:
            at = _put(shard, at, tensor.encode(torch.tensor([tensor.values])), state)
        for source in tensor.sources:
            for rows in tiles_of(tensor):
                if not state.well([job]):
                    return
                tile = read(source, rows)
                data = tensor.encode(tensor.interleaved(tile))
                _check_scales(tensor, data)
                at = _put(shard, at, data, state)
        padding = spec.begin + math.prod(spec.shape) - at
        if padding:
            _put(shard, at, torch.zeros(padding, dtype=torch.uint8), state)


def _put(shard: ShardWriter, at: int, data: torch.Tensor, state: PassState) -> int:
    shard.write_copy(at, data)
    state.count(written=data.numel())
    return at + data.numel()


def _check_scales(tensor: GgufTensor, data: torch.Tensor) -> None:
    """Check that the scales of blocks are numbers: they are float16, whatever the weights were.

    Raises:
        BadInputError: one is not.
    """
    if not tensor.has_finite_scales(data):
        raise BadInputError(
            f"tensor {tensor.sources[0]}: its values are too large for {tensor.kind.name}, whose scales are float16 "
            "(65504 at most); request output: gguf, or look for overflow in base and adapter"
        )
