"""Adapters of torchtune in its own layout: `adapter_model.pt`, or `adapter_0.pt` of its versions before 0.4.

Layout: `_FROM_HF`, `_TO_PEFT_KEYS` and `tune_to_hf` of torchtune/models/convert_weights.py, and the tables of
torchtune/models/*/_convert_weights.py, torchtune 0.6. For the architectures that it loads with `hf_to_tune`, it has the
rows of queries and keys in another order: those of a head alternate between its two halves. What has an element or a
row for each of them follows: the factor B, and DoRA's magnitude, which torchtune's own export to PEFT leaves as it is.
"""

import re
from collections.abc import Callable, Mapping
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
    whole,
)
from workers.files.layout import TensorSpec
from workers.sources.fetch import Source

WORDS = "an adapter of torchtune"
_ENDS = {".lora_a.weight": "a", ".lora_b.weight": "b", ".magnitude": "magnitude", ".magnitude.weight": "magnitude"}
_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""What says how many heads the rows of a module belong to."""
_ALTERNATE = frozenset({"gemma", "gemma2", "llama", "mistral"})
_SAME_ORDER = frozenset({"qwen2", "qwen3"})
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_CONSUMED = frozenset({"r", "lora_alpha", "target_modules", "peft_type", "use_dora"})
_SAYS_NOTHING = frozenset({"base_model_name_or_path", "lora_dropout", "task_type", "inference_mode"})


def recognizes(config: Mapping[str, Any], names: frozenset[str]) -> bool:
    """Whether an adapter is one of torchtune, by its names."""
    del config
    return any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names)


def convert(foreign: Foreign, base: KnownBase) -> Converted:
    """Give torchtune's own tensors the layout of PEFT; raises as `convert_adapter`."""
    agreed = {
        name for name, value in (("bias", "none"), ("init_lora_weights", True)) if foreign.config.get(name) == value
    }
    check_fields(foreign, _CONSUMED | _SAYS_NOTHING | agreed, WORDS)
    if foreign.config.get("peft_type") != "LORA":
        found = show(foreign.config.get("peft_type"))
        raise UnsupportedError(f"{foreign.file}: field peft_type: expected LORA for {WORDS}, found {found}")
    if base.model_type not in _ALTERNATE | _SAME_ORDER:
        raise UnsupportedError(
            f"{foreign.file}: this is {WORDS} for a base of model_type {base.model_type}, for which its own layout is "
            "not converted; have torchtune write the merged model, with save_adapter_weights_only: False"
        )
    rank = rank_in(foreign, "r", foreign.config.get("r"))
    alpha = number_in(foreign, "lora_alpha", foreign.config.get("lora_alpha"))
    sorted_out = by_module(foreign, _ENDS, WORDS)
    use_dora = any("magnitude" in parts for parts in sorted_out.values())
    pieces: list[Piece] = []
    modules = []
    for stored, parts in sorted_out.items():
        a, b = halves(foreign, stored, parts)
        if len(a.shape) != 2 or a.shape[0] != rank:
            raise misshapen(foreign, a, f"[{rank}, inputs]")
        if len(b.shape) != 2 or b.shape[1] != rank:
            raise misshapen(foreign, b, f"[outputs, {rank}]")
        module = _name(foreign, stored, a)
        modules.append(module)
        order = _order(base, module)
        pieces += pair(module, whole(a), _rows(foreign, b, order))
        if use_dora:
            pieces.append(_magnitude(foreign, module, parts, b, order))
    _check_targets(foreign, modules, use_dora=use_dora)
    return Converted(
        words=WORDS, config=lora_config(foreign, modules, rank, alpha, use_dora=use_dora), pieces=tuple(pieces)
    )


def check_export(adapter: Source, base: Callable[[], KnownBase]) -> None:
    """Check that torchtune's export of an adapter has the rows that its base has.

    `tune_to_peft_adapter_weights` of torchtune 0.6 reorders queries and keys for every base, also for those that
    torchtune has loaded as they are (`qwen2_hf_to_tune`, `qwen3_hf_to_tune`).

    Args:
        adapter: gathered, where a copy in torchtune's own layout was beside it.
        base: asked where that copy has rows in another order.

    Raises:
        UnsupportedError: they are rows of another order than the base's.
    """
    if adapter.reordered and (model_type := base().model_type) in _SAME_ORDER:
        raise UnsupportedError(
            f"adapter {adapter.location}: torchtune's export has rows of queries and keys in the order of Llama "
            f"(beside it, {adapter.reordered[0]} has another one), and for a base of model_type {model_type} torchtune "
            "trains with the base's own: as it is exported, the adapter is another one. Remove the export "
            "(adapter_model.safetensors or .bin), so that torchtune's own file is read, which is right"
        )


def _name(foreign: Foreign, stored: str, spec: TensorSpec) -> str:
    """Return what transformers calls a module."""
    if stored == "output":
        return "lm_head"
    layer = _LAYER.fullmatch(stored)
    if layer is None or layer[2] not in _MODULES:
        raise UnsupportedError(
            f"{foreign.place}: tensor {spec.name}: module {stored} is none that is known of {WORDS}: expected "
            f"output, or layers.N. and one of {', '.join(_MODULES)}"
        )
    return f"model.layers.{layer[1]}.{_MODULES[layer[2]]}"


def _order(base: KnownBase, module: str) -> tuple[int, int] | None:
    """Return number and size of the heads whose rows alternate, or None where rows stand as they should."""
    field = _HEADS.get(module.rpartition(".")[2])
    if field is None or base.model_type in _SAME_ORDER:
        return None
    num_query_heads = base.number("num_attention_heads")
    given = base.config.get("head_dim")
    size = base.number("hidden_size") // num_query_heads if given is None else base.number("head_dim")
    return (base.number(field) if base.config.get(field) is not None else num_query_heads), size


def _rows(foreign: Foreign, spec: TensorSpec, order: tuple[int, int] | None) -> Piece:
    """Return a tensor with its rows in the order that transformers has them."""
    if order is None:
        return whole(spec)
    num_heads, size = order
    if spec.shape[0] != num_heads * size or size % 2:
        raise misshapen(foreign, spec, f"{[num_heads * size, *spec.shape[1:]]} for {num_heads} heads of {size}")
    return Piece(name="", source=spec, shape=spec.shape, make=_apart(num_heads, size))


def _apart(num_heads: int, size: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.view(num_heads, size // 2, 2, *tensor.shape[1:])
        return heads.transpose(1, 2).reshape(tensor.shape)

    return make


def _magnitude(
    foreign: Foreign, module: str, parts: Mapping[str, TensorSpec], b: TensorSpec, order: tuple[int, int] | None
) -> Piece:
    spec = parts.get("magnitude")
    if spec is None:
        raise BadInputError(
            f"{foreign.place}: module {module}: expected a magnitude, as the other modules have, found none; the "
            "adapter is incomplete"
        )
    if spec.shape != b.shape[:1]:
        raise misshapen(foreign, spec, f"[{b.shape[0]}]")
    made = _rows(foreign, spec, order)
    return Piece(name=f"{PREFIX}{module}.lora_magnitude_vector", source=spec, shape=spec.shape, make=made.make)


def _check_targets(foreign: Foreign, modules: list[str], *, use_dora: bool) -> None:
    """Check that the configuration, which torchtune writes without a word on DoRA, is the adapter's own."""
    if foreign.config.get("use_dora", use_dora) != use_dora:
        raise BadInputError(
            f"{foreign.file}: field use_dora = {show(foreign.config['use_dora'])}, and the adapter has "
            f"{'magnitudes' if use_dora else 'no magnitude'}; the configuration is not the adapter's own"
        )
    targets = foreign.config.get("target_modules")
    own = {stored.rpartition(".")[2]: name.rpartition(".")[2] for stored, name in _MODULES.items()} | {
        "output": "lm_head"
    }
    expected = {module.rpartition(".")[2] for module in modules}
    if not isinstance(targets, list) or {own.get(str(each), each) for each in targets} != expected:
        raise BadInputError(
            f"{foreign.file}: field target_modules: expected a list of {', '.join(sorted(expected))}, as the "
            f"tensors are, found {targets if isinstance(targets, list) else show(targets)}; the "
            "configuration is not the adapter's own, or the adapter is incomplete"
        )
