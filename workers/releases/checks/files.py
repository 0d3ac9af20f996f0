"""The files of a checkpoint: those that have to be there, and those that must not be."""

from collections.abc import Iterator

from workers.files.gguf_front import SUFFIX
from workers.files.layout import INDEX_FILE, SINGLE_FILE
from workers.releases.checks.checkpoint import ADAPTER_CONFIG, CONFIG, Checkpoint
from workers.releases.checks.rules import (
    EVERY,
    SERVERS,
    TRANSFORMERS,
    Engine,
    Finding,
    Rule,
    Severity,
    finding,
    several,
)
from workers.sources.belongings import is_pickled, matches

NO_CONFIG = Rule(
    id="files.no-config",
    what="no configuration",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="copy config.json of the base, or save the model with save_pretrained",
    source="transformers 5.23 models/auto/configuration_auto.py AutoConfig.from_pretrained; llama.cpp "
    "conversion/base.py ModelBase.load_hparams",
)
NO_WEIGHTS = Rule(
    id="files.no-weights",
    what="no weights",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="upload the safetensors files",
    source="transformers 5.23 modeling_utils.py _get_resolved_checkpoint_files; vLLM "
    "vllm/model_executor/model_loader/default_loader.py DefaultModelLoader._prepare_weights",
)
PICKLED = Rule(
    id="files.pickled",
    what="weights are pickled only",
    severity=Severity.WARNING,
    refused_by=(Engine.BEDROCK,),
    advice="save the model with save_pretrained of transformers 5, which writes safetensors",
    source="Amazon Bedrock user guide, Use Custom model import (Import a model source from Amazon S3)",
)
UNREADABLE = Rule(
    id="files.unreadable",
    what="a file cannot be read",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="fetch or write it again; of a git clone, run git lfs pull",
    source="safetensors 0.8 safe_open; transformers 5.23 configuration_utils.py PreTrainedConfig._dict_from_json_file",
)
NO_INDEX = Rule(
    id="files.no-index",
    what="shards without an index",
    severity=Severity.ERROR,
    refused_by=TRANSFORMERS,
    advice=f"write {INDEX_FILE}, or fetch it where the shards are from",
    source="transformers 5.23 modeling_utils.py _get_resolved_checkpoint_files",
)
TWO_CHECKPOINTS = Rule(
    id="files.two-checkpoints",
    what="two checkpoints in one place",
    severity=Severity.ERROR,
    misread_by=EVERY,
    advice="remove the older one: transformers loads model.safetensors, vLLM and llama.cpp the shards of the index",
    source="transformers 5.23 modeling_utils.py _get_resolved_checkpoint_files; vLLM "
    "vllm/model_executor/model_loader/default_loader.py DefaultModelLoader._prepare_weights; llama.cpp "
    "conversion/base.py ModelBase.index_tensors",
)
STRAY = Rule(
    id="files.stray-weights",
    what="safetensors that belong to no index stand beside the checkpoint",
    severity=Severity.WARNING,
    misread_by=(*SERVERS, Engine.LLAMA_CPP),
    advice="remove them: where there is no index, vLLM and SGLang read every *.safetensors, llama.cpp every "
    "model*.safetensors",
    source="vLLM vllm/model_executor/model_loader/default_loader.py DefaultModelLoader._prepare_weights "
    "(filter_duplicate_safetensors_files goes by the index); llama.cpp conversion/base.py "
    "ModelBase.get_model_part_names",
)
ADAPTER = Rule(
    id="files.adapter-beside",
    what="an adapter stands beside the merged weights",
    severity=Severity.ERROR,
    misread_by=(*TRANSFORMERS, *SERVERS),
    advice="remove adapter_config.json and adapter_model.*: transformers puts the adapter on top of what is merged",
    source="transformers 5.23 models/auto/auto_factory.py _BaseAutoModelClass.from_pretrained (adapters beside "
    "config.json)",
)
RULES = (NO_CONFIG, NO_WEIGHTS, PICKLED, UNREADABLE, NO_INDEX, TWO_CHECKPOINTS, STRAY, ADAPTER)

_NO_STRAYS = ("consolidated*.safetensors", "adapter.*.safetensors", "adapter_model*.safetensors")
"""The maker's own files, languages of Wav2Vec2, and what has a rule of its own."""


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find what is wrong with the files of a checkpoint as files."""
    files = checkpoint.files
    if ADAPTER_CONFIG in files and CONFIG not in files and not checkpoint.loaded:
        found = "an adapter alone; it is loaded beside its base, or merged first"
        yield finding(NO_CONFIG, CONFIG, found=found, expected="a whole model")
        return
    if CONFIG not in files:
        yield finding(NO_CONFIG, CONFIG, found="nothing", expected="the configuration of the model")
    for name, why in checkpoint.unreadable.items():
        yield finding(UNREADABLE, name, found=why, expected="a file that engines can open")
    if ADAPTER_CONFIG in files:
        weights = sorted(name for name in files if name.startswith("adapter_model"))
        found = f"it, with {several(weights)}" if weights else "it, without its weights"
        yield finding(ADAPTER, ADAPTER_CONFIG, found=found, expected="no adapter beside config.json")
    yield from _weights(checkpoint)


def _weights(checkpoint: Checkpoint) -> Iterator[Finding]:
    files = checkpoint.files
    tensors = {name for name in files if name.endswith(".safetensors") and not matches(name, _NO_STRAYS)}
    if not tensors and any(name.endswith(SUFFIX) for name in files):
        return  # which have rules of their own
    if not tensors:
        pickled = sorted(
            name for name in files if is_pickled(name) and not name.startswith(("training_args", "adapter"))
        )
        if pickled:
            yield finding(PICKLED, pickled[0], found=several(pickled), expected="safetensors")
        elif INDEX_FILE not in files:
            yield finding(NO_WEIGHTS, SINGLE_FILE, found="nothing", expected=f"{SINGLE_FILE}, or {INDEX_FILE}")
        return
    named = set((checkpoint.weight_map or {}).values())
    if SINGLE_FILE in files and INDEX_FILE in files and SINGLE_FILE not in named and named & tensors:
        there = sorted(named & tensors)
        yield finding(
            TWO_CHECKPOINTS, SINGLE_FILE, found=f"it and {several(there)}, which {INDEX_FILE} names", expected="one"
        )
        return
    if SINGLE_FILE not in files and INDEX_FILE not in files:
        yield finding(NO_INDEX, INDEX_FILE, found=f"nothing, and {several(sorted(tensors))}", expected="an index")
        return
    strays = sorted(tensors - named - {SINGLE_FILE})
    if strays and (checkpoint.weight_map is not None or INDEX_FILE not in files):
        yield finding(STRAY, strays[0], found=several(strays), expected="no other safetensors")
