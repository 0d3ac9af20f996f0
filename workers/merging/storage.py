"""What the weights of a release are stored in, where that is no plain numbers: its base's form, or one it is given."""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch

from workers.bases.forms import PartLayout, QuantizingForm, StoredForm, StoredParts, StoredWeight
from workers.bases.forms.compressed.output import CompressedOutput
from workers.files.tensor_io import mapped
from workers.merging.base_plan import BasePlan
from workers.numerics.tiles import ALIGNED_ROWS, TILE_ELEMENTS, Tiling

_WEIGHT = ".weight"
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Modules that vLLM fuses (`packed_modules_mapping` of its models), and takes one global scale for: the largest."""
_FUSED_BESIDES = (("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"))
"""Those of the linear attention of Qwen3.5, fused by vLLM in the same way."""
_EXPERTS = ".experts."


class Storage(Protocol):
    """What some weights of one release are stored in: each by itself, or all in one file (`gguf_storage.py`)."""

    @property
    def words(self) -> str:
        """What people call it."""
        ...

    @property
    def declaration(self) -> Mapping[str, Any] | None:
        """What `config.json` says of it; None for what that of the base says, empty for nothing."""
        ...

    def companions(self, name: str) -> tuple[str, ...]:
        """Return the weights whose numbers decide what a weight is stored as, itself included."""
        ...


@runtime_checkable
class WeightStorage(Storage, Protocol):
    """What weights of one release are quantized to, one by one."""

    @property
    def form(self) -> StoredForm:
        """The form, to read the release."""
        ...

    @property
    def in_form(self) -> Mapping[str, StoredParts]:
        """All weights of the release that are stored in it, by name."""
        ...

    def quantize(self, name: str, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Return what a weight is stored as, by stored name, in the dtypes and shapes that are laid out.

        Args:
            name: of the weight.
            read: returns the numbers of a weight by name, in 16 or 32 bits, on the CPU; they may be mapped.
        """
        ...

    def before(self, name: str) -> Mapping[str, torch.Tensor] | None:
        """Return what the base stores a weight as, by the same names; None where that is something else."""
        ...


def stored_alike(names: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    """Return the weights that servers take in one scheme alone, as they make one module of them.

    vLLM refuses a fused projection whose parts are ignored in part (`should_ignore_layer` of its compressed_tensors),
    and has one scheme for all experts of a layer: it asks for that of the first one's projections, refuses those that
    are in several, and takes it for the others unasked (`CompressedTensorsMoEMethod.get_moe_method`). transformers puts
    the experts of a layer into one parameter, too.

    Args:
        names: of all weights that are stored in a form.

    Returns:
        By each of them, those that go with it, itself included, in their order.
    """
    layers: dict[str, list[str]] = defaultdict(list)
    for name in names:
        layer, dot, _ = name.partition(_EXPERTS)
        if dot:
            layers[layer].append(name)
    experts, fused = {layer: tuple(found) for layer, found in layers.items()}, (*_FUSED, *_FUSED_BESIDES)
    return {
        name: experts[layer] if (layer := name.partition(_EXPERTS)[0]) in experts else _fused(name, names, fused)
        for name in names
    }


def _fused(name: str, names: Collection[str], groups: Sequence[tuple[str, ...]] = _FUSED) -> tuple[str, ...]:
    owner, _, module = name.removesuffix(_WEIGHT).rpartition(".")
    together = next((each for each in groups if module in each), (module,))
    found = (f"{owner}.{each}{_WEIGHT}" for each in together)
    return tuple(each for each in found if each in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStorage:
    """The form of the base: `output: as_base`."""

    base: BasePlan
    form: StoredForm
    layout: Mapping[str, PartLayout]
    """Of the parts that are made anew, by name."""
    declaration: None = None

    @property
    def words(self) -> str:
        """What people call the form."""
        return self.form.words

    @property
    def in_form(self) -> Mapping[str, StoredParts]:
        """All weights of the base that are stored in it."""
        return self.base.in_form

    def companions(self, name: str) -> tuple[str, ...]:
        """Return a weight alone: what it shares with others stays; see `Storage`."""
        return (name,)

    def quantize(self, name: str, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Quantize a weight again; see `Storage`. One that an adapter adds nothing to keeps its codes and scales."""
        assert isinstance(self.form, QuantizingForm)
        parts, before, weight = self.base.in_form[name], self.before(name), read(name)
        was = self.form.restore(name, parts, before, weight.dtype, transposed=False)
        found = before if _is_same(weight, was) else self.form.quantize(name, parts, before, weight)
        made = ((stored, *self.layout[stored]) for stored in parts.names)
        return {stored: found[stored].to(dtype).reshape(shape) for stored, dtype, shape in made}

    def before(self, name: str) -> Mapping[str, torch.Tensor]:
        """Return what the base stores a weight as: views of mapped files."""
        directory, places = self.base.source.directory, self.base.layout.tensors
        return {each: mapped(directory / places[each][0].name, each) for each in self.base.in_form[name].names}


def _is_same(weight: torch.Tensor, stored: StoredWeight) -> bool:
    """Whether a weight has the values that a stored one stands for; the first tile tells, where it has not."""
    return all(
        torch.equal(tile, weight.view(-1, tile.shape[1])[rows])
        for rows in Tiling.of(stored.shape, stored.row_alignment, TILE_ELEMENTS["cpu"]).rows
        for tile in [stored.dequantize_rows(rows.start, rows.stop)]
    )


@dataclass(frozen=True, kw_only=True)
class GivenStorage:
    """A form that the request names: `output: fp8_dynamic` and so on."""

    output: CompressedOutput
    form: StoredForm
    in_form: Mapping[str, StoredParts]
    declaration: Mapping[str, Any]

    @property
    def words(self) -> str:
        """What people call the form."""
        return self.form.words

    @cached_property
    def by_tiles(self) -> bool:
        """Whether tiles of all weights are stored as if they were weights: scales reach no further."""
        alignment = self.output.row_alignment
        if alignment is None:
            return False
        return alignment == 1 or all(
            ALIGNED_ROWS % alignment == 0 and parts.shape is not None and parts.shape[0] % ALIGNED_ROWS == 0
            for parts in self.in_form.values()
        )

    def companions(self, name: str) -> tuple[str, ...]:
        """Return the weights that share a global scale, where the form has such; see `Storage`."""
        return _fused(name, self.in_form) if self.output.shares_scales else (name,)

    def quantize(self, name: str, read: Callable[[str], torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """Quantize a weight; see `Storage`."""
        return self.output.quantize(name, read(name), [read(each) for each in self.companions(name)])

    def before(self, name: str) -> None:  # noqa: ARG002 - the base stores none of them so
        """Return None; see `Storage`."""
        return
