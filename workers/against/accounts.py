"""Every tensor of a checkpoint and of the release it was made of, accounted for by headers alone."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from workers.bases.forms import StoredParts
from workers.files.layout import TensorSpec
from workers.merging.base_plan import BasePlan
from workers.releases.checks.quantization import HARMLESS

_FIXED = frozenset(
    {
        *HARMLESS,
        "activation_scale",
        *(f"{of}_{what}" for of in ("input", "output") for what in ("global_scale", "zero_point")),
    }
)
"""What the last part of their names is, of scales that are fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor of the release, and what stands for it in the checkpoint."""

    release: str
    checkpoint: str
    """The weight, or the tensor, there: of the same name, of another for the same parameter, or tied to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accounts:
    """What became of all tensors."""

    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    """Tensors of the release that its model takes, and that the checkpoint has nothing for."""
    left_out: tuple[str, ...]
    """Those that the model does not take, such as a layer for further tokens."""
    misshapen: Mapping[str, str]
    """What is wrong, by tensor of the release."""
    extra: tuple[str, ...]
    """Tensors of the checkpoint that the release has nothing for."""
    fixed: tuple[str, ...]
    """Scales of activations and of the KV cache, fixed by the tool: no part of any weight."""


def account(release: BasePlan, specs: Mapping[str, TensorSpec], in_form: Mapping[str, StoredParts]) -> Accounts:
    """Pair the tensors of a checkpoint with those of the release.

    Args:
        release: planned, in plain numbers.
        specs: of all tensors of the checkpoint, by name.
        in_form: its weights that are stored in a form.
    """
    parts = {stored for each in in_form.values() for stored in each.names}
    of_weights = [name for name in parts if name.rpartition(".")[2] in _FIXED]
    there: dict[str, tuple[int, ...] | None] = {name: each.shape for name, each in in_form.items()}
    there |= {name: _shape(spec) for name, spec in specs.items() if name not in parts and name not in in_form}
    shapes = {name: tensor.shape for name, tensor in release.by_name.items()}
    same = [Pair(release=name, checkpoint=name) for name in shapes if name in there]
    renamed = _renamed(release, [name for name in shapes if name not in there], [n for n in there if n not in shapes])
    pairs = [*same, *(Pair(release=name, checkpoint=other) for name, other in renamed.items())]
    found = {pair.release for pair in pairs}
    taken = release.conversions.shapes
    absent = [name for name in shapes if name not in found]
    unpaired = {name for name in there if name not in {pair.checkpoint for pair in pairs}}
    missing, left_out = [], []
    for name in absent:
        parameter = release.conversions.parameter_of(name)
        if twin := _tied(release, parameter, there):
            pairs.append(Pair(release=name, checkpoint=twin))
        elif parameter in taken:
            missing.append(name)
        else:
            left_out.append(name)
    extra, fixed = [], of_weights
    for name in sorted(unpaired - {pair.checkpoint for pair in pairs}):
        if name.rpartition(".")[2] in _FIXED:
            fixed.append(name)
        elif twin := _tied(release, release.conversions.parameter_of(name), shapes):
            pairs.append(Pair(release=twin, checkpoint=name))
        else:
            extra.append(name)
    wrong = {
        pair.release: f"expected shape {list(shapes[pair.release])}, found {list(shape)}"
        for pair in pairs
        if (shape := there[pair.checkpoint]) is not None and shape != shapes[pair.release]
    }
    return Accounts(
        pairs=tuple(pair for pair in pairs if pair.release not in wrong),
        missing=tuple(missing),
        left_out=tuple(left_out),
        misshapen=wrong,
        extra=tuple(extra),
        fixed=tuple(sorted(fixed)),
    )


def _shape(spec: TensorSpec) -> tuple[int, ...]:
    return spec.stated.shape if spec.stated else spec.shape


def _renamed(release: BasePlan, absent: list[str], foreign: list[str]) -> dict[str, str]:
    """Pair what has two names for one parameter of the model, as versions of transformers write them."""
    if not (absent and foreign):
        return {}
    by_parameter: dict[str, list[str]] = defaultdict(list)
    for name in foreign:
        by_parameter[release.conversions.parameter_of(name)].append(name)
    names = release.conversions.parameter_names
    return {
        name: by_parameter[names[name]][0]
        for name in absent
        if name in names and len(by_parameter.get(names[name], ())) == 1
    }


def _tied(release: BasePlan, parameter: str, stored: Mapping[str, object]) -> str | None:
    """Return a stored tensor of a parameter that the model ties to this one."""
    tied = release.tied.get(parameter, ())
    return next((name for name in stored if release.conversions.parameter_of(name) in tied), None) if tied else None
