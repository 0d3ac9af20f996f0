"""Adapters of Tinker: `adapter_model.safetensors` nearly as PEFT saves it, rank and alpha in `adapter_config.json`.

Layout: `build_name_remaps` and `plan_expert_ops` of tinker_cookbook/weights/_merge_utils.py, `MergeProfile` and
`expand_expert_lora_tensors` of _merge.py there, August 2026. Names begin with `base_model.model.model.` whatever the
base is; `unembed_tokens` is its head. The experts of a layer are stacks [E, R, I] and [E, O, R], of which one may have
a single matrix that all of them share: `w1` is the gate, `w3` what is multiplied with it, `w2` what leads back. Deltas
are multiplied by alpha / r of the configuration, whatever rank a tensor has.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jobs.errors import BadInputError, UnsupportedError
from jobs.request_files.problems import show
from workers.adapters.names import PREFIX
from workers.adapters.trainers.layout import (
    Converted,
    Foreign,
    KnownBase,
    Piece,
    by_module,
    check_fields,
    halves,
    lora_config,
    misshapen,
    number_in,
    pair,
    rank_in,
    row_of,
    whole,
)
from workers.files.layout import TensorSpec

WORDS = "an adapter of Tinker"
_ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b"}
_HEAD = "model.unembed_tokens"
_STACK = re.compile(r"(.+\.experts)\.(w[123])")
_OWN = re.compile(r".*\.(unembed_tokens|experts\.w[123])\.lora_[AB]\.weight")
"""Names that no other trainer gives."""
_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_OTHER_ARCHITECTURES = {
    "gpt_oss": "the gates of its experts alternate in one parameter",
    "nemotron_h": "projections that were trained apart are one in it",
}
"""Architectures whose adapters Tinker's own export takes apart or together in a way of their own."""
_EXPORT = "export it with build_lora_adapter of tinker_cookbook.weights, or merge it with build_hf_model of it"
_FUSED = {f"qwen3_5{kind}": ("in_proj_qkv", ("in_proj_q", "in_proj_k", "in_proj_v")) for kind in ("_text", "_moe_text")}
"""Linears that Tinker trains apart and the base has as one, their rows one after the other: `_plan_split_qkv_op` of
_merge_qwen3_5.py."""
_CONSUMED = frozenset({"r", "lora_alpha"})
_OF_PEFT = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True,),
    "inference_mode": (True,),
}
"""Fields that say with these values what holds for these adapters in any case."""
_SAYS_NOTHING = frozenset({"base_model_name_or_path", "target_modules", "lora_dropout", "peft_version", "revision"})
"""Fields that add nothing to the tensors and their names."""


def recognizes(config: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether an adapter is one of Tinker: by names that are its own, or as a PEFT-like one without PEFT's method."""
    if any(_OWN.fullmatch(name) for name in names):
        return True
    of_peft = all(name.startswith(PREFIX) and name.endswith(tuple(_ENDS)) for name in names)
    return bool(names) and of_peft and "peft_type" not in config and config.keys() >= _CONSUMED


def convert(foreign: Foreign, base: KnownBase) -> Converted:
    """Give an adapter of Tinker the layout of PEFT; raises as `convert_adapter`."""
    agreed = {name for name, values in _OF_PEFT.items() if foreign.config.get(name) in values}
    check_fields(foreign, _CONSUMED | _SAYS_NOTHING | agreed, WORDS)
    if (why := _OTHER_ARCHITECTURES.get(base.model_type)) is not None:
        raise UnsupportedError(
            f"{foreign.file}: this is {WORDS} for a base of model_type {base.model_type}: {why}, and such adapters are "
            f"not converted; {_EXPORT}"
        )
    rank = rank_in(foreign, "r", foreign.config.get("r"))
    alpha = number_in(foreign, "lora_alpha", foreign.config.get("lora_alpha"))
    pieces: list[Piece] = []
    ranks: dict[str, int] = {}
    empty = set()
    fused: dict[str, dict[str, tuple[TensorSpec, TensorSpec]]] = defaultdict(dict)
    whole_name, members = _FUSED.get(base.model_type, ("", ()))
    for stored, parts in by_module(foreign, _ENDS, WORDS).items():
        a, b = halves(foreign, stored, parts)
        module = stored.removeprefix(PREFIX)
        place, _, leaf = module.rpartition(".")
        if leaf in members:
            fused[f"{place}.{whole_name}"][leaf] = a, b
            continue
        stack = _STACK.fullmatch(module)
        if stack is not None and not a.num_elements and not b.num_elements:
            empty |= {a.name, b.name}  # of a projection that the experts of this base do not have
        elif stack is not None:
            for each, made in _experts(foreign, base, stack, a, b).items():
                ranks[each] = a.shape[1]
                pieces += made
        else:
            _check_pair(foreign, a, b)
            name = _name(foreign, base, module, a)
            ranks[name] = a.shape[0]
            pieces += pair(name, whole(a), whole(b))
    for name, found in fused.items():
        made = _together(foreign, name, members, found)
        ranks[name] = made[0].shape[0]
        pieces += made
    if not pieces:
        raise BadInputError(f"{foreign.place}: expected the factors of LoRA, found {show(sorted(foreign.tensors))}")
    return Converted(
        words=WORDS,
        config=lora_config(foreign, ranks, rank, alpha, ranks=ranks),
        pieces=tuple(pieces),
        empty=frozenset(empty),
    )


def _check_pair(foreign: Foreign, a: TensorSpec, b: TensorSpec) -> None:
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise misshapen(foreign, b, f"[outputs, {a.shape[0] if a.shape else 'rank'}]")


def _together(
    foreign: Foreign, name: str, members: Sequence[str], found: Mapping[str, tuple[TensorSpec, TensorSpec]]
) -> tuple[Piece, Piece]:
    """Return one pair for linears that are one in the base: the rank is the sum of theirs, B has theirs as blocks."""
    if missing := [member for member in members if member not in found]:
        there = next(iter(found.values()))[0].name
        raise BadInputError(
            f"{foreign.place}: {name} of the base is {', '.join(members)} of Tinker, and the adapter has {there} "
            f"without {missing[0]}, so that nothing says which rows it is of"
        )
    pairs = [found[member] for member in members]
    for a, b in pairs:
        _check_pair(foreign, a, b)
        if (a.dtype, b.dtype, a.shape[1:]) != (pairs[0][0].dtype, pairs[0][1].dtype, pairs[0][0].shape[1:]):
            raise misshapen(foreign, a, f"[rank, {pairs[0][0].shape[1]}] in {pairs[0][0].dtype}")
    first, *others = pairs
    rank, num_outputs = sum(a.shape[0] for a, _ in pairs), sum(b.shape[0] for _, b in pairs)
    return pair(
        name,
        Piece(
            name="", source=first[0], others=tuple(a for a, _ in others), shape=(rank, first[0].shape[1]), make=_stacked
        ),
        Piece(
            name="",
            source=first[1],
            others=tuple(b for _, b in others),
            shape=(num_outputs, rank),
            make=torch.block_diag,
        ),
    )


def _stacked(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors)


def _name(foreign: Foreign, base: KnownBase, module: str, a: TensorSpec) -> str:
    """Return what the base calls a module."""
    if module != _HEAD:
        return module
    if not any(name == "lm_head.weight" or name.endswith(".lm_head.weight") for name in base.names):
        raise UnsupportedError(
            f"{foreign.place}: tensor {a.name}: this base has no head beside its embedding: the training was of the "
            "head alone, Tinker's own export changes both, and nothing says which is meant. Name the two tensors "
            f"{PREFIX}lm_head.lora_A.weight and lora_B.weight for the head alone, as it was trained; or "
            "merge with build_hf_model of tinker_cookbook.weights for both"
        )
    return "lm_head"


def _experts(
    foreign: Foreign, base: KnownBase, stack: re.Match[str], a: TensorSpec, b: TensorSpec
) -> dict[str, tuple[Piece, Piece]]:
    """Return the pieces of a stack of experts, one pair for each, by PEFT's names of modules."""
    start, end = f"{stack[1]}.", f".{_EXPERTS[stack[2]]}"
    num_experts = base.num_experts(start, f"{end}.weight")
    if not num_experts:
        raise UnsupportedError(
            f"{foreign.place}: tensor {a.name}: it is of a stack of experts, and the files of this base hold no "
            f"single ones called {start}0{end}.weight; name a base whose files hold them one by one, as its maker "
            f"published it, or merge with build_hf_model of tinker_cookbook.weights"
        )
    for spec, own, other in ((a, "rank, inputs", b), (b, "outputs, rank", a)):
        shared = len(spec.shape) == 3 and spec.shape[0] == 1 and other.shape[:1] == (num_experts,)
        if len(spec.shape) != 3 or not (spec.shape[0] == num_experts or shared):
            raise misshapen(foreign, spec, f"[{num_experts}, {own}]")
    if a.shape[1] != b.shape[2]:
        raise misshapen(foreign, b, f"[{b.shape[0]}, {b.shape[1]}, {a.shape[1]}]")
    modules = [f"{start}{number}{end}" for number in range(num_experts)]
    return {
        module: pair(module, row_of(a, min(number, a.shape[0] - 1)), row_of(b, min(number, b.shape[0] - 1)))
        for number, module in enumerate(modules)
    }
