"""Codes taken for weights: what a base stores in place of numbers, or beside them, without saying so anywhere.

What the model takes as a weight must be a number in the file, also where a request asks for a dtype: an 8-bit float or
an integer is a code, and without its scales another weight.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedModel

from jobs.errors import UnsupportedError
from workers.bases.conversions import Conversions
from workers.bases.declarations import DECLARING_FIELDS, DECLARING_FILES
from workers.files.layout import TensorSpec
from workers.sources.refused_forms import FORMS, Form

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Codes of numbers that are what they say."""

PART_ENDINGS: Mapping[str, tuple[str, str]] = {
    "_scale_inv": ("", "fp8"),
    "_blocks": ("", "mxfp4"),
    "_packed": ("", "compressed-tensors"),
    "_scale": ("", ""),
    "_scale_2": ("", "modelopt"),
    "_scales": ("", ""),
    "_global_scale": ("", "compressed-tensors"),
    "_zero_point": ("", "compressed-tensors"),
    "._data": ("", "quanto"),
    "._scale": ("", ""),
    ":_data": ("", "torchao"),
    "._weight_qdata": (".weight", "torchao"),
    "._weight_scale": (".weight", "torchao"),
    ".absmax": ("", ""),
    ".qweight": (".weight", ""),
    ".qzeros": (".weight", ""),
    ".g_idx": (".weight", "gptq"),
    ".scales": (".weight", ""),
    ".SCB": (".weight", "bitsandbytes"),
    ".W_q": (".weight", "hqq"),
    ".codes": (".weight", "aqlm"),
    ".codebooks": (".weight", "aqlm"),
    ".trellis": (".weight", "exl3"),
    ".q_weight": (".weight", "exl2"),
    ".biases": (".weight", "mlx"),
}
"""Endings of tensors that a stored form puts beside a weight, or in its place: what the weight ends in instead, and the
method where the ending is of one alone."""

_SCALES = ("_scale_inv", "_scale", "_scale_2", "_scales", "_global_scale", "._scale", ".absmax", ".scales", ".SCB")
"""Those without which the weight beside them is not what was trained, even where it is stored in 16 bits."""

_SCALING = re.compile(r"scale|absmax", re.IGNORECASE)
_OF_ACTIVATIONS = re.compile(
    r"(^|[._])(in|inp|inputs?|out|outputs?|act|activations?|[kqvx]|kv|probs?|logits?|softmax)([._]|$)", re.IGNORECASE
)
"""What scales are called under any name, and those of what goes through a module, which are no part of its weight."""


def refuse_codes(
    directory: Path,
    model: PreTrainedModel,
    conversions: Conversions,
    tensors: Mapping[str, TensorSpec],
    weight_of: Mapping[str, str],
) -> None:
    """Check that what the model takes as weights are numbers, not the codes of some form that nothing declares.

    A tensor that the model does not take is none of its weights, so its values do not matter.

    Args:
        directory: of the base, for messages.
        model: skeleton.
        conversions: between the base's tensors and the model's.
        tensors: of the base, by name.
        weight_of: by stored tensor, the weight in a declared form that it is a part of.

    Raises:
        UnsupportedError: a weight is stored as codes, in pieces, or beside scales that the model does not take.
    """
    behind = {stored: name for name, stored in conversions.stored_names.items()}
    behind |= {stored: group.parameters[0] for stored, group in conversions.group_behind.items()}
    numbers = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    specs = {name: spec for name, spec in tensors.items() if name not in weight_of}
    pieces = _pieces(specs, behind)
    codes = [spec for name, spec in specs.items() if behind.get(name) in numbers and spec.code not in PLAIN]
    if codes:
        _refuse(directory, codes[0], len(codes), pieces.get(codes[0].name, ()))
    for name, beside in pieces.items():
        if name not in specs and conversions.parameter_of(name) in numbers.difference(conversions.covered):
            raise UnsupportedError(
                f"{directory}: the weight {name} is stored as {_listed(beside)}: that is {_form_of(beside).words}, and "
                f"nothing declares it ({_looked_at()}). {_form_of(beside).advice}"
            )
        scales = [spec for spec in beside if spec.name.endswith(_SCALES) or part_ending(spec.name) is None]
        if scales and behind.get(name) in numbers:
            raise UnsupportedError(
                f"{directory}: tensor {name} ({specs[name].code}) has {_listed(scales)} beside it, which the model "
                f"{type(model).__name__} does not take, and nothing declares it ({_looked_at()}): the weight may not "
                "be multiplied by it yet. If it is, store the base without its scales; if not, multiply it first"
            )


def _pieces(specs: Mapping[str, TensorSpec], taken: Mapping[str, str]) -> dict[str, list[TensorSpec]]:
    """Return the tensors that no model takes and that are pieces of a weight, by what the weight would be called."""
    pieces = defaultdict(list)
    for name, spec in specs.items():
        if name in taken:
            continue
        ending = part_ending(name)
        weight = None if ending is None else name.removesuffix(ending) + PART_ENDINGS[ending][0]
        if weight not in specs:
            weight = next((each for each in _scaled_by(name) if each in specs and each in taken), weight)
        if weight is not None:
            pieces[weight].append(spec)
    return pieces


def part_ending(name: str) -> str | None:
    """Return the ending that says what piece of a weight a tensor is; None where its name has none of them."""
    return max((end for end in PART_ENDINGS if name.endswith(end)), key=len, default=None)


def _scaled_by(name: str) -> Iterator[str]:
    """Yield the weights that a tensor may hold the scales of, by the module that it is in or one above."""
    owner = name
    for _ in range(2):
        owner = owner.rpartition(".")[0]
        inside = name.removeprefix(f"{owner}.")
        if owner and _SCALING.search(inside) and not _OF_ACTIVATIONS.search(inside):
            yield f"{owner}.weight"


def _form_of(pieces: Iterable[TensorSpec]) -> Form:
    endings = {end for spec in pieces for end in PART_ENDINGS if spec.name.endswith(end)}
    methods = sorted({PART_ENDINGS[end][1] for end in endings} - {""})
    if not methods:
        return Form("GPTQ or AWQ") if ".qweight" in endings else Form("no number but a code")
    return FORMS[methods[0]]


def _refuse(directory: Path, spec: TensorSpec, num_codes: int, beside: Iterable[TensorSpec]) -> None:
    beside = list(beside)
    form = _form_of([*beside, spec])
    others = f" (and {num_codes - 1} more)" if num_codes > 1 else ""
    scales = f"beside {_listed(beside)}" if beside else "without any scales beside it"
    raise UnsupportedError(
        f"{directory}: tensor {spec.name}{others} is a weight of the model and stored as {spec.code}, {scales}: that "
        f"is {form.words}, and nothing declares it ({_looked_at()}). Without its scales it is another weight, in every "
        f"dtype. {form.advice}"
    )


def _listed(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{spec.name.rpartition('.')[2]} ({spec.code})" for spec in specs)


def _looked_at() -> str:
    return f"looked at: {', '.join(DECLARING_FIELDS)} of config.json; {', '.join(DECLARING_FILES)}"
