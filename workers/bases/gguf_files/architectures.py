"""The architectures that releases are written as GGUF of: a table, one row for each class of transformers.

A row stands here once a file of it is proven: read back by transformers, it answers as the merged model does
(`tests/integration/test_gguf.py`). Names of tensors are no part of it: they are the `gguf` package's own. What
llama.cpp computes of a field is in its `src/models/`; what its converter writes, in its `conversion/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gguf.constants import MODEL_ARCH
from transformers import AutoConfig

from jobs.errors import UnsupportedError

ADVICE = "request output: 16bit, and run llama.cpp's own converter (convert_hf_to_gguf.py) on that release"
_SHAPE: Mapping[str, str] = {
    "add_block_count": "num_hidden_layers",
    "add_context_length": "max_position_embeddings",
    "add_embedding_length": "hidden_size",
    "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads",
    "add_head_count_kv": "num_key_value_heads",
    "add_layer_norm_rms_eps": "rms_norm_eps",
}
"""Fields of every decoder: methods of `gguf.GGUFWriter` by what they take of a configuration."""
_EXPERTS: Mapping[str, str] = {
    "add_expert_count": "num_experts",
    "add_expert_used_count": "num_experts_per_tok",
    "add_expert_feed_forward_length": "moe_intermediate_size",
}
_DENSE: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "attention_bias": (False, True, None),
}
_OF_A_CLASS = frozenset({"model_type", "architectures", "sliding_window", "transformers_version"})
"""What a configuration says of its class alone, once its conditions are met."""
_REQUIRED = (
    *("attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight"),
    *("ffn_norm.weight", "ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"),
)
_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How a class of transformers becomes an architecture of GGUF."""

    arch: MODEL_ARCH
    """What llama.cpp computes it as."""
    runs_as: str
    """The `model_type` that transformers loads such a file as."""
    is_permuted: bool = False
    """Whether rows of queries and keys are interleaved within each head: llama.cpp turns neighbouring elements, and
    transformers one half against the other."""
    has_llama3_rope: bool = False
    """Whether it takes factors of its rotary frequencies, as Llama 3.1 has them (`rope_freqs.weight`)."""
    fields: Mapping[str, str] = field(default_factory=lambda: _SHAPE)
    conditions: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: _DENSE)
    """What the configuration may say where llama.cpp computes one thing alone, by field; absent ones are None."""
    required: tuple[str, ...] = _REQUIRED
    """What each block has."""


_LLAMA = Architecture(arch=MODEL_ARCH.LLAMA, runs_as="llama", is_permuted=True, has_llama3_rope=True)
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "LlamaForCausalLM": _LLAMA,
        # Where no window slides, it is a Llama; llama.cpp has no other word for it.
        "MistralForCausalLM": _LLAMA,
        "Qwen2ForCausalLM": Architecture(
            arch=MODEL_ARCH.QWEN2,
            runs_as="qwen2",
            required=(*_REQUIRED, "attn_q.bias", "attn_k.bias", "attn_v.bias"),
        ),
        "Qwen3ForCausalLM": Architecture(
            arch=MODEL_ARCH.QWEN3,
            runs_as="qwen3",
            conditions={**_DENSE, "attention_bias": (False, None)},
            required=(*_REQUIRED, *_NORMS),
        ),
        "Qwen3MoeForCausalLM": Architecture(
            arch=MODEL_ARCH.QWEN3MOE,
            runs_as="qwen3_moe",
            fields={**_SHAPE, **_EXPERTS},
            conditions={
                **_DENSE,
                "attention_bias": (False, None),
                # src/models/qwen3moe.cpp: every block has experts, and their shares add up to one.
                "norm_topk_prob": (True,),
                "decoder_sparse_step": (1,),
                "mlp_only_layers": ([], None),
            },
            required=(
                *(name for name in _REQUIRED if not name.startswith(("ffn_gate", "ffn_up", "ffn_down"))),
                *_NORMS,
                *("ffn_gate_inp.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"),
            ),
        ),
    }
)


def architecture_of(place: Path, config: Any) -> Architecture:
    """Return the row of a model.

    Args:
        place: of its configuration, for messages.
        config: as transformers reads it.

    Raises:
        UnsupportedError: it has none, or computes what llama.cpp does not; says what to do.
    """
    name = next(iter(config.architectures or ()), "none")
    row = ARCHITECTURES.get(name)
    if row is None:
        raise UnsupportedError(
            f"{place}: expected one of the architectures that are written as GGUF ({', '.join(ARCHITECTURES)}), found "
            f"{name}; {ADVICE}"
        )
    for key, allowed in row.conditions.items():
        if (found := getattr(config, key, None)) not in allowed:
            words = " or ".join("nothing" if each is None else str(each) for each in allowed)
            raise UnsupportedError(
                f"{place}: {key}: expected {words} of a {name} that is written as GGUF, found {found}; {ADVICE}"
            )
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind != "default" and not (kind == "llama3" and row.has_llama3_rope):
        raise UnsupportedError(f"{place}: rope_type: expected default of a {name} as GGUF, found {kind}; {ADVICE}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedError(
            f"{place}: partial_rotary_factor: expected 1 of a {name} as GGUF, found {rope['partial_rotary_factor']}; "
            f"{ADVICE}"
        )
    return row


def fields_of(row: Architecture, config: Any, num_rows: int) -> tuple[tuple[str, int | float], ...]:
    """Return the hyperparameters of a file: methods of `gguf.GGUFWriter`, and what they take.

    Args:
        row: of the architecture.
        config: as transformers reads it.
        num_rows: of the embedding.
    """
    size = head_size(config)
    found: dict[str, int | float] = {method: getattr(config, key) for method, key in row.fields.items()}
    return tuple(
        {
            **found,
            "add_rope_freq_base": float(_rope(config)["rope_theta"]),
            "add_rope_dimension_count": size,
            "add_key_length": size,
            "add_value_length": size,
            "add_vocab_size": num_rows,
        }.items()
    )


def head_size(config: Any) -> int:
    """Return the width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def config_to_load(place: Path, config: Any) -> Any:
    """Return the configuration with which transformers loads the GGUF file of a model.

    Its reader knows architectures of GGUF, of which several classes may be one: then it is that one's, with the same
    numbers.

    Args:
        place: of the configuration, for messages.
        config: of the release.

    Raises:
        UnsupportedError: its architecture is none that is written.
    """
    row = architecture_of(place, config)
    if config.model_type == row.runs_as:
        return config
    said = {key: value for key, value in config.to_dict().items() if key not in _OF_A_CLASS}
    name = next(name for name, each in ARCHITECTURES.items() if each is row)
    return AutoConfig.for_model(row.runs_as, **said, architectures=[name])


def is_scaled_as_llama3(config: Any) -> bool:
    """Whether rotary frequencies are divided as Llama 3.1 has them."""
    return bool(_rope(config).get("rope_type") == "llama3")


def _rope(config: Any) -> Mapping[str, Any]:
    return config.rope_parameters or {}
