"""The tensors of a checkpoint against the model that its configuration describes: names, shapes, layers, ties.

Missing is what transformers would fill with random values, after all its own renaming, fusing and splitting.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from workers.bases.model import ignores_missing
from workers.bases.ties import tied_names
from workers.releases.checks.checkpoint import CONFIG
from workers.releases.checks.groups import absent_parts, groups
from workers.releases.checks.heads import NO_HEAD, TIED_HEAD, find_tied, head_of
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
from workers.releases.checks.shapes import SHAPE, VOCABULARY, find_shapes
from workers.releases.checks.skeletons import Skeleton, about

_LOAD = "transformers 5.23 modeling_utils.py PreTrainedModel._finalize_model_loading"
_TRACK = "vLLM vllm/model_executor/model_loader/default_loader.py DefaultModelLoader.track_weights_loading"
MISSING = Rule(
    id="tensors.missing",
    what="tensors of the model are missing",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM,),
    misread_by=(*TRANSFORMERS, Engine.SGLANG, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="save the whole model; transformers fills what is missing with random values",
    source=f"{_LOAD}; {_TRACK} (Following weights were not initialized from checkpoint)",
)
UNEXPECTED = Rule(
    id="tensors.unexpected",
    what="tensors that the model does not have",
    severity=Severity.WARNING,
    refused_by=(Engine.VLLM, Engine.LLAMA_CPP),
    misread_by=TRANSFORMERS,
    advice="remove them, or correct `architectures` in config.json: transformers leaves them out, vLLM and llama.cpp "
    "refuse names that they do not know",
    source="transformers 5.23 modeling_utils.py PreTrainedModel._adjust_missing_and_unexpected_keys; vLLM issue 12783; "
    "llama.cpp conversion/base.py ModelBase.map_tensor_name (Can not map tensor)",
)
UNUSED = Rule(
    id="tensors.unused",
    what="tensors that the model does not have, such as a head of its pretraining",
    severity=Severity.NOTE,
    misread_by=TRANSFORMERS,
    advice="remove them, or correct `architectures` in config.json: transformers leaves them out",
    source="transformers 5.23 modeling_utils.py PreTrainedModel._adjust_missing_and_unexpected_keys",
)
FUSED = Rule(
    id="tensors.fused",
    what="tensors are fused that the model has one by one",
    severity=Severity.ERROR,
    refused_by=(Engine.LLAMA_CPP,),
    misread_by=TRANSFORMERS,
    advice="split them, as the base has them: q, k and v (gate and up) one after the other, in rows",
    source=f"{_LOAD}; vLLM pull request 42577 (fused experts of Qwen3 MoE)",
)
SPLIT = Rule(
    id="tensors.split",
    what="tensors stand one by one that the model has fused",
    severity=Severity.ERROR,
    refused_by=(Engine.LLAMA_CPP,),
    misread_by=TRANSFORMERS,
    advice="fuse them, as the base has them; vLLM and SGLang fuse q, k and v by themselves",
    source=f"{_LOAD}; SGLang python/sglang/srt/models/llama.py LlamaForCausalLM.load_weights (stacked_params_mapping)",
)
FUSED_EXPERTS = Rule(
    id="tensors.fused-experts",
    what="experts are fused, as transformers 5 keeps them in memory",
    severity=Severity.NOTE,
    refused_by=(Engine.TRANSFORMERS_4, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="for engines before 2026, save with save_original_format=True of transformers 5",
    source="vLLM pull requests 36997 and 42577 (loading of fused expert weights)",
)
LAYERS = Rule(
    id="tensors.layers",
    what="the number of layers is not that of the configuration",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM,),
    misread_by=(*TRANSFORMERS, Engine.SGLANG, Engine.LLAMA_CPP, Engine.BEDROCK),
    advice="set the number of layers in config.json to that of the weights, or add the layers",
    source=f"{_LOAD}; {_TRACK}",
)
TWICE = Rule(
    id="tensors.twice",
    what="a weight is stored twice under different names",
    severity=Severity.ERROR,
    misread_by=EVERY,
    advice="remove the older one: the files are of two saves, and which of the two is taken depends on the engine",
    source="transformers 5.23 core_model_loading.py convert_and_load_state_dict_in_model (one target, several sources)",
)
RULES = (MISSING, UNEXPECTED, UNUSED, TWICE, FUSED, SPLIT, FUSED_EXPERTS, LAYERS, VOCABULARY, SHAPE, NO_HEAD, TIED_HEAD)

_PARTS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        ("qkv_proj", "query_key_value", "Wqkv", "W_pack", "c_attn", "qkv", "in_proj", "att_proj"),
        frozenset({"q_proj", "k_proj", "v_proj", "query", "key", "value", "q", "k", "v", "q_lin", "k_lin", "v_lin"}),
    ),
    **dict.fromkeys(
        ("gate_up_proj", "gate_up", "ff_proj"),
        frozenset({"gate_proj", "up_proj", "w1", "w3", "*.gate_proj", "*.up_proj", "*.w1", "*.w3"}),
    ),
    "down_proj": frozenset({"*.down_proj", "*.w2"}),
}
"""What fused modules are called, and the parts of each; a star stands for the number of an expert."""
_LEFT_BY_ALL = re.compile(
    r"(^|\.)rotary_emb\.|(^|\.)position_ids$|\.(attn|attention|self_attention)\.(masked_)?bias$|(^|\.)mtp\w*\.|\.causal_mask$|\.nextn\."
    r"|[._](k|v|q|kv)_scale$|(^|\.)(input|output|act)_scale$"
)
"""Names that engines are known to pass over: tables, heads for further tokens, scales of a cache."""
_NUMBERED = re.compile(r"^(.*?)\.(\d+)\.")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth")


def find(skeleton: Skeleton) -> Iterator[Finding]:
    """Find where tensors and model differ."""
    missing, unexpected, parts = _missing(skeleton), _unexpected(skeleton), absent_parts(skeleton)
    for rule, there, absent in _regrouped(missing, unexpected):
        yield about(skeleton, rule, there[0], found=several(there), expected=several(absent))
        unexpected = [name for name in unexpected if name not in there]
        missing = [name for name in missing if name not in absent]
    for prefix, own, stored in _layers(skeleton, missing, unexpected):
        yield finding(LAYERS, CONFIG, _depth_field(skeleton, own), found=f"{own}", expected=f"{stored} in the files")
        unexpected = [name for name in unexpected if not name.startswith(f"{prefix}.")]
        missing = [name for name in missing if not name.startswith(f"{prefix}.")]
    head = head_of(skeleton)
    if missing and head is not None and missing == [head]:
        yield finding(NO_HEAD, CONFIG, "tie_word_embeddings", found="false, and no head stored", expected=head)
        missing = []
    missing += parts
    if missing:
        kind = type(skeleton.model).__name__
        yield finding(
            MISSING,
            skeleton.file_of(None),
            missing[0],
            found=f"{several(missing)} of {kind} nowhere",
            expected="values",
        )
    if unexpected:
        kind = type(skeleton.model).__name__
        rule = UNEXPECTED if skeleton.model.can_generate() else UNUSED
        yield about(skeleton, rule, unexpected[0], found=several(unexpected), expected=f"tensors of {kind}")
    yield from _twice(skeleton)
    if not parts:
        yield from find_shapes(skeleton)
    yield from find_tied(skeleton, head)
    yield from _fused_experts(skeleton)


def _missing(skeleton: Skeleton) -> list[str]:
    tied = tied_names(skeleton.model)
    covered = skeleton.sources.keys()
    return [
        name
        for name, _ in skeleton.model.named_parameters()
        if covered.isdisjoint(tied.get(name, (name,))) and not ignores_missing(skeleton.model, name)
    ]


def _unexpected(skeleton: Skeleton) -> list[str]:
    model = skeleton.model
    ignored = [re.compile(pattern) for pattern in (model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    text = skeleton.checkpoint.text_config
    further = text.get("num_nextn_predict_layers") or text.get("mtp_num_hidden_layers") or 0
    depth = text.get("num_hidden_layers")
    last = range(depth, depth + further) if isinstance(depth, int) and isinstance(further, int) else range(0)
    return [
        name
        for name in skeleton.unexpected
        if not _LEFT_BY_ALL.search(name)
        and not any(pattern.search(name) for pattern in ignored)
        and not ((found := _NUMBERED.match(name)) and int(found[2]) in last)
    ]


def _regrouped(missing: list[str], unexpected: list[str]) -> Iterator[tuple[Rule, list[str], list[str]]]:
    """Yield what is stored fused or split where the model has it the other way, and what the model has instead."""
    found: dict[Rule, tuple[list[str], list[str]]] = {FUSED: ([], []), SPLIT: ([], [])}
    absent, there = _by_module(missing), _by_module(unexpected)
    for owner, leaves in there.items():
        for fused, parts in _PARTS.items():
            lacking = absent.get(owner, {})
            if fused in leaves and (instead := parts & lacking.keys()):
                found[FUSED][0].extend(leaves[fused])
                found[FUSED][1].extend(name for part in sorted(instead) for name in lacking[part])
            elif fused in lacking and (instead := parts & leaves.keys()):
                found[SPLIT][0].extend(name for part in sorted(instead) for name in leaves[part])
                found[SPLIT][1].extend(lacking[fused])
    for rule, (names, instead_of) in found.items():
        if names:
            yield rule, list(dict.fromkeys(names)), list(dict.fromkeys(instead_of))


def _by_module(names: Collection[str]) -> dict[str, dict[str, list[str]]]:
    """Return names by the module that holds theirs, all experts of a layer as one, and by the name in it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in names:
        module = re.sub(r"(\.weight|\.bias|(?<=_proj)_bias)$", "", name)
        owner, _, leaf = module.rpartition(".")
        experts = re.fullmatch(r"(.*\.experts)\.\d+", owner)
        found[experts[1] if experts else owner][f"*.{leaf}" if experts else leaf].append(name)
    return found


def _layers(skeleton: Skeleton, missing: list[str], unexpected: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield the lists of layers that are longer or shorter in the files: their names, and both lengths."""
    own, stored = _depths(skeleton.state), _depths(skeleton.routes.of(name)[0] for name in skeleton.stored)
    for prefix, depth in own.items():
        there = stored.get(prefix, 0)
        lacking = {int(found[2]) for name in missing if (found := _NUMBERED.match(name)) and found[1] == prefix}
        targets = (skeleton.targets[name][0] for name in unexpected)
        beyond = {int(found[2]) for name in targets if (found := _NUMBERED.match(name)) and found[1] == prefix}
        if (there and lacking and min(lacking) >= there) or (beyond and min(beyond) >= depth):
            yield prefix, depth, there


def _depths(names: Collection[str] | Iterator[str]) -> dict[str, int]:
    depths: dict[str, int] = {}
    for name in names:
        if found := _NUMBERED.match(name):
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    return depths


def _depth_field(skeleton: Skeleton, depth: int) -> str:
    text = skeleton.checkpoint.text_config
    return next((field for field in _DEPTHS if text.get(field) == depth), "num_hidden_layers")


def _twice(skeleton: Skeleton) -> Iterator[Finding]:
    plain: dict[str, list[str]] = defaultdict(list)
    for name, (target, pattern) in skeleton.targets.items():
        if pattern is None and target in skeleton.state:
            plain[target].append(name)
    together = groups(skeleton)
    for target, names in plain.items():
        also = names[1:] or together.get(target)
        if also:
            yield about(skeleton, TWICE, names[0], found=f"it and {several(also)}", expected="one of the two")
            return


def _fused_experts(skeleton: Skeleton) -> Iterator[Finding]:
    made = {target for converter in skeleton.routes.by_pattern.values() for target in converter.target_patterns}
    parts = [pattern for pattern in skeleton.routes.by_pattern if "experts.*" in pattern]
    fused = [
        name
        for name, (target, pattern) in skeleton.targets.items()
        if pattern is None and ".experts." in target and any(target.endswith(each) for each in made)
    ]
    if parts and fused:
        yield about(skeleton, FUSED_EXPERTS, fused[0], found=several(fused), expected="a tensor for each expert")
