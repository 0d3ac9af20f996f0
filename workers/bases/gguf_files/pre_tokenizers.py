"""How llama.cpp splits text before it merges bytes: `tokenizer.ggml.pre`, found by what `tokenizer.json` says.

llama.cpp has the patterns compiled in, each under names (`src/llama-vocab.cpp`, `llm_tokenizer_bpe`); its converter
finds the name by what a tokenizer makes of one text. Here it is the structure itself that is compared: a tokenizer
whose structure is in no row is refused, never guessed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
_SPLIT_BYTES = {**_BYTE_LEVEL, "use_regex": True}
_BYTES = {**_BYTE_LEVEL, "use_regex": False}
_OF_NO_EFFECT = ("trim_offsets",)
"""Of offsets in a text, not of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to split text."""

    pre: str
    steps: tuple[Mapping[str, Any], ...]
    """Of the pre-tokenizer, one after the other."""
    ignores_merges: bool = False
    """Whether a piece that is a token is that token, whatever merges make of it."""
    normalizers: tuple[str | None, ...] = (None,)
    """What the text may go through before; llama.cpp does none of it."""
    source: str
    """Where that is to be seen."""


def _split(pre: str) -> tuple[Mapping[str, Any], ...]:
    pattern = {"Regex": GGUF_PRE_TOKENIZER_SPLITS[pre]}
    return ({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}, _BYTES)


def rows() -> tuple[Row, ...]:
    """Return the table."""
    splits = "transformers 5.23 integrations/gguf/gguf_tokenizer_mapping.py GGUF_PRE_TOKENIZER_SPLITS"
    return (
        Row(
            pre="gpt-2",
            steps=(_SPLIT_BYTES,),
            source="llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_GPT2; tokenizers pre_tokenizers/byte_level.rs",
        ),
        Row(
            pre="smollm",
            steps=({"type": "Digits", "individual_digits": True}, _SPLIT_BYTES),
            source="llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_SMOLLM; conversion/base.py get_vocab_base_pre "
            "(HuggingFaceTB/SmolLM-135M)",
        ),
        Row(
            pre="llama-bpe",
            steps=_split("llama-bpe"),
            ignores_merges=True,
            source=f"llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_LLAMA3 (ignore_merges); {splits}",
        ),
        Row(
            pre="dbrx",
            steps=_split("dbrx"),
            source=f"llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_DBRX (same as llama3, by merges); {splits}",
        ),
        Row(
            pre="qwen2",
            steps=_split("qwen2"),
            # Qwen's own files say NFC, and llama.cpp leaves text as it is.
            normalizers=(None, "NFC"),
            source=f"llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_QWEN2; {splits}",
        ),
        Row(
            pre="tekken",
            steps=_split("tekken"),
            ignores_merges=True,
            source=f"llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_TEKKEN (ignore_merges); {splits}",
        ),
        Row(
            pre="gpt-4o",
            steps=_split("gpt-4o"),
            source=f"llama.cpp src/llama-vocab.cpp LLAMA_VOCAB_PRE_TYPE_GPT4O; {splits}",
        ),
    )


def pre_of(document: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of how a tokenizer splits text; None where it is none of the table.

    Args:
        document: `tokenizer.json`, its model byte-level BPE.
    """
    steps = tuple(_steps(document.get("pre_tokenizer")))
    normalizer = document.get("normalizer")
    kind = normalizer.get("type") if isinstance(normalizer, dict) else None
    ignores_merges = bool(document["model"].get("ignore_merges", False))
    for row in rows():
        if steps == row.steps and ignores_merges == row.ignores_merges and kind in row.normalizers:
            return row.pre
    return None


def _steps(found: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a pre-tokenizer, those of sequences in it one by one."""
    if not isinstance(found, dict):
        return
    if found.get("type") == "Sequence":
        for each in found.get("pretokenizers") or ():
            yield from _steps(each)
        return
    yield {key: value for key, value in found.items() if key not in _OF_NO_EFFECT}
