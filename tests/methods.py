"""Adapters of every PEFT method, as after training: each parameter that would be trained is random.

The table is held against the installed PEFT by `tests/unit/workers/adapters/test_methods.py`.
"""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from tests.merges import load_dequantized, read_tensors
from tests.models import load_plain
from workers.parity.inference import quiet_libraries

_LINEARS = {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]}

METHODS: dict[str, dict[str, Any]] = {
    "ADALORA": _LINEARS | {"init_r": 6, "target_r": 4, "total_step": 100},
    "ADAMSS": _LINEARS | {"r": 8, "num_subspaces": 2},
    "BEFT": {"target_modules": ["q_proj", "v_proj"]},
    "BOFT": _LINEARS | {"boft_block_size": 4},
    "C3A": _LINEARS | {"block_size": 16},
    "DEFT": _LINEARS | {"r": 4},
    "DELORA": _LINEARS | {"r": 4},
    "FOURIERFT": _LINEARS | {"n_frequency": 50},
    "FROD": _LINEARS | {"progressbar": False},
    "GLORA": _LINEARS | {"r": 4},
    "GRALORA": _LINEARS | {"r": 8},
    "HIRA": _LINEARS | {"r": 4},
    "HRA": _LINEARS | {"r": 4},
    "IA3": _LINEARS | {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": _LINEARS | {"r": 4},
    "LOKR": _LINEARS | {"r": 4},
    "LORA": _LINEARS | {"r": 4},
    "MISS": _LINEARS | {"r": 4},
    "OFT": _LINEARS | {"r": 0, "oft_block_size": 8},
    "OSF": _LINEARS,
    "PEANUT": _LINEARS | {"r": 4},
    "PSOFT": _LINEARS | {"r": 4},
    "PVERA": _LINEARS | {"r": 4},
    "RANDLORA": _LINEARS | {"r": 4},
    "ROAD": _LINEARS | {"group_size": 8},
    "SHIRA": _LINEARS | {"r": 4},
    "SUPERTUNING": _LINEARS,
    "TINYLORA": _LINEARS | {"r": 2, "u": 8},
    "TRAINABLE_TOKENS": {"token_indices": [1, 5, 9], "target_modules": ["embed_tokens"]},
    "UNILORA": _LINEARS | {"r": 4},
    "VBLORA": _LINEARS | {"r": 2, "num_vectors": 16, "vector_length": 16, "topk": 2},
    "VERA": _LINEARS | {"r": 8},
    "WAVEFT": _LINEARS | {"n_frequency": 50},
    # Those that cannot be merged, to see that they are refused.
    "LILY": _LINEARS | {"r": 4},
    "POLY": _LINEARS | {"r": 4, "n_tasks": 1, "n_skills": 2},
    "SHADOW": _LINEARS | {"r": 4},
}
"""For a Llama with separate head; BEFT needs a base with biases, such as Qwen2."""


def make_method_adapter(
    base: Path,
    directory: Path,
    method: str,
    *,
    std: float = 0.02,
    seed: int = 1,
    quantization: BitsAndBytesConfig | None = None,
    **fields: Any,
) -> Path:
    """Make an adapter of any method for a base through PEFT.

    Args:
        base: the base it is made on.
        directory: becomes the adapter.
        method: PEFT's name of it.
        std: standard deviation of what is added to every parameter that training would change.
        seed: of these numbers.
        quantization: for an adapter of the base through 4 bits and back, which some methods decompose.
        fields: of the method's configuration, beyond the table's.
    """
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)](**{"task_type": "CAUSAL_LM"} | METHODS[method] | fields)
    torch.manual_seed(seed)
    with quiet_libraries():
        peft_model = get_peft_model(load_dequantized(base, quantization) if quantization else load_plain(base), config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape), alpha=std)
        peft_model.save_pretrained(directory)
    return directory


def save_old_adapter(
    base: Path,
    directory: Path,
    *,
    target_modules: Sequence[str],
    left_out: Collection[str] = (),
    std: float = 0.2,
    seed: int = 1,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """Save LoRA as training under transformers 4 saves it, where all linears, those of experts too, have stored names.

    Args:
        base: the base it is for.
        directory: becomes the adapter.
        target_modules: last parts of the names of linears.
        left_out: weights without an adapter.
        std: standard deviation of lora_A and lora_B.
        seed: of these.
        config: of `LoraConfig`; the keys of patterns are ends of names.

    Returns:
        W + scaling * B @ A in float64 of each trained weight, by its name in the base's files.
    """
    generator = torch.Generator().manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}} | config
    expected, tensors = {}, {}
    for name, weight in read_tensors(base).items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module.rpartition(".")[2] not in target_modules or name in left_out:
            continue
        rank, alpha = (
            next((value for end, value in config[pattern].items() if module.endswith(end)), config[default])
            for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        a_RI = torch.randn(rank, weight.shape[1], generator=generator) * std
        b_OR = torch.randn(weight.shape[0], rank, generator=generator) * std
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        expected[name] = weight.double() + scaling * (b_OR.double() @ a_RI.double())
        tensors |= {f"base_model.model.{module}.lora_A.weight": a_RI, f"base_model.model.{module}.lora_B.weight": b_OR}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": list(target_modules)} | config
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return expected
