"""GGUF files, where a checkpoint has its weights in nothing else: whole, and of one model with `config.json`."""

from collections.abc import Iterator

from workers.bases.gguf_files.reading import disagreements, end_of, lacking
from workers.files.gguf_front import GgufFront
from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import EVERY, TRANSFORMERS, Engine, Finding, Rule, Severity, finding, several

_READER = "gguf 0.19 gguf_reader.py GGUFReader._build_tensors"
ALONE = Rule(
    id="gguf.alone",
    what="the weights are in a GGUF file",
    severity=Severity.NOTE,
    refused_by=(Engine.BEDROCK,),
    advice="name the file: gguf_file=... in from_pretrained, its path for llama.cpp; for others release in 16 bits",
    source="transformers 5.23 modeling_utils.py _get_resolved_checkpoint_files (gguf_file); Amazon Bedrock user guide, "
    "Use Custom model import",
)
TRUNCATED = Rule(
    id="gguf.truncated",
    what="the file ends before its tensors do",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="fetch or write it again",
    source=f"{_READER}; llama.cpp src/llama-model-loader.cpp (tensor data is not within the file bounds)",
)
UNKNOWN_TYPE = Rule(
    id="gguf.unknown-type",
    what="a tensor of a type that is not known, or that does not fit its shape",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="write the file anew; types are those of ggml",
    source="gguf 0.19 constants.py GGML_QUANT_SIZES",
)
MISSING = Rule(
    id="gguf.missing",
    what="tensors of the model are missing",
    severity=Severity.ERROR,
    refused_by=(Engine.LLAMA_CPP,),
    misread_by=TRANSFORMERS,
    advice="write the file anew; transformers fills what is missing with random values",
    source="llama.cpp src/llama-model-loader.cpp (missing tensor); transformers 5.23 modeling_gguf_pytorch_utils.py "
    "load_gguf_checkpoint",
)
DISAGREES = Rule(
    id="gguf.disagrees",
    what="the metadata does not fit the tensors",
    severity=Severity.ERROR,
    refused_by=(Engine.LLAMA_CPP,),
    misread_by=TRANSFORMERS,
    advice="write the file anew: its metadata is from another model",
    source="gguf 0.19 constants.py Keys; llama.cpp src/llama-model-loader.cpp check_tensor_dims",
)
NOT_THE_CONFIG = Rule(
    id="gguf.not-the-config",
    what="config.json describes another model than the file",
    severity=Severity.ERROR,
    misread_by=TRANSFORMERS,
    advice="bring config.json and the file of one release",
    source="transformers 5.23 integrations/ggml.py GGUF_CONFIG_MAPPING",
)
RULES = (ALONE, TRUNCATED, UNKNOWN_TYPE, MISSING, DISAGREES, NOT_THE_CONFIG)

_SAID = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "vocab_size": "vocab_size",
}
"""What a file and `config.json` both say."""


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what is wrong with the GGUF files of a checkpoint that has its weights in them alone."""
    for name, front in checkpoint.gguf.items():
        yield finding(ALONE, name, found="it, and no safetensors", expected="an engine that is told its name")
        cut = [entry.name for entry in front.tensors if (end_of(entry, front) or 0) > front.num_file_bytes]
        if cut:
            found = f"{front.num_file_bytes} bytes, and {several(cut)} beyond"
            yield finding(TRUNCATED, name, found=found, expected="all bytes of its tensors")
        if odd := [entry.name for entry in front.tensors if end_of(entry, front) is None]:
            yield finding(UNKNOWN_TYPE, name, several(odd), found="another", expected="a type of ggml, in whole blocks")
        if missing := lacking(front):
            yield finding(MISSING, name, missing[0], found=f"{several(missing)} nowhere", expected="values")
        for field, said, there in disagreements(front):
            yield finding(DISAGREES, name, field, found=said, expected=there)
        yield from _against_config(checkpoint, name, front)


def _against_config(checkpoint: Checkpoint, name: str, front: GgufFront) -> Iterator[Finding]:
    architecture = front.fields.get("general.architecture")
    for field, key in _SAID.items():
        said, wanted = front.fields.get(f"{architecture}.{field}"), checkpoint.text_config.get(key)
        if type(said) is int and type(wanted) is int and said != wanted:
            yield finding(NOT_THE_CONFIG, CONFIG, key, found=str(wanted), expected=f"{said}, as {name} says")
