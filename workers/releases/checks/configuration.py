"""The configuration of a checkpoint: what engines need of it, and forms that only some of them read."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import transformers
from transformers import CONFIG_MAPPING

from jobs.errors import BadInputError, MergefleetError
from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import (
    SERVERS,
    TRANSFORMERS,
    Engine,
    Finding,
    Rule,
    Severity,
    finding,
    several,
)
from workers.sources.belongings import documents
from workers.sources.code_files import code_of
from workers.sources.listing import LocalFiles

_AUTO = "transformers 5.23 models/auto/configuration_auto.py AutoConfig.from_pretrained"
_LLAMA = "llama.cpp conversion/base.py ModelBase.from_model_architecture"
NO_MODEL_TYPE = Rule(
    id="config.no-model-type",
    what="no model_type",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    advice="write the model_type of the base",
    source=f"{_AUTO} (Should have a `model_type` key)",
)
UNKNOWN_MODEL_TYPE = Rule(
    id="config.unknown-model-type",
    what="a model_type that transformers does not know, without code for it",
    severity=Severity.ERROR,
    refused_by=TRANSFORMERS,
    advice="correct it, or name the model's own code in auto_map and ship it",
    source=f"{_AUTO} (Transformers does not recognize this architecture)",
)
NO_ARCHITECTURES = Rule(
    id="config.no-architectures",
    what="no architectures",
    severity=Severity.WARNING,
    refused_by=(*SERVERS, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="write the class of the base, such as LlamaForCausalLM, in a list",
    source=f"vLLM vllm/model_executor/models/utils.py init_vllm_registered_model (resolve_model_cls); {_LLAMA}",
)
UNKNOWN_ARCHITECTURE = Rule(
    id="config.unknown-architecture",
    what="architectures name a class that transformers does not have",
    severity=Severity.WARNING,
    refused_by=(*SERVERS, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="write the class of the base: one of PEFT or of a trainer is known to no engine",
    source=f"vLLM vllm/model_executor/models/utils.py init_vllm_registered_model (resolve_model_cls); {_LLAMA}",
)
UNBUILDABLE = Rule(
    id="config.unbuildable",
    what="transformers builds no model from it",
    severity=Severity.ERROR,
    refused_by=(Engine.TRANSFORMERS_5,),
    advice="take config.json of the base",
    source="transformers 5.23 models/auto/auto_factory.py _BaseAutoModelClass.from_config",
)
NO_CODE = Rule(
    id="config.no-code",
    what="code that auto_map names is not there",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    advice="ship the file, or take auto_map away where transformers knows the model by now",
    source="transformers 5.23 dynamic_module_utils.py get_cached_module_file",
)
LAYER_TYPES = Rule(
    id="config.layer-types",
    what="layer_types has not an entry for each layer",
    severity=Severity.ERROR,
    refused_by=(Engine.TRANSFORMERS_5, *SERVERS),
    advice="write as many entries as num_hidden_layers",
    source="transformers 5.23 configuration_utils.py PreTrainedConfig.validate_layer_type",
)
HEADS = Rule(
    id="config.heads",
    what="heads that do not divide",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS, Engine.LLAMA_CPP),
    advice="take the numbers of heads from the base's config.json",
    source="transformers 5.23 configuration_utils.py get_head_shapes (heads by key-value heads, width by heads)",
)
ROPE_TYPE = Rule(
    id="config.rope-type",
    what="rope_scaling without its type",
    severity=Severity.ERROR,
    refused_by=(Engine.TRANSFORMERS_4, *SERVERS),
    misread_by=(Engine.TRANSFORMERS_5, Engine.LLAMA_CPP),
    advice="write rope_type, such as linear, yarn or llama3: transformers 5 takes none for default, and does not scale",
    source="transformers 5.23 modeling_rope_utils.py RotaryEmbeddingConfigMixin.standardize_rope_params",
)
ROPE_DIFFER = Rule(
    id="config.rope-differ",
    what="rope_scaling and rope_parameters say different things",
    severity=Severity.WARNING,
    misread_by=TRANSFORMERS,
    advice="write the same into both: transformers 4 reads rope_scaling, transformers 5 rope_parameters first",
    source="transformers 5.23 modeling_rope_utils.py RotaryEmbeddingConfigMixin.convert_rope_params_to_dict; vLLM pull "
    "request 28542",
)
ROPE_NEW = Rule(
    id="config.rope-new",
    what="rope_parameters alone, as transformers 5 writes them",
    severity=Severity.NOTE,
    misread_by=(Engine.TRANSFORMERS_4, Engine.BEDROCK),
    advice="for engines on transformers 4, write rope_theta and rope_scaling, too: they take 10000 and no scaling else",
    source="vLLM pull request 28542 (rope_scaling is called rope_parameters in Transformers v5); DeepSpeed pull "
    "request 8345",
)
TOKEN_ID = Rule(
    id="config.token-id",
    what="the id of a special token is beyond the vocabulary",
    severity=Severity.ERROR,
    refused_by=(Engine.TRANSFORMERS_5, Engine.TRANSFORMERS_4),
    misread_by=SERVERS,
    advice="write the id that the tokenizer has, or take the field away",
    source="torch 2.13 nn/modules/sparse.py Embedding.__init__ (padding_idx must be within num_embeddings); "
    "transformers 5.23 configuration_utils.py PreTrainedConfig.validate_token_ids",
)
NO_VERSION = Rule(
    id="config.no-version",
    what="no transformers_version",
    severity=Severity.NOTE,
    advice="write the version that the checkpoint was saved with",
    source="transformers 5.23 configuration_utils.py PreTrainedConfig.to_dict",
)
RULES = (
    NO_MODEL_TYPE,
    UNKNOWN_MODEL_TYPE,
    NO_ARCHITECTURES,
    UNKNOWN_ARCHITECTURE,
    UNBUILDABLE,
    NO_CODE,
    LAYER_TYPES,
    HEADS,
    ROPE_TYPE,
    ROPE_DIFFER,
    ROPE_NEW,
    TOKEN_ID,
    NO_VERSION,
)

_RENAMED_ROPE = {"mrope": "default", "su": "longrope"}
"""What Qwen2-VL and Phi-3 called kinds of scaling in their first files, and what transformers makes of it."""


def find(checkpoint: Checkpoint, problem: MergefleetError | None) -> Iterator[Finding]:
    """Find what is wrong with the configuration of a checkpoint.

    Args:
        checkpoint: looked at.
        problem: why transformers builds no model of it; None where it does, or was not asked.
    """
    config, text = checkpoint.config, checkpoint.text_config
    if CONFIG not in checkpoint.documents:
        return
    found = [*_identity(config), *_sizes(config, text)]
    yield from found
    yield from _code(checkpoint)
    # Code that comes with a model is never run here, so that nothing is known of what it builds.
    if (
        problem is not None
        and not config.get("auto_map")
        and not any(each.severity == Severity.ERROR for each in found)
    ):
        told = str(problem).replace(f"{checkpoint.directory}/", "").replace(f"{checkpoint.directory}", "")
        yield finding(UNBUILDABLE, CONFIG, found=told[:400], expected="values of one model")
    yield from _rope(config, text)
    if not config.get("transformers_version"):
        yield finding(NO_VERSION, CONFIG, "transformers_version", found="nothing", expected="a version")


def _identity(config: Mapping[str, Any]) -> Iterator[Finding]:
    model_type, names, code = config.get("model_type"), config.get("architectures"), config.get("auto_map")
    if not isinstance(model_type, str) or not model_type:
        yield finding(NO_MODEL_TYPE, CONFIG, "model_type", found=repr(model_type), expected="the name of a family")
    elif model_type not in CONFIG_MAPPING and not code:
        yield finding(UNKNOWN_MODEL_TYPE, CONFIG, "model_type", found=repr(model_type), expected="a known one")
    if not isinstance(names, list) or not names:
        yield finding(NO_ARCHITECTURES, CONFIG, "architectures", found=repr(names), expected="a list with a class")
    elif not code and not any(isinstance(name, str) and hasattr(transformers, name) for name in names):
        yield finding(UNKNOWN_ARCHITECTURE, CONFIG, "architectures", found=repr(names[0]), expected="a known class")


def _sizes(config: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Finding]:
    for section in [config] if text is config else [config, text]:
        types, depth = section.get("layer_types"), section.get("num_hidden_layers")
        if isinstance(types, list) and isinstance(depth, int) and len(types) != depth:
            yield finding(LAYER_TYPES, CONFIG, "layer_types", found=f"{len(types)} entries", expected=f"{depth}")
        heads, pairs, width = (section.get(f) for f in ("num_attention_heads", "num_key_value_heads", "hidden_size"))
        if type(heads) is int and heads > 0:
            if type(pairs) is int and pairs > 0 and heads % pairs:
                expected = f"a divisor of {heads}, num_attention_heads"
                yield finding(HEADS, CONFIG, "num_key_value_heads", found=f"{pairs}", expected=expected)
            elif section is config and type(width) is int and width % heads and not _states_head_size(section):
                expected = f"a divisor of {width}, hidden_size"
                yield finding(HEADS, CONFIG, "num_attention_heads", found=f"{heads}", expected=expected)
        rows = section.get("vocab_size")
        padding = section.get("pad_token_id")
        if type(rows) is int and type(padding) is int and padding >= rows > 0:
            yield finding(TOKEN_ID, CONFIG, "pad_token_id", found=f"{padding}", expected=f"an id below {rows}")


def _states_head_size(section: Mapping[str, Any]) -> bool:
    return any(section.get(field) for field in ("head_dim", "kv_channels", "d_kv", "qk_nope_head_dim", "head_size"))


def _code(checkpoint: Checkpoint) -> Iterator[Finding]:
    files = LocalFiles(checkpoint.directory)
    try:
        found = {name: code_of({name: document}, files) for name, document in documents(files).items()}
    except BadInputError:
        return  # a file that cannot be read has a rule of its own
    for name, code in found.items():
        missing = sorted({each.missing for each in code.values() if each.missing})
        if missing:
            told = finding(NO_CODE, name, "auto_map", found=f"no {several(missing)}", expected="the file beside it")
            # Of a model that transformers has itself, the code is asked for by trust_remote_code alone.
            is_known = checkpoint.config.get("model_type") in CONFIG_MAPPING
            yield dataclasses.replace(told, severity=Severity.WARNING) if is_known else told


def _rope(config: Mapping[str, Any], text: Mapping[str, Any]) -> Iterator[Finding]:
    section = text if ("rope_parameters" in text or "rope_scaling" in text) else config
    new, old = section.get("rope_parameters"), section.get("rope_scaling")
    for field, value in (("rope_parameters", new), ("rope_scaling", old)):
        if isinstance(value, dict) and "factor" in value and not (value.get("rope_type") or value.get("type")):
            yield finding(ROPE_TYPE, CONFIG, field, found=", ".join(sorted(value))[:200], expected="rope_type, too")
            return
    if isinstance(new, dict) and isinstance(old, dict):
        both = new.keys() & old.keys() - {"type", "rope_type"}
        differ = sorted(field for field in both if new[field] != old[field])
        kinds = {_rope_kind(each) for each in (new, old)}
        if differ or (len(kinds) > 1 and both):
            expected = "the same in rope_parameters"
            yield finding(
                ROPE_DIFFER, CONFIG, "rope_scaling", found=", ".join(differ or sorted(kinds)), expected=expected
            )
    elif isinstance(new, dict) and new and section.get("rope_theta") is None:
        yield finding(ROPE_NEW, CONFIG, "rope_parameters", found="it alone", expected="rope_theta, too")


def _rope_kind(parameters: Mapping[str, Any]) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    return _RENAMED_ROPE.get(kind, kind)
