"""Weights in codes: whether they are declared, and whether each has its scales."""

from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from collections.abc import Set as AbstractSet

from jobs.errors import BadInputError, MergefleetError
from workers.bases.codes import PART_ENDINGS, PLAIN, part_ending
from workers.bases.declarations import DECLARING_FIELDS, DECLARING_FILES
from workers.bases.forms.declared import declared_form
from workers.files.checkpoint import read_json
from workers.files.layout import TensorSpec
from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import TRANSFORMERS, Engine, Finding, Rule, Severity, finding, several

UNDECLARED = Rule(
    id="quantization.undeclared",
    what="weights are codes, and nothing declares them",
    severity=Severity.ERROR,
    misread_by=(*TRANSFORMERS, Engine.VLLM, Engine.SGLANG, Engine.LLAMA_CPP),
    advice="put quantization_config of the checkpoint that they come from into config.json, or save them dequantized",
    source="transformers 5.23 quantizers/auto.py AutoHfQuantizer (goes by quantization_config alone); llama.cpp "
    "conversion/base.py ModelBase.dequant_model",
)
DECLARED_PLAIN = Rule(
    id="quantization.declared-plain",
    what="quantized weights are declared, and all weights are plain numbers",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM, Engine.LLAMA_CPP),
    misread_by=TRANSFORMERS,
    advice="take quantization_config out of config.json: it was left there by a merge into dequantized weights",
    source="unsloth issues 105 and 1601; open-instruct issue 149 (quantization_config after merging)",
)
NO_SCALES = Rule(
    id="quantization.no-scales",
    what="weights are codes without their scales",
    severity=Severity.ERROR,
    misread_by=(*TRANSFORMERS, Engine.VLLM, Engine.SGLANG, Engine.LLAMA_CPP),
    advice="fetch the shard that holds the scales, or quantize again: without them the codes are another weight",
    source="transformers 5.23 integrations/finegrained_fp8.py (weight_scale_inv); vLLM "
    "vllm/model_executor/model_loader/default_loader.py DefaultModelLoader.load_weights (quantized weights are not "
    "tracked)",
)
ORPHANS = Rule(
    id="quantization.orphan-scales",
    what="scales or other parts of codes stand there without the codes",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM, Engine.LLAMA_CPP),
    misread_by=(Engine.TRANSFORMERS_5, Engine.TRANSFORMERS_4, Engine.SGLANG),
    advice="remove them where the weights were dequantized; else fetch the codes",
    source="vLLM issue 12783 (names that no module has); SGLang python/sglang/srt/models/llama.py "
    "LlamaForCausalLM.load_weights (Parameter not found)",
)
DISORDER = Rule(
    id="quantization.disorder",
    what="codes, scales and what is declared do not fit together",
    severity=Severity.ERROR,
    refused_by=(Engine.VLLM, Engine.SGLANG),
    misread_by=TRANSFORMERS,
    advice="take quantization_config and weights from the same checkpoint",
    source="transformers 5.23 integrations/finegrained_fp8.py; compressed-tensors 0.20 compressors/base.py "
    "BaseCompressor.decompress",
)
RULES = (UNDECLARED, DECLARED_PLAIN, NO_SCALES, ORPHANS, DISORDER)

_SCALED = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
_SCALES_OF: Mapping[str, tuple[str, ...]] = {
    ".qweight": (".scales",),
    "_packed": ("_scale",),
    "_blocks": ("_scales",),
}
"""What has to stand beside codes of this ending, in the place of the ending."""
_CODES = (
    ".qweight",
    "_packed",
    "_blocks",
    ".W_q",
    ".codes",
    ".trellis",
    ".q_weight",
    "._data",
    ":_data",
    "._weight_qdata",
)
HARMLESS = ("k_scale", "v_scale", "q_scale", "kv_scale", "input_scale", "output_scale", "act_scale", "prob_scale")


def find(checkpoint: Checkpoint, own: Container[str]) -> Iterator[Finding]:
    """Find codes without a declaration, declarations without codes, and parts without the others.

    Args:
        checkpoint: looked at.
        own: names that its model has.
    """
    specs = checkpoint.specs
    if not specs or CONFIG not in checkpoint.documents:
        return
    place = _declaration(checkpoint)
    codes = _codes(specs)
    if place is None:
        if codes:
            yield _at(
                checkpoint, UNDECLARED, codes, found=f"{several(codes)} as {specs[codes[0]].code}", expected=CONFIG
            )
            return
    elif not codes and not _is_of_activations(checkpoint):
        words = ", ".join(sorted({spec.code for spec in specs.values()}))
        yield finding(DECLARED_PLAIN, place[0], place[1], found=f"tensors in {words}", expected="codes")
        return
    of_parts = list(_parts(checkpoint, codes, own))
    yield from of_parts
    if place is not None and not of_parts:
        try:
            form = declared_form(checkpoint.directory)
            if form is not None:
                form.weights(specs)
        except BadInputError as error:
            yield finding(DISORDER, place[0], place[1], found=_without(error, checkpoint), expected="whole weights")
        except MergefleetError:
            return  # of a form that is not read here


def _parts(checkpoint: Checkpoint, codes: list[str], own: Container[str]) -> Iterator[Finding]:
    specs = checkpoint.specs
    leaves = _leaves(specs)
    bare = [name for name in codes if _lacks_scales(name, specs, leaves)]
    orphans = [name for name in specs if name not in own and _is_orphan(name, specs)]
    if bare:
        yield _at(checkpoint, NO_SCALES, bare, found=several(bare), expected="scales beside the codes")
    elif orphans:
        yield _at(checkpoint, ORPHANS, orphans, found=several(orphans), expected="codes that it belongs to")


def _declaration(checkpoint: Checkpoint) -> tuple[str, str] | None:
    """Return where a form of the weights is declared: file and field."""
    sections = [checkpoint.config, checkpoint.text_config]
    for section in sections:
        for field in (*DECLARING_FIELDS, "quantization"):
            if section.get(field):
                return CONFIG, field
    return next(((name, "") for name in DECLARING_FILES if name in checkpoint.files), None)


def _is_of_activations(checkpoint: Checkpoint) -> bool:
    """Whether what is declared is for activations or a cache alone, or made while loading."""
    try:
        if declared_form(checkpoint.directory) is None:
            return True
    except MergefleetError:
        pass
    for name in DECLARING_FILES:
        if name in checkpoint.files:
            try:
                found = read_json(checkpoint.files[name])
            except BadInputError:
                continue
            inner = found.get("quantization") if isinstance(found, dict) else None
            if isinstance(inner, dict) and not inner.get("quant_algo"):
                return True
    return False


def _codes(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Return the tensors that are weights in codes, by dtype and name."""
    found = []
    for name, spec in sorted(specs.items()):
        is_weight = name.endswith((".weight", *_CODES)) or (spec.code in _SCALED and "scale" not in name)
        if is_weight and len(spec.stated.shape if spec.stated else spec.shape) > 1 and spec.code not in PLAIN:
            if name.endswith(".weight") and spec.code in ("I64", "BOOL"):
                continue
            found.append(name)
    return found


def _lacks_scales(name: str, specs: Mapping[str, TensorSpec], leaves: Mapping[str, AbstractSet[str]]) -> bool:
    for ending, scales in _SCALES_OF.items():
        if name.endswith(ending):
            return not any(name.removesuffix(ending) + each in specs for each in scales)
    module, _, leaf = name.rpartition(".")
    beside, inside = leaves[module], leaves.get(name, frozenset())
    if specs[name].code in _SCALED:
        own = (f"{leaf}_scale", "scale")
        return not (any(each.startswith(own) for each in beside) or any("scale" in each for each in inside))
    if specs[name].code in ("U8", "I8") and leaf == "weight":
        return not any("scale" in each.lower() or "absmax" in each or each == "SCB" for each in (*beside, *inside))
    return False


def _leaves(specs: Mapping[str, TensorSpec]) -> Mapping[str, AbstractSet[str]]:
    """Return the last parts of names, by what stands before them."""
    found: dict[str, set[str]] = defaultdict(set)
    for name in specs:
        module, _, leaf = name.rpartition(".")
        found[module].add(leaf)
    return found


def _is_orphan(name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether a tensor is a part of a weight in codes, and those are not there."""
    if name.endswith(HARMLESS) or name.endswith(_CODES):
        return False
    if ".weight.quant_state." in name or name.endswith(
        (".weight.absmax", ".weight.quant_map", ".weight.nested_absmax")
    ):
        weight = name[: name.index(".weight.") + len(".weight")]
        return weight not in specs or specs[weight].code in PLAIN
    ending = part_ending(name)
    if ending is None or ending in _CODES or ending in ("._scale", ".biases"):
        return False
    front = name.removesuffix(ending)
    weight = front + PART_ENDINGS[ending][0]
    holders = [each for each in (weight, *(front + codes for codes in _CODES)) if each in specs]
    if ending in ("_scale", "_scales") and not front.endswith(("weight", "proj", "experts")) and not holders:
        return False  # a parameter of the model that is called so
    return all(specs[each].code in PLAIN for each in holders)


def _without(error: Exception, checkpoint: Checkpoint) -> str:
    return str(error).replace(f"{checkpoint.directory}/", "").replace(f"{checkpoint.directory}: ", "")


def _at(checkpoint: Checkpoint, rule: Rule, names: list[str], *, found: str, expected: str) -> Finding:
    return finding(rule, checkpoint.file_of[names[0]], names[0], found=found, expected=expected)
