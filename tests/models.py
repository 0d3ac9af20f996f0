"""Pico models for the whole test suite: real architectures, real adapters, real tokenizers, a few hundred kilobytes.

Everything is made in code from a seed and saved by the libraries themselves; nothing is downloaded.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from workers.bases.model import load_config, model_class, quiet_transformers
from workers.parity.inference import quiet_libraries

VOCAB_SIZE = 512
LINEAR_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SENTENCES = (
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "Question: What is two times two? Answer: four.",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time, in a village by the sea, there lived a baker.",
    "The patient was admitted with a fever and a cough.",
)


def build_tokenizer(directory: Path) -> Path:
    """Save a byte-level BPE tokenizer with a chat template: it knows every text, with at most 400 tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def build_llama(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Save a random Llama: 2 blocks, 64 wide, grouped-query attention, separate head.

    Args:
        directory: becomes the base.
        seed: of the weights.
        dtype: of the weights.
        max_shard_size: as in `save_pretrained`; "100KB" gives several shards and an index.
        tokenizer: whether to save one with it.
        config: fields of `LlamaConfig` to change.
    """
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = _random_model(LlamaConfig(**shape | config), seed, dtype)
    return _save(model, directory, max_shard_size, tokenizer=tokenizer)


def build_qwen2(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Save a random Qwen2: 2 blocks, 64 wide, biases on q, k and v, embeddings tied to the head.

    Args:
        directory: becomes the base.
        seed: of the weights.
        dtype: of the weights.
        max_shard_size: as in `save_pretrained`; "100KB" gives several shards and an index.
        tokenizer: whether to save one with it.
        config: fields of `Qwen2Config` to change.
    """
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = _random_model(Qwen2Config(**shape | config), seed, dtype)
    return _save(model, directory, max_shard_size, tokenizer=tokenizer)


def build_bnb_4bit(
    base: Path,
    directory: Path,
    *,
    quant_type: str = "nf4",
    double_quant: bool = False,
    storage: str = "uint8",
    max_shard_size: str = "5GB",
) -> Path:
    """Save a base as a bitsandbytes 4-bit checkpoint, by transformers itself, with the base's tokenizer.

    Args:
        base: a 16-bit base.
        directory: becomes the 4-bit base.
        quant_type: nf4 or fp4.
        double_quant: whether the scales are quantized too.
        storage: dtype that the codes are packed in, as training by FSDP wants them.
        max_shard_size: as `save_pretrained` takes it.
    """
    with quiet_transformers():
        _load_4bit(base, quant_type, double_quant, storage=storage).save_pretrained(
            directory, max_shard_size=max_shard_size
        )
    return _copy_tokenizer(base, directory)


def merge_with_peft(
    base: Path,
    adapter: Path,
    directory: Path,
    *,
    quant_type: str | None = None,
    double_quant: bool = False,
    device: str = "cpu",
) -> Path:
    """Save the merge that people make by hand, the whole model in memory, with the base's tokenizer.

    Args:
        base: a base, in 16 bits or stored in bnb-4bit.
        adapter: made for it.
        directory: becomes the merged checkpoint.
        quant_type: nf4 or fp4: the base is loaded in 4-bit and dequantized first; None takes it as it is stored.
        double_quant: whether the scales are quantized too.
        device: where all of it is done.
    """
    with quiet_transformers():
        if quant_type is None:
            model = load_plain(base)
            model.to(torch.device(device))
        else:
            model = _load_4bit(base, quant_type, double_quant, device)
        if getattr(model, "is_quantized", False):
            model = model.dequantize()
            # transformers 5.23 cannot turn its reading of 4-bit weights around, and here there is nothing to turn.
            model._weight_conversions = []
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(directory)
    return _copy_tokenizer(base, directory)


def make_adapter(
    base: Path,
    directory: Path,
    *,
    rank: int = 8,
    targets: Sequence[str] | str = LINEAR_TARGETS,
    alpha: float = 16,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 1,
    quantized: bool = False,
    std: float = 0.05,
    trained: bool = False,
    **config: Any,
) -> Path:
    """Make a LoRA adapter for a base through PEFT, as after training: lora_B is not zero.

    Args:
        base: the base it is made on.
        directory: becomes the adapter.
        rank: of every delta that `rank_pattern` does not name.
        targets: names of linear modules, or a pattern, as in `LoraConfig`.
        alpha: scaling is alpha / rank, or alpha / sqrt(rank) with `rslora`.
        rslora: rank-stabilized scaling.
        rank_pattern: rank by module name pattern.
        alpha_pattern: alpha by module name pattern.
        seed: of lora_A and lora_B.
        quantized: whether the base is loaded in 4-bit first, as for QLoRA.
        std: standard deviation of lora_B.
        trained: whether every parameter that training would change is changed, not lora_B alone.
        config: further fields of `LoraConfig`.
    """
    torch.manual_seed(seed)
    lora_config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        task_type="CAUSAL_LM",
        **config,
    )
    with quiet_libraries():
        model = _load_4bit(base, "nf4", double_quant=False) if quantized else load_plain(base)
        peft_model = get_peft_model(model, lora_config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=std)
            elif trained and parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape), alpha=std)
        peft_model.save_pretrained(directory)
    return directory


def load_plain(directory: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a checkpoint as anybody would, by plain transformers, on the CPU."""
    with quiet_transformers():
        model = model_class(load_config(directory)).from_pretrained(directory, dtype=dtype, local_files_only=True)
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def _random_model(config: LlamaConfig | Qwen2Config, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=config.initializer_range)
    assert isinstance(model, PreTrainedModel)
    return model


def _save(model: PreTrainedModel, directory: Path, max_shard_size: str, *, tokenizer: bool) -> Path:
    with quiet_transformers():
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return build_tokenizer(directory) if tokenizer else directory


def _copy_tokenizer(base: Path, directory: Path) -> Path:
    for path in (*base.glob("tokenizer*"), *base.glob("*.jinja")):
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def _load_4bit(
    base: Path, quant_type: str, double_quant: bool, device: str = "cpu", storage: str = "uint8"
) -> PreTrainedModel:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype="auto", device_map=device, local_files_only=True
    )
    assert isinstance(model, PreTrainedModel)
    return model
