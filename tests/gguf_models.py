"""Tiny bases of every architecture that is written as GGUF, and tokenizers of every kind that goes with them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer
from tokenizers import decoders as decoding
from tokenizers import normalizers as normalizing
from tokenizers import pre_tokenizers as splitting
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from tests.models import CHAT_TEMPLATE, build_tokenizer
from workers.bases.model import quiet_transformers

_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_WIDE = {"head_dim": 128}
"""What transformers takes Qwen3's heads to be, whatever a GGUF file says."""
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: Mapping[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **more: LlamaConfig(**_SHAPE | more),
    "llama with biases": lambda **more: LlamaConfig(**_SHAPE | {"attention_bias": True} | more),
    "llama 3.1": lambda **more: LlamaConfig(**_SHAPE | {"rope_parameters": _LLAMA3} | more),
    "mistral": lambda **more: MistralConfig(**_SHAPE | {"sliding_window": None, "head_dim": 32} | more),
    "qwen2": lambda **more: Qwen2Config(**_SHAPE | {"tie_word_embeddings": True} | more),
    "qwen3": lambda **more: Qwen3Config(**_SHAPE | _WIDE | more),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **_SHAPE
        | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
        | {"norm_topk_prob": True}
        | more
    ),
}
"""By what a test calls them."""
_SENTENCES = (
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "Question: What is two times two? Answer: four. It's 12345 + 678 = 13023, isn't it?",
    "def add(a, b):\n    return a + b\n",
    "Once upon a time, in a village by the sea, there lived a baker.",
    "Über Größe läßt sich streiten; naïve café, 北京 and москва.",
)
TEXTS = (
    *_SENTENCES,
    "",
    " ",
    "  two  spaces   and\ttabs\n\n\nlines \r\n end ",
    "I'LL don't 'S we'Ve 3.14159 1000000 x1y22z333 e-mail@host.org",
    "<|begin|>special<|end|> tokens<|end|>",
    "日本語のテキスト, עברית, العربية, 🙂👩‍👩‍👧 emoji",
    "A\u200bzero\u200bwidth NBSP é combining",
)
"""What a tokenizer is asked."""


def build(kind: str, directory: Path, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **config: Any) -> Path:
    """Save a random base with a tokenizer.

    Args:
        kind: a key of `CONFIGS`.
        directory: becomes the base.
        dtype: of the weights.
        seed: of the weights.
        config: fields to change.
    """
    torch.manual_seed(seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(CONFIGS[kind](**config), dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
    with quiet_transformers():
        model.save_pretrained(directory)
    return build_tokenizer(directory)


def split_by(pre: str) -> splitting.PreTokenizer:
    """Return how a tokenizer splits text that llama.cpp calls by a name."""
    if pre == "gpt-2":
        return splitting.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return splitting.Sequence(
            [splitting.Digits(individual_digits=True), splitting.ByteLevel(add_prefix_space=False)]
        )
    pattern = Regex(GGUF_PRE_TOKENIZER_SPLITS[pre])
    return splitting.Sequence(
        [splitting.Split(pattern, "isolated"), splitting.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def byte_level(directory: Path, pre: str, *, ignore_merges: bool = False, adds: bool = False) -> Path:
    """Save a byte-level tokenizer that splits text as one of llama.cpp's names says.

    Args:
        directory: gets it.
        pre: the name.
        ignore_merges: whether a whole token goes before what merges make.
        adds: whether a text begins with a token of its own.
    """
    tokenizer = Tokenizer(BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split_by(pre)
    tokenizer.decoder = decoding.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=480,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=splitting.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 3, trainer)
    if adds:
        tokenizer.post_processor = TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return _save(tokenizer, directory)


def pieces(directory: Path, *, scheme: str = "first", legacy: bool = False) -> Path:
    """Save a tokenizer as transformers makes of a sentencepiece model: BPE over characters, with bytes for the rest.

    Args:
        directory: gets it.
        scheme: where a space is put in front.
        legacy: whether a normalizer does that, as in files before Metaspace did.
    """
    specials = ["<unk>", "<|begin|>", "<|end|>"]
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizing.Sequence([normalizing.Prepend("▁"), normalizing.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = splitting.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    plain = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    plain.pre_tokenizer = splitting.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    of_bytes = (f"<0x{byte:02X}>" for byte in range(256))
    trainer = BpeTrainer(vocab_size=460, special_tokens=[*specials, *of_bytes], show_progress=False)
    plain.train_from_iterator(_SENTENCES * 3, trainer)
    document = json.loads(tokenizer.to_str())
    trained = json.loads(plain.to_str())
    document["model"] |= {"vocab": trained["model"]["vocab"], "merges": trained["model"]["merges"]}
    document["added_tokens"] = [each for each in trained["added_tokens"] if each["content"] in specials]
    document["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return _save(Tokenizer.from_str(json.dumps(document)), directory, unk_token="<unk>")


def _save(tokenizer: Tokenizer, directory: Path, **roles: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>", **roles
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory
