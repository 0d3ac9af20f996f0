"""Adapters of Tinker: `adapter_model.safetensors` nearly as PEFT saves it, rank and alpha in `adapter_config.json`.

Layout: `build_name_remaps` and `plan_expert_ops` of tinker_cookbook/weights/_merge_utils.py, `MergeProfile` and
`expand_expert_lora_tensors` of _merge.py there, August 2026. Names begin with `base_model.model.model.` whatever the
base is; `unembed_tokens` is its head. The experts of a layer are stacks [E, R, I] and [E, O, R], of which one may have
a single matrix that all of them share: `w1` is the gate, `w3` what is multiplied with it, `w2` what leads back. Deltas
are multiplied by alpha / r of the configuration, whatever rank a tensor has.
"""

import re
from collections.abc import Mapping
from typing import Any

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
    pair,
    positive,
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
    "qwen3_5": "projections that were trained apart are one in it",
    "qwen3_5_moe": "projections that were trained apart are one in it",
    "qwen3_5_text": "projections that were trained apart are one in it",
    "qwen3_5_moe_text": "projections that were trained apart are one in it",
}
"""Architectures whose adapters Tinker's own export takes apart or together in a way of their own."""
_EXPORT = "export it with build_lora_adapter of tinker_cookbook.weights, or merge it with build_hf_model of it"
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
            f"{foreign.path}: this is {WORDS} for a base of model_type {base.model_type}: {why}, and such adapters are "
            f"not converted; {_EXPORT}"
        )
    rank = rank_in(foreign, "r", foreign.config.get("r"))
    alpha = positive(foreign, "lora_alpha", foreign.config.get("lora_alpha"))
    pieces: list[Piece] = []
    ranks: dict[str, int] = {}
    empty = set()
    for stored, parts in by_module(foreign, _ENDS, WORDS).items():
        a, b = halves(foreign, stored, parts)
        module = stored.removeprefix(PREFIX)
        stack = _STACK.fullmatch(module)
        if stack is not None and not a.num_elements and not b.num_elements:
            empty |= {a.name, b.name}  # of a projection that the experts of this base do not have
        elif stack is not None:
            for each, made in _experts(foreign, base, stack, a, b).items():
                ranks[each] = a.shape[1]
                pieces += made
        else:
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
                raise misshapen(foreign, b, f"[outputs, {a.shape[0] if a.shape else 'rank'}]")
            name = _name(foreign, base, module, a)
            ranks[name] = a.shape[0]
            pieces += pair(name, whole(a), whole(b))
    if not pieces:
        raise BadInputError(f"{foreign.weights}: expected the factors of LoRA, found {show(sorted(foreign.tensors))}")
    return Converted(
        words=WORDS,
        config=lora_config(foreign, ranks, rank, alpha, ranks=ranks),
        pieces=tuple(pieces),
        empty=frozenset(empty),
    )


def _name(foreign: Foreign, base: KnownBase, module: str, a: TensorSpec) -> str:
    """Return what the base calls a module."""
    if module != _HEAD:
        return module
    if not any(name == "lm_head.weight" or name.endswith(".lm_head.weight") for name in base.names):
        raise UnsupportedError(
            f"{foreign.weights}: tensor {a.name}: this base has no head beside its embedding: the training was of the "
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
            f"{foreign.weights}: tensor {a.name}: it is of a stack of experts, and the files of this base hold no "
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
