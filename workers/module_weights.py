"""A base as a model whose weights take no memory: private mappings of files, read where they are needed.

What the merge takes as it is stored is mapped from the base's own shards. What it takes otherwise (dequantized, or cast
to another dtype) is written to a file of its own first, and mapped from there. Whoever changes a mapped weight changes
a copy of those pages, never a file.
"""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import BadInputError
from workers.checkpoint import ShardLayout, lay_out_shard
from workers.files import file_errors
from workers.model import skeleton
from workers.plan import BasePlan, OutputTensor
from workers.quantized_base import QuantizedBase
from workers.tensor_io import read_rows, tensor_bytes, write_all
from workers.tiles import TILE_ELEMENTS, rows_per_tile

_FILE_NAME = "weights.safetensors"


class ModuleWeights:
    """The weights of one base, as its merges take them."""

    def __init__(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        names: Collection[str],
        directory: Path,
        on_bytes: Callable[[int], None],
    ) -> None:
        """Write what cannot be mapped from the base.

        Args:
            base: the planned base.
            quantized: its weights in 4-bit, where the plan asks for them.
            names: tensors that will be asked for; others that are not stored as they are taken stay without values.
            directory: empty; the caller removes it once nothing is mapped any more.
            on_bytes: told the bytes written, as they are; may raise to stop.

        Raises:
            NoCapacityError: the disk is full.
        """
        self._base = base
        converted = [tensor for tensor in base.tensors if tensor.name in names and not tensor.copied]
        self._converted = frozenset(tensor.name for tensor in converted)
        self._path = directory / _FILE_NAME
        if converted:
            layout = lay_out_shard(_FILE_NAME, [(t.name, t.dtype, t.shape) for t in converted])
            self._write(layout, quantized, on_bytes)

    def get(self, name: str) -> torch.Tensor:
        """Return one weight, mapped: on the CPU, in the dtype and shape the merge takes it in.

        Raises:
            BadInputError: the file is not what its header says any more.
        """
        tensor = self._base.by_name[name]
        path = self._path if name in self._converted else self._base.source.directory / tensor.shard
        try:
            with file_errors(f"reading {path}"), safe_open(path, framework="pt") as file:
                mapped: torch.Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise BadInputError(f"{path}: tensor {name} cannot be read: {error}") from error
        return mapped

    def model(self) -> PreTrainedModel:
        """Return the base as a model. Parameters without values, and buffers, stay on the meta device."""
        model = skeleton(self._base.source.directory)
        mapped: dict[int, nn.Parameter] = {}
        # A parameter that stands under several names has its values under the first one the base stores.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            tensor = self._base.by_name.get(name)
            if tensor is not None and id(parameter) not in mapped and (tensor.copied or name in self._converted):
                mapped[id(parameter)] = nn.Parameter(self.get(name), requires_grad=False)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in mapped:
                    setattr(module, name, mapped[id(parameter)])
        return model

    def _write(self, layout: ShardLayout, quantized: QuantizedBase | None, on_bytes: Callable[[int], None]) -> None:
        with file_errors(f"writing {self._path}"), self._path.open("xb") as file:
            write_all(file.fileno(), self._path, layout.header, 0)
            for spec in layout.tensors:
                offset = spec.begin
                for tile in self._tiles(self._base.by_name[spec.name], quantized):
                    data = tensor_bytes(tile)
                    write_all(file.fileno(), self._path, data, offset)
                    offset += len(data)
                    on_bytes(len(data))

    def _tiles(self, tensor: OutputTensor, quantized: QuantizedBase | None) -> Iterator[torch.Tensor]:
        weight = None
        if tensor.stored is None:
            assert quantized is not None
            weight = quantized.weight(tensor.name)
        alignment = weight.row_alignment if weight else 1
        step = rows_per_tile(tensor.num_rows, tensor.num_columns, alignment, TILE_ELEMENTS["cpu"])
        for start in range(0, tensor.num_rows, max(step, 1)):
            stop = min(start + step, tensor.num_rows)
            if weight is not None:
                tile = weight.dequantize_rows(start, stop).cpu()
            else:
                assert tensor.stored is not None
                tile = read_rows(self._base.source.directory / tensor.shard, tensor.stored, start, stop)
            yield tile.to(tensor.dtype)
