"""Tiny random models of the architectures that transformers knows, each as its own checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from workers.parity.inference import quiet_libraries

KINDS: Mapping[str, Mapping[str, Any]] = {
    "decoder": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "vision-language": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "encoder-decoder": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "encoder": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
"""transformers' own tables: class names by model type."""

MAX_PARAMETERS = 8_000_000
"""Of a model that still counts as tiny."""

_SMALL: dict[str, int] = (
    dict.fromkeys(["vocab_size", "decoder_vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"], 128)
    | dict.fromkeys(["hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "embed_dim"], 64)
    | dict.fromkeys(["out_hidden_size", "attention_hidden_size", "lru_width"], 64)
    | dict.fromkeys(["intermediate_size", "n_inner", "d_ff", "ffn_dim", "ffn_hidden_size", "d_inner"], 128)
    | dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], 128)
    | dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "depth"], 2)
    | dict.fromkeys(["encoder_layers", "decoder_layers"], 2)
    | dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"], 4)
    | dict.fromkeys(["decoder_attention_heads"], 4)
    | dict.fromkeys(["num_key_value_heads", "num_key_value_head", "multi_query_group_num"], 2)
    | dict.fromkeys(["head_dim", "global_head_dim", "d_kv", "kv_channels", "head_size", "v_head_dim"], 16)
    | dict.fromkeys(["max_position_embeddings", "n_positions"], 64)
    | dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4)
    | dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"], 2)
    | dict.fromkeys(["n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "moe_layer_freq"], 1)
    | dict.fromkeys(["decoder_sparse_step", "decoder_start_token_id", "bos_token_id"], 1)
    | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_nextn_predict_layers": 0}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "rotary_dim": 8}
    | {"state_size": 8, "ssm_state_size": 8, "mamba_d_state": 8, "expand": 2, "mamba_expand": 2, "time_step_rank": 4}
    | {"mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_d_head": 32, "mamba_head_dim": 32, "mamba_d_conv": 4}
    | {"mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 4, "chunk_size": 8, "block_size": 16, "sliding_window": 16}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"pad_token_id": 0, "eos_token_id": 2, "image_token_id": 3, "image_token_index": 3, "video_token_id": 4}
    | {"image_size": 28, "patch_size": 14, "num_channels": 3, "num_mel_bins": 16, "n_mels": 16}
    | {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
)
"""What dimensions are called in configurations, and how large they are here."""

_BY_LAYER = (
    "activation_sparsity_pattern",
    "block_types",
    "intermediate_size",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
)
"""Lists with an entry for each layer."""


def names(kind: str) -> list[str]:
    """Return the model types of one kind."""
    return sorted(KINDS[kind])


def build(kind: str, model_type: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Path:
    """Write a tiny random checkpoint of an architecture, through `save_pretrained`.

    Args:
        kind: a key of `KINDS`.
        model_type: one of `names(kind)`.
        directory: becomes the base; no tokenizer.
        dtype: of all weights.
        seed: of the weights.

    Raises:
        Exception: transformers cannot build it at this size, in whatever way its code fails.
    """
    model_class = class_of(kind, model_type)
    config = shrink(model_class.config_class())
    with torch.device("meta"), quiet_libraries():
        num_parameters = sum(parameter.numel() for parameter in model_class(config).parameters())
    if num_parameters > MAX_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters at the sizes that its configuration lets be set")
    torch.manual_seed(seed)
    with quiet_libraries():
        model = model_class(shrink(model_class.config_class())).to(dtype)
        for parameter in model.parameters():
            # Zeros and ones of an untrained model would hide what happens to them.
            parameter.data += torch.randn(parameter.shape, dtype=torch.float32).mul_(0.02).to(dtype)
        model.save_pretrained(directory)
        # Saved again as it is loaded: some architectures keep some weights in float32, and zero the row of the padding.
        model_class.from_pretrained(directory, dtype=dtype).save_pretrained(directory)
    return directory


def class_of(kind: str, model_type: str) -> type[PreTrainedModel]:
    """Return the class of transformers."""
    name = KINDS[kind][model_type]
    found: type[PreTrainedModel] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make every dimension that a configuration knows tiny, and those of the configurations inside it."""
    known = config.to_dict()
    for field, value in _SMALL.items():
        if field in known and (isinstance(getattr(config, field, None), int) or field == "pad_token_id"):
            setattr(config, field, value)
    for field in config.sub_configs or {}:
        inner = getattr(config, field, None)
        if isinstance(inner, PreTrainedConfig):
            shrink(inner)
    for field in _BY_LAYER:
        layers = getattr(config, field, None)
        if isinstance(layers, list) and len(layers) > _SMALL["num_hidden_layers"]:
            different = list(dict.fromkeys(layers))
            setattr(config, field, (different * 2)[: _SMALL["num_hidden_layers"]])
    return config
