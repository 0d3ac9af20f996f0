"""What an adapter has to leave in a release, by its own files: where the proof of a merge begins.

Nothing here is taken from a plan, or read as the merge reads it: the files are read by safetensors itself, and names
and scalings are those of PEFT 0.21 (`LoraModel._create_and_replace`, `LoraLayer.update_layer`).
"""

import contextlib
import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from jobs.combination import CombinationType
from jobs.errors import BadInputError
from jobs.parity_report import TensorCheck
from workers.adapters.adapter import open_adapter
from workers.adapters.fitting import fit
from workers.files.foreign import read_foreign
from workers.merging.plan import MergePlan

_PREFIX = "base_model.model."
_BIASES = ("bias", "base_layer.bias")
"""What a layer may have besides two matrices that are added to its weight."""
_COPY = re.compile(r"\.modules_to_save\.(default\.)?")
_ORIGINAL = ".original_module."
"""What PEFT puts into the name of a weight that was trained whole, and into that of the base's weight beside it."""

_WRAPPERS = frozenset({"module", "modules_to_save", "default"})

_VALUE_HEAD = re.compile(r"((base_model|model|module|_[a-z_]+)\.)*(v_head|value_head)\..+")
"""Names, wrappers before them or not, of what a model does without after the training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tensors of an adapter that add scaling * B @ A to one weight."""

    a: str
    b: str
    scaling: float


class Evidence:
    """What one adapter says, against what ships of it."""

    def __init__(self, plan: MergePlan) -> None:
        """Read the names of an adapter's tensors.

        Args:
            plan: of the job, whole: which adapter and which base they are. What it does with them is not asked.

        Raises:
            BadInputError: the adapter's files cannot be read any more.
        """
        self._base = plan.base
        self._directory = plan.opened.directory
        self._path = self._directory / "adapter_model.safetensors"
        self._outputs = plan.merged.tensors.keys()
        self._config: Any = plan.opened.config
        self._head = plan.opened.head.shapes if plan.opened.head else {}
        self._stored = {name: spec.name for name, spec in plan.opened.tensors.items()}
        """Names in the file, by PEFT's."""
        with self._errors():
            file: Any = safe_open(self._path, framework="pt")
            unnamed = set(file.keys()).difference(self._stored.values())
            unnamed -= {name for name in plan.opened.left_behind if _VALUE_HEAD.fullmatch(name)}
        copies = {_COPY.sub(".", stored) for stored in self._stored.values()}
        unnamed -= {name for name in unnamed if _ORIGINAL in name and name.replace(_ORIGINAL, ".") in copies}
        self._file = file
        with self._errors():
            unnamed -= {name for name in unnamed if self._is_there_twice(name)}
        self.tensors = dict.fromkeys((*self._stored, *sorted(unnamed)))
        """Names of its tensors: PEFT's, and those of the file that were given none."""
        self._parts = tuple((Evidence(part), weight) for part, weight in _parts(plan))
        """What each adapter says that this one was combined of, and its weight."""
        combination = plan.request.combination
        self._is_sum = combination is not None and combination.type is CombinationType.CAT

    def _is_there_twice(self, name: str) -> bool:
        """Whether a tensor has the values of one that was named, under a name that is the same but for its wrappers."""
        plain = _without_wrappers(name)
        twins = (
            stored
            for stored in self._stored.values()
            if (other := _without_wrappers(stored)).endswith(plain) or plain.endswith(other)
        )
        one = self._file.get_tensor(name)
        others = (self._file.get_tensor(stored) for stored in twins)
        return any(one.dtype == other.dtype and torch.equal(one, other) for other in others)

    @cached_property
    def pairs(self) -> Mapping[str, Pair]:
        """Plain LoRA on linear weights, by the weight's name in the release."""
        config: dict[str, Any] = json.loads(read_foreign(self._directory / "adapter_config.json"))
        for field in ("rank_pattern", "alpha_pattern"):  # their keys are names of modules, which bases have renamed
            config[field] = getattr(self._config, field, None)
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            return {}
        pairs = {}
        for module, inside in self._inside(("lora_A.weight", "lora_B.weight")).items():
            stored = self._linear(f"{module}.weight")
            if stored is not None and inside.issubset({"lora_A.weight", "lora_B.weight", *_BIASES}):
                names = {half: f"{_PREFIX}{module}.{half}.weight" for half in ("lora_A", "lora_B")}
                pairs[stored] = Pair(a=names["lora_A"], b=names["lora_B"], scaling=_scaling(config, module))
        return pairs

    def _inside(self, endings: tuple[str, ...]) -> Mapping[str, set[str]]:
        """Return what the adapter holds of each module that it has tensors of all these endings for."""
        modules = [
            {
                name.removeprefix(_PREFIX).removesuffix(f".{ending}")
                for name in self.tensors
                if name.endswith(f".{ending}")
            }
            for ending in endings
        ]
        inside: dict[str, set[str]] = {module: set() for module in set.intersection(*modules)}
        for name in self.tensors:
            parts = name.removeprefix(_PREFIX).split(".")
            for length in range(1, len(parts)):
                if (module := ".".join(parts[:length])) in inside:
                    inside[module].add(".".join(parts[length:]))
        return inside

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor of the adapter by PEFT's name of it: a copy, in float32 if it holds 16-bit numbers."""
        with self._errors():
            tensor: torch.Tensor = self._file.get_tensor(self._stored.get(name, name))
        return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)

    def factors(self, weight: str) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return what is added to a weight of the release: lora_A [R, I], lora_B [O, R], float32, and their scaling.

        None if nothing is. Where adapters were concatenated, it is the sum of what they add: read from their own files.
        """
        if self._is_sum and weight in self.pairs:
            there = [(found, share) for part, share in self._parts if (found := part.factors(weight)) is not None]
            if not there:
                return None
            b_OR = [(b_OR.double() * (share * scaling)).float() for (_, b_OR, scaling), share in there]
            return torch.cat([a_RI for (a_RI, _, _), _ in there]), torch.cat(b_OR, dim=1), 1.0
        pair = self.pairs.get(weight)
        return None if pair is None else (self.read(pair.a), self.read(pair.b), pair.scaling)

    def replacement(self, name: str) -> str | None:
        """Return the adapter's tensor that takes the place of one of the base's, by the latter's name in the model."""
        for same in (name, *self._base.tied.get(name, ())):
            owner, _, key = same.rpartition(".")
            for candidate in (f"{_PREFIX}{same}", f"{_PREFIX}{owner}.base_layer.{key}"):
                if candidate in self.tensors:
                    return candidate
        return None

    def misread(self, held: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
        """Return the tensors of the adapter that a model holds other values for, or none.

        Pairs are left out where it holds none: what is added to a linear weight is compared with the file itself.

        Args:
            held: what PEFT has put on a model, by the names that it would save it under.
        """
        left_out = {half for pair in self.pairs.values() for half in (pair.a, pair.b)} - held.keys()
        return tuple(
            name
            for name in self.tensors
            if name not in left_out
            and (
                name not in held
                or (
                    held[name].device.type != "meta"  # of the base, and not left to PEFT
                    and not torch.equal(held[name], self.read(name).to(held[name].dtype))
                )
            )
        )

    def shipped(self, name: str) -> tuple[str, ...]:
        """Return the names in the release of a tensor of the model: its own, or those of what it is made of."""
        conversions = self._base.conversions
        if name in self._head:
            return (name,)
        if name in conversions.stored_names:
            return (conversions.stored_names[name],)
        if name in conversions.group_of:
            return conversions.group_of[name].stored
        if name in self._base.tied:
            apart = conversions.new_name(name)
            stored = apart if apart in self._outputs else self._base.stored_name(name)
            return () if stored is None else (stored,)
        return ()

    @cached_property
    def model_names(self) -> Mapping[str, str]:
        """Names in the model, by those in the release, of tensors that are one there; of tied ones, the first."""
        names: dict[str, str] = {}
        for name in (*self._base.conversions.shapes, *self._head):
            if name not in self._base.conversions.group_of:
                for output in self.shipped(name):
                    names.setdefault(output, name)
        return names

    def unfounded(self, checks: Mapping[str, TensorCheck]) -> tuple[str, ...]:
        """Return the adapter's tensors that nothing in the release was compared with, or that it was not combined of.

        Args:
            checks: of all tensors of the release, by name.
        """
        lost = (name for part, _ in self._parts for name in part.tensors if name not in self.tensors)
        return tuple(
            name
            for name in dict.fromkeys((*self.tensors, *lost))
            if name not in self.tensors
            or not any(output in checks and checks[output].targeted for output in self._places(name))
        )

    def _places(self, tensor: str) -> Collection[str]:
        """Return the tensors of a release in which an adapter's tensor may be found.

        That is the one whose name it has, else those of the module it belongs to; all, if it is one of those that all
        layers share, which are of no module.
        """
        if not tensor.startswith(_PREFIX):
            return self._outputs
        parts = [part for part in tensor.removeprefix(_PREFIX).split(".") if part != "base_layer"]
        owner_ends = next((place for place, part in enumerate(parts) if part.startswith(self._tuner)), len(parts))
        return self._by_module.get(".".join(parts[:owner_ends]), ())

    @cached_property
    def _tuner(self) -> tuple[str, ...]:
        """How names begin that PEFT gives to what it puts into a module."""
        return (PEFT_TYPE_TO_PREFIX_MAPPING[self._config.peft_type], "token_adapter", "trainable_tokens_")

    @cached_property
    def _by_module(self) -> Mapping[str, Collection[str]]:
        """Names in the release of the tensors below each module, of the model or of the files, and of each tensor."""
        places: dict[str, set[str]] = defaultdict(set)
        for name in (*self._base.conversions.shapes, *self._head):
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                places[".".join(parts[:length])].update(self.shipped(name))
        for stored in self._base.conversions.group_behind:
            places[stored].add(stored)
            places[stored.rpartition(".")[0]].add(stored)
        return places

    def _linear(self, weight: str) -> str | None:
        """Return the name in the release of the linear weight that an adapter calls so; None where it is none.

        Weights that the model has in one parameter by now are called in the files as in training.
        """
        conversions = self._base.conversions
        stored = weight if weight in conversions.group_behind else conversions.stored_names.get(weight)
        if stored is None or stored in self._base.transposed or weight in self._base.tied:
            return None
        return stored if len(self._base.by_name[stored].shape) == 2 else None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise BadInputError(f"{self._path}: cannot be read any more: {error}") from error


def _without_wrappers(name: str) -> str:
    """Return a name without what trainers and PEFT put into names, after a dot."""
    return "." + ".".join(part for part in name.split(".") if not part.startswith("_") and part not in _WRAPPERS)


def _parts(plan: MergePlan) -> Iterator[tuple[MergePlan, float]]:
    """Yield the plan as it would be of each adapter that a plan's was combined of, as far as it is evidence."""
    if plan.request.combination is not None:
        request = plan.request.model_copy(update={"combination": None})
        for source, weight in plan.weighted:
            opened = open_adapter(source.directory, plan.opened.inert_fields, source.beside)
            opened = fit(opened, plan.base.conversions.shapes, plan.base.skeleton)
            yield dataclasses.replace(plan, request=request, opened=opened), weight


def _scaling(config: Mapping[str, Any], module: str) -> float:
    def pattern(field: str, default: float) -> float:
        patterns = config.get(field) or {}
        return float(patterns.get(get_pattern_key(list(patterns), module), default))

    rank = pattern("rank_pattern", config.get("r", 8))
    alpha = pattern("alpha_pattern", config.get("lora_alpha", 8))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
