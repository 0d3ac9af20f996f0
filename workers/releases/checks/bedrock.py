"""What custom model import of Amazon Bedrock takes: architectures, files, lengths."""

from collections.abc import Iterator

from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import Engine, Finding, Rule, Severity, finding
from workers.sources.belongings import TOKENIZER_CONFIG, is_vocabulary

_GUIDE = "Amazon Bedrock user guide, Use Custom model import"
ARCHITECTURE = Rule(
    id="bedrock.architecture",
    what="an architecture that is not imported",
    severity=Severity.NOTE,
    refused_by=(Engine.BEDROCK,),
    advice="deploy it elsewhere, or merge into a base of a family that is imported",
    source=f"{_GUIDE} (Supported architectures)",
)
FILES = Rule(
    id="bedrock.files",
    what="a file that every import needs is not there",
    severity=Severity.NOTE,
    refused_by=(Engine.BEDROCK,),
    advice="save the tokenizer beside the model",
    source=f"{_GUIDE} (Import a model source from Amazon S3)",
)
TOKENIZER = Rule(
    id="bedrock.tokenizer",
    what="a class of tokenizers that is not imported",
    severity=Severity.NOTE,
    refused_by=(Engine.BEDROCK,),
    advice="write PreTrainedTokenizerFast as tokenizer_class, beside tokenizer.json",
    source=f"{_GUIDE} (Supported tokenizers)",
)
SIZE = Rule(
    id="bedrock.size",
    what="more weights than are imported",
    severity=Severity.NOTE,
    refused_by=(Engine.BEDROCK,),
    advice="deploy it elsewhere",
    source=f"{_GUIDE} (less than 200GB for text models, 100GB for multimodal models)",
)
RULES = (ARCHITECTURE, FILES, TOKENIZER, SIZE)

_IMPORTED = frozenset(
    {
        "MistralForCausalLM",
        "MixtralForCausalLM",
        "T5ForConditionalGeneration",
        "LlamaForCausalLM",
        "MllamaForConditionalGeneration",
        "GPTBigCodeForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3ForCausalLM",
        "Qwen3MoeForCausalLM",
        "GptOssForCausalLM",
    }
)
"""Classes of the families that the guide names."""
_TOKENIZERS = frozenset(
    f"{name}{kind}"
    for name in ("T5Tokenizer", "LlamaTokenizer", "CodeLlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")
    for kind in ("", "Fast")
) | {"PreTrainedTokenizer", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "TokenizersBackend"}
"""Classes that the guide names, and one that has a rule of its own."""
_GB = 10**9
_MOST_OF_TEXT, _MOST_OF_OTHERS = 200 * _GB, 100 * _GB


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what would end an import."""
    if CONFIG not in checkpoint.documents:
        return
    names = checkpoint.config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if isinstance(name, str) and name not in _IMPORTED:
        yield finding(ARCHITECTURE, CONFIG, "architectures", found=name, expected="one that the guide names")
    if any(is_vocabulary(each) for each in checkpoint.files) and TOKENIZER_CONFIG not in checkpoint.files:
        yield finding(FILES, TOKENIZER_CONFIG, found="nothing", expected="it")
    kind = checkpoint.documents.get(TOKENIZER_CONFIG, {}).get("tokenizer_class")
    if isinstance(kind, str) and kind not in _TOKENIZERS:
        yield finding(TOKENIZER, TOKENIZER_CONFIG, "tokenizer_class", found=kind, expected="one that the guide names")
    num_bytes = sum(shard.num_bytes for shard in checkpoint.loaded.values())
    most = _MOST_OF_OTHERS if "vision_config" in checkpoint.config else _MOST_OF_TEXT
    if num_bytes >= most:
        yield finding(SIZE, CONFIG, found=f"{num_bytes / _GB:.0f} GB", expected=f"less than {most // _GB} GB")
