"""A base as a model whose weights take no memory: private mappings of files, read where they are needed.

What the merge takes as it is stored is mapped from the base's own shards. What it takes otherwise (dequantized, cast to
another dtype, or put together of several stored tensors) is written to a file of its own first, and mapped from there.
A change of a mapped weight changes a copy of those pages, never a file. Names are those of the model.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from transformers import PreTrainedModel

from workers.adapters.names import owner_of
from workers.bases.conversions import Group
from workers.bases.quantized_base import QuantizedBase
from workers.files.layout import ShardLayout, lay_out_shard
from workers.files.local import file_errors
from workers.files.scratch import OwnedDirectory
from workers.files.tensor_io import mapped, tensor_bytes, write_all
from workers.merging.base_plan import BasePlan
from workers.merging.base_tiles import dequantized, tiles_of
from workers.merging.output import OutputTensor
from workers.merging.plan import MergePlan

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
        self._quantized = quantized
        self._path = directory / _FILE_NAME
        conversions = base.conversions
        names = {self._own_name(name) for name in names}
        single = {name: self._stored(name) for name in names if name in conversions.stored_names}
        converted = {name: tensor for name, tensor in single.items() if not tensor.copied}
        groups = tuple(dict.fromkeys(conversions.group_of[name] for name in names if name in conversions.group_of))
        self._written = frozenset(converted) | {name for group in groups for name in group.parameters}
        if self._written:
            specs = [(name, tensor.dtype, tensor.shape) for name, tensor in converted.items()]
            specs += [
                (name, base.by_name[group.stored[0]].dtype, conversions.shapes[name])
                for group in groups
                for name in group.parameters
            ]
            self._write(lay_out_shard(_FILE_NAME, specs), groups, quantized, on_bytes)

    def get(self, name: str) -> torch.Tensor:
        """Return one weight, mapped: on the CPU, in the dtype and shape the merge takes it in.

        Raises:
            BadInputError: the file is not what its header says any more.
        """
        name = self._own_name(name)
        if name in self._written:
            return mapped(self._path, name)
        tensor = self._stored(name)
        return mapped(self._base.source.directory / tensor.shard, tensor.name)

    def output(self, stored: str) -> torch.Tensor:
        """Return one weight as `get` does, but by its name in the base's files, and in the shape it has there."""
        group = self._base.conversions.group_behind.get(stored)
        if group is not None and self._base.by_name[stored].stored is None:
            return self._base.conversions.revert(group, {name: self.get(name) for name in group.parameters})[stored]
        name = self._base.conversions.parameter_names.get(stored)
        return self._read_stored(stored) if name is None else self.get(name)

    def model(self) -> PreTrainedModel:
        """Return the base as a model. What has no values in the base's files stays on the meta device."""
        model = self._base.skeleton()
        mapped: dict[int, nn.Parameter] = {}
        # A parameter that stands under several names has its values under the first one the base stores.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in mapped and self._has(name):
                mapped[id(parameter)] = nn.Parameter(self.get(name), requires_grad=False)
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if id(parameter) in mapped:
                    setattr(module, name, mapped[id(parameter)])
        for name, _ in list(model.named_buffers()):
            if self._has(name):
                owner, _, key = name.rpartition(".")
                setattr(model.get_submodule(owner), key, self.get(name))
        return model

    def _own_name(self, name: str) -> str:
        """Return the name of a tensor under which the base stores its values: its own, or one that it is tied to."""
        stored = self._base.stored_name(name)
        return name if stored is None else self._base.conversions.parameter_names[stored]

    def _has(self, name: str) -> bool:
        return name in self._written or (name in self._base.conversions.stored_names and self._stored(name).copied)

    def _stored(self, name: str) -> OutputTensor:
        return self._base.by_name[self._base.conversions.stored_names[name]]

    def _write(
        self,
        layout: ShardLayout,
        groups: Sequence[Group],
        quantized: QuantizedBase | None,
        on_bytes: Callable[[int], None],
    ) -> None:
        specs = {spec.name: spec for spec in layout.tensors}
        in_groups = {name for group in groups for name in group.parameters}
        with file_errors(f"writing {self._path}", self._path), self._path.open("xb") as file:

            def write(tiles: Iterable[torch.Tensor], offset: int) -> None:
                for tile in tiles:
                    data = tensor_bytes(tile)
                    write_all(file.fileno(), self._path, data, offset)
                    offset += len(data)
                    on_bytes(len(data))

            write_all(file.fileno(), self._path, layout.header, 0)
            for spec in layout.tensors:
                if spec.name not in in_groups:
                    write(tiles_of(self._base, quantized, self._stored(spec.name)), spec.begin)
            for group in groups:
                made = self._base.conversions.load(group, self._read_stored)
                for name, tensor in made.items():
                    if quantized is not None and name in quantized.names:
                        write(dequantized(quantized.weight(name), tensor.dtype), specs[name].begin)
                    else:
                        write((tensor.contiguous(),), specs[name].begin)

    def _read_stored(self, name: str) -> torch.Tensor:
        tensor = self._base.by_name[name]
        if self._base.form is not None and tensor.stored is None:
            assert self._quantized is not None
            return torch.cat(list(dequantized(self._quantized.weight(name), tensor.dtype))).view(tensor.shape)
        return mapped(self._base.source.directory / tensor.shard, name).to(tensor.dtype)


@contextlib.contextmanager
def module_weights(
    base: BasePlan,
    quantized: QuantizedBase | None,
    plans: Iterable[MergePlan],
    scratch: Path,
    on_bytes: Callable[[int], None],
) -> Iterator[ModuleWeights | None]:
    """Hand out the base's weights for PEFT, if a plan leaves any tensor to it.

    Args:
        base: the planned base.
        quantized: its weights in 4-bit, where the plans ask for them.
        plans: on this base.
        scratch: for what cannot be mapped from the base; emptied again.
        on_bytes: told the bytes written, as they are; may raise to stop.

    Raises:
        NoCapacityError: the disk is full.
    """
    names = {name for plan in plans for name in _names(plan)}
    if not names:
        yield None
        return
    directory = OwnedDirectory.make(scratch, "weights-")
    try:
        yield ModuleWeights(base, quantized, names, directory.path, on_bytes)
    finally:
        directory.leave()


def _names(plan: MergePlan) -> Iterator[str]:
    """Yield what PEFT needs values of: what it makes, and the weights of all layers that other methods than LoRA wrap.

    Those look at weights while they are put on, of layers, too, that a wrong plan has forgotten: PEFT is not to stumble
    over what the proof is there to find and to name.
    """
    yield from itertools.chain.from_iterable(plan.by_peft.values())
    if plan.by_peft and plan.opened.method != "LORA":
        shapes = plan.base.conversions.shapes
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(plan.opened.method)]
        owners = (owner_of(tensor, prefix) for tensor in plan.opened.tensors)
        yield from (weight for owner in owners if (weight := f"{owner}.weight") in shapes)
