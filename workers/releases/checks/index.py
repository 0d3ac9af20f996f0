"""The index of a sharded checkpoint against its shards."""

from collections import defaultdict
from collections.abc import Iterator, Mapping

from workers.files.layout import INDEX_FILE, SINGLE_FILE
from workers.releases.checks.checkpoint import Checkpoint
from workers.releases.checks.rules import (
    EVERY,
    TRANSFORMERS,
    Engine,
    Finding,
    Rule,
    Severity,
    finding,
    several,
)

_LLAMA = "llama.cpp conversion/base.py ModelBase.index_tensors"
NO_MAP = Rule(
    id="index.no-map",
    what="the index names no files",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="write the index anew from the headers of the shards",
    source=f"transformers 5.23 utils/hub.py get_checkpoint_shard_files; {_LLAMA}",
)
NO_SHARD = Rule(
    id="index.no-shard",
    what="a shard that the index names is not there",
    severity=Severity.ERROR,
    refused_by=EVERY,
    advice="upload it",
    source=f"transformers 5.23 utils/hub.py get_checkpoint_shard_files; {_LLAMA} (Missing or incomplete model files)",
)
LEFT_BEHIND = Rule(
    id="index.left-behind",
    what="an index of shards that are gone stands beside the single file",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM, Engine.LLAMA_CPP),
    advice="remove the index: transformers loads model.safetensors, vLLM and llama.cpp go by the index",
    source=f"vLLM vllm/model_executor/model_loader/default_loader.py DefaultModelLoader._prepare_weights; {_LLAMA}",
)
NOT_IN_SHARD = Rule(
    id="index.not-in-shard",
    what="no shard holds a tensor that the index names",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM, Engine.LLAMA_CPP),
    misread_by=(*TRANSFORMERS, Engine.SGLANG),
    advice="save the model again: the shards and the index are from two saves",
    source=f"{_LLAMA} (Mismatch between weight map and model parts); vLLM "
    "vllm/model_executor/model_loader/default_loader.py DefaultModelLoader.track_weights_loading",
)
NOT_IN_INDEX = Rule(
    id="index.not-in-index",
    what="a shard holds a tensor that the index does not name",
    severity=Severity.ERROR,
    refused_by=(Engine.LLAMA_CPP,),
    advice="write the index anew from the headers of the shards, or save the model again",
    source=f"{_LLAMA} (Mismatch between weight map and model parts)",
)
WRONG_SHARD = Rule(
    id="index.wrong-shard",
    what="a tensor is in another shard than the index says",
    severity=Severity.ERROR,
    advice="write the index anew from the headers of the shards: loaders that read tensor by tensor look in the wrong "
    "file (offloading to disk, mergekit, mergefleet)",
    source="transformers 5.23 integrations/accelerate.py accelerate_disk_offload (safetensors_file by weight_map)",
)
IN_TWO_SHARDS = Rule(
    id="index.in-two-shards",
    what="a tensor is in two shards",
    severity=Severity.ERROR,
    misread_by=EVERY,
    advice="remove the older shard and write the index anew: which of the two is taken depends on the order of reading",
    source=f"{_LLAMA}; vLLM vllm/model_executor/model_loader/default_loader.py DefaultModelLoader.get_all_weights",
)
TOTAL_SIZE = Rule(
    id="index.total-size",
    what="total_size is not that of the tensors",
    severity=Severity.WARNING,
    advice="write the index anew from the headers: tools plan memory and show sizes by it",
    source="huggingface_hub 2.4 serialization/_base.py split_state_dict_into_shards_factory (what is written there)",
)
RULES = (NO_MAP, NO_SHARD, LEFT_BEHIND, NOT_IN_SHARD, NOT_IN_INDEX, WRONG_SHARD, IN_TWO_SHARDS, TOTAL_SIZE)


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find where index and shards differ."""
    if INDEX_FILE not in checkpoint.documents:
        return
    weight_map = checkpoint.weight_map
    if weight_map is None:
        yield finding(NO_MAP, INDEX_FILE, "weight_map", found="none that can be used", expected="files by tensor")
        return
    named = sorted(set(weight_map.values()))
    gone = [name for name in named if name not in checkpoint.files]
    if gone and SINGLE_FILE in checkpoint.files and SINGLE_FILE not in named:
        yield finding(LEFT_BEHIND, INDEX_FILE, gone[0], found=f"nothing, and {SINGLE_FILE}", expected="no index")
    elif gone:
        tensors = sum(shard in gone for shard in weight_map.values())
        yield finding(
            NO_SHARD,
            INDEX_FILE,
            gone[0],
            found=f"nothing ({len(gone)} shards, {tensors} tensors)",
            expected="the shard",
        )
    if gone or any(name not in checkpoint.shards for name in named):
        return  # what they hold is not known
    if SINGLE_FILE in checkpoint.files and SINGLE_FILE not in named:
        return  # another checkpoint, which has a rule of its own
    yield from _places(weight_map, checkpoint, named)


def _places(weight_map: Mapping[str, str], checkpoint: Checkpoint, named: list[str]) -> Iterator[Finding]:
    holders: dict[str, list[str]] = defaultdict(list)
    for name in named:
        for spec in checkpoint.shards[name].tensors:
            holders[spec.name].append(name)
    twice = sorted(tensor for tensor, shards in holders.items() if len(shards) > 1)
    missing = sorted(weight_map.keys() - holders.keys())
    beyond = sorted(holders.keys() - weight_map.keys())
    moved = sorted(
        tensor for tensor, shards in holders.items() if tensor in weight_map and weight_map[tensor] not in shards
    )
    if twice:
        shards = " and ".join(holders[twice[0]])
        yield finding(IN_TWO_SHARDS, INDEX_FILE, several(twice), found=shards, expected="one shard")
    if missing:
        yield finding(
            NOT_IN_SHARD, INDEX_FILE, several(missing), found=f"not in {weight_map[missing[0]]}", expected="the tensor"
        )
    if beyond:
        yield finding(
            NOT_IN_INDEX, holders[beyond[0]][0], several(beyond), found="no entry in weight_map", expected="one"
        )
    if moved:
        yield finding(
            WRONG_SHARD, INDEX_FILE, several(moved), found=holders[moved[0]][0], expected=weight_map[moved[0]]
        )
    if twice or missing or beyond:
        return
    metadata = checkpoint.documents[INDEX_FILE].get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    actual = sum(spec.num_bytes for name in named for spec in checkpoint.shards[name].tensors)
    if isinstance(stated, int | float) and stated != actual:
        yield finding(TOTAL_SIZE, INDEX_FILE, "metadata.total_size", found=f"{stated}", expected=f"{actual}")
