"""What an adapter of another trainer becomes: a configuration, and tensors by PEFT's names, made of stored ones."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jobs.errors import BadInputError, UnsupportedError
from jobs.request_files.problems import show
from workers.adapters.names import PREFIX
from workers.files.layout import TensorSpec

NEUTRAL: tuple[Any, ...] = (None, False, {}, [])
"""What a field holds that says nothing."""
_PLACE = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer or an expert in a module's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of the converted adapter."""

    name: str
    """As PEFT has it."""
    source: TensorSpec
    row: int | None = None
    """Of the source, where it is made of that alone; it has one dimension less then."""
    others: tuple[TensorSpec, ...] = ()
    """Further tensors that it is made of."""
    shape: tuple[int, ...]
    make: Callable[..., torch.Tensor] = torch.Tensor.clone
    """Moves elements and changes none; what no source has an element for is zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """An adapter as it was written."""

    place: str
    """Where it is, for messages: the files at hand may be copies in the cache."""
    file: str
    """Its configuration, for messages."""
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    inert_fields: frozenset[str]
    """Fields of the configuration that the operator knows to change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownBase:
    """What a conversion asks of the base."""

    directory: Path
    config: Mapping[str, Any]
    """Of its language model."""
    names: frozenset[str]
    """Of the tensors in its files."""
    num_bytes: int
    """Of them."""

    @property
    def model_type(self) -> str:
        """What transformers calls the architecture of its language model."""
        return str(self.config.get("model_type"))

    def number(self, field: str) -> int:
        """Return a size that its configuration states.

        Raises:
            BadInputError: it does not.
        """
        value = self.config.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise BadInputError(f"{self.directory}/config.json: field {field}: expected a size, found {show(value)}")
        return value

    def num_experts(self, start: str, end: str) -> int:
        """Return how many weights its files have that are called `start`, a number and `end`, counted from 0."""
        for prefix in ("", "model.", "model.language_model."):
            begin = start if not prefix else f"{prefix}{start.removeprefix('model.')}"
            count = 0
            while f"{begin}{count}{end}" in self.names:
                count += 1
            if count:
                return count
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """An adapter in PEFT's layout, before a value is read."""

    words: str
    """What it was, and of whom."""
    config: Mapping[str, Any]
    pieces: tuple[Piece, ...]
    empty: frozenset[str] = frozenset()
    """Names of stored tensors that hold nothing and become nothing."""


def lora_config(
    foreign: Foreign,
    modules: Iterable[str],
    rank: int,
    alpha: float,
    *,
    use_dora: bool = False,
    ranks: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return a configuration of PEFT for LoRA on modules.

    Args:
        foreign: the adapter, whose word on what it was trained on is kept.
        modules: all of them, by name; they alone are targeted.
        rank: of all but those in `ranks`.
        alpha: divided by `rank`, what all deltas are multiplied by.
        use_dora: whether magnitudes are trained, too.
        ranks: of modules that have another one. Their deltas are multiplied by `alpha / rank`, too.
    """
    of_rank: dict[int, list[str]] = defaultdict(list)
    for module, other in (ranks or {}).items():
        of_rank[other].append(module)
    # One pattern for each rank: there may be tens of thousands of experts.
    others = {f"^(?:{targets_of(each)})": other for other, each in of_rank.items() if other != rank}
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": foreign.config.get("base_model_name_or_path") or foreign.config.get("model"),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets_of(modules),
        "use_dora": use_dora,
        "rank_pattern": others,
        "alpha_pattern": {pattern: alpha_for(alpha / rank, other) for pattern, other in others.items()},
        "bias": "none",
        "inference_mode": True,
    }


def alpha_for(scaling: float, rank: int) -> float:
    """Return what divided by a rank is a scaling, in float64; the nearest there is where rounding leaves none."""
    alpha = scaling * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    found = next((each for each in near if each / rank == scaling), alpha)
    return int(found) if math.isfinite(found) and found == int(found) else found


def targets_of(modules: Iterable[str]) -> str:
    """Return a regular expression that matches modules by their whole names, and no other."""
    by_kind: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        places = _PLACE.findall(f"{module}.")
        kind = _PLACE.sub("{}", f"{module}.").removesuffix(".")
        by_kind[kind][".".join(places[:-1])].update(places[-1:])
    found = []
    for kind, lasts in sorted(by_kind.items()):
        firsts: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for first, numbers in lasts.items():
            firsts[tuple(sorted(numbers, key=_number))].append(first)
        found += [_pattern(kind, outer, inner) for inner, outer in sorted(firsts.items())]
    return "|".join(found)


def _pattern(kind: str, outer: list[str], numbers: tuple[str, ...]) -> str:
    parts = [re.escape(part) for part in kind.split("{}")]
    if len(parts) == 1:
        return parts[0]
    groups = ["", f"(?:{'|'.join(numbers)})"]
    if len(parts) == 2:
        return groups[1].join(parts)
    if len(parts) == 3:
        return f"{parts[0]}(?:{'|'.join(sorted(outer, key=_number))}){parts[1]}{groups[1]}{parts[2]}"
    return "|".join(  # more numbers than a layer and an expert: each outer group by itself
        "".join(f"{part}{number}" for part, number in zip(parts, [*first.split("."), groups[1], ""], strict=True))
        for first in sorted(outer)
    )


def _number(text: str) -> tuple[int, str]:
    return len(text), text


def pair(module: str, a_RI: Piece, b_OR: Piece) -> tuple[Piece, Piece]:
    """Return two pieces with the names that PEFT gives LoRA's factors on a linear module."""
    return _named(a_RI, f"{PREFIX}{module}.lora_A.weight"), _named(b_OR, f"{PREFIX}{module}.lora_B.weight")


def _named(piece: Piece, name: str) -> Piece:
    return dataclasses.replace(piece, name=name)


def whole(source: TensorSpec) -> Piece:
    """Return a tensor as it is, yet without a name."""
    return Piece(name="", source=source, shape=source.shape)


def transposed(source: TensorSpec) -> Piece:
    """Return a matrix the other way round, yet without a name."""
    rows, columns = source.shape
    return Piece(name="", source=source, shape=(columns, rows), make=lambda tensor: tensor.T.contiguous())


def row_of(source: TensorSpec, row: int) -> Piece:
    """Return one of the matrices of a stack, yet without a name."""
    return Piece(name="", source=source, row=row, shape=source.shape[1:])


def check_fields(foreign: Foreign, known: Collection[str], words: str) -> list[str]:
    """Check that a configuration holds no field that a trainer is not known to write.

    Returns:
        Those that the operator knows to change nothing.

    Raises:
        UnsupportedError: there is one; the message names it.
    """
    inert = []
    for name, value in foreign.config.items():
        if name in known or any(value == other and type(value) is type(other) for other in NEUTRAL):
            continue
        if name not in foreign.inert_fields:
            raise UnsupportedError(
                f"{foreign.file}: field {name} = {show(value)} is none that is known of {words}, and may change the "
                "merge; take it out if it changes nothing, or name it in MERGEFLEET_INERT_ADAPTER_FIELDS"
            )
        inert.append(name)
    return inert


def number_in(foreign: Foreign, name: str, value: object) -> float:
    """Return a number of a configuration that has to be one.

    Raises:
        BadInputError: it is none, or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadInputError(f"{foreign.file}: field {name}: expected a number, found {show(value)}")
    return value


def rank_in(foreign: Foreign, name: str, value: object) -> int:
    """Return a rank that a configuration states; raises as `number_in`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadInputError(f"{foreign.file}: field {name}: expected a whole number from 1 on, found {show(value)}")
    return value


def by_module(foreign: Foreign, ends: Mapping[str, str], words: str) -> dict[str, dict[str, TensorSpec]]:
    """Sort tensors by the module that they were trained on.

    Args:
        foreign: the adapter.
        ends: of names, and what each is.
        words: what the adapter is.

    Raises:
        UnsupportedError: a tensor has none of these ends.
    """
    found: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in foreign.tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            raise UnsupportedError(
                f"{foreign.place}: tensor {name} is none that is known of {words}: expected names that end with "
                f"{', '.join(ends)}; if the model does not need it, save the adapter without it"
            )
        found[name.removesuffix(end)][ends[end]] = spec
    return dict(found)


def halves(foreign: Foreign, module: str, parts: Mapping[str, TensorSpec]) -> tuple[TensorSpec, TensorSpec]:
    """Return both factors of a module, of which there has to be one each.

    Raises:
        BadInputError: there is not.
    """
    if not {"a", "b"} <= parts.keys():
        there = next(iter(parts.values())).name
        raise BadInputError(
            f"{foreign.place}: module {module}: expected both factors of its delta, found {there} alone; the adapter "
            "is incomplete"
        )
    return parts["a"], parts["b"]


def misshapen(foreign: Foreign, spec: TensorSpec, expected: str) -> BadInputError:
    """Say that a tensor has another shape than the configuration and the layout say."""
    return BadInputError(
        f"{foreign.place}: tensor {spec.name}: expected shape {expected}, found {list(spec.shape)}; the "
        "configuration is not the adapter's own, or the file is of another trainer"
    )
