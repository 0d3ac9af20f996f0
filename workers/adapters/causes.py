"""Why a tensor of an adapter belongs to nothing in a base: what it is, and what to do."""

import re
from collections.abc import Iterable
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from workers.adapters.names import owner_of

_HEADS = {
    "score": "AutoModelForSequenceClassification",
    "classifier": "AutoModelForSequenceClassification or AutoModelForTokenClassification",
    "classification_head": "AutoModelForSequenceClassification",
    "qa_outputs": "AutoModelForQuestionAnswering",
}
"""Heads of models that do not continue text, and the classes of transformers that have them."""

OF_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""The class of transformers that each of PEFT's tasks trains a head of."""

_SWITCHES = {"lora_magnitude_vector": "use_dora", "lora_B.bias": "lora_bias"}
"""What LoRA puts into a layer only where a field of the configuration says so."""

_EXPERT = re.compile(r"(.+\.experts)\.\d+\..+")
"""Modules of models that hold each expert by itself, as those of transformers 4 did."""

_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})


def cause_of(name: str, method: str, config: Any, model: nn.Module) -> str:
    """Say why a tensor of an adapter belongs to nothing in the model of its base.

    Args:
        name: as PEFT has it.
        method: PEFT's name of the adapter's.
        config: of the adapter.
        model: of the base, with the adapter on.

    Returns:
        The end of a sentence.
    """
    kind = type(model).__name__
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]
    # PEFT tells names of layers with its own name of the adapter in them.
    owner = owner_of(name, prefix) or ""
    top = owner.partition(".")[0]
    modules = dict(model.named_modules())
    if top in _HEADS and top not in modules:
        task = f" (task_type {config.task_type})" if config.task_type else ""
        head = OF_TASKS.get(str(config.task_type), _HEADS[top])
        if getattr(model, "main_input_name", "input_ids") == "pixel_values":
            head = "AutoModelForImageClassification"
        return (
            f"it is the head of a model that does not continue text{task}, which {kind} does not have: load the base "
            f"as {head}, with the number of labels of the training, save it with save_pretrained, name that as base, "
            "and request parity level: arithmetic"
        )
    is_layer = re.search(rf"\.{re.escape(prefix)}", name) is not None
    if is_layer and owner not in modules:
        return (
            f"{kind} has no module {owner}: the adapter was trained on another architecture, or on names that this "
            "version of transformers does not know any more; leaving them out would change the model"
        )
    if is_layer and isinstance(modules[owner], BaseTunerLayer):
        inside = name.partition(f"{owner}.")[2].replace(".default", "")
        field = next((field for start, field in _SWITCHES.items() if inside.startswith(start)), None)
        words = f"{field} is {getattr(config, field, None)!r} there" if field else "that asks for none"
        return (
            f"the configuration puts an adapter on {owner}, without {inside}: {words}; leaving them out would change "
            "the model: the configuration is not the adapter's own"
        )
    if is_layer:
        return (
            f"{kind} has the module {owner}, but target_modules of the configuration does not name it; leaving them "
            "out would change the model: the configuration is not the adapter's own"
        )
    if hasattr(modules.get(owner.rpartition(".")[0]), "base_layer"):
        return (
            f"{owner.rpartition('.')[0]} holds an adapter as well, and nothing says whether this is its weight before "
            "or after a merge; remove the tensor if it is of a merged model, or call it base_layer.weight if the "
            "training changed it below the adapter"
        )
    return f"{kind} has no parameter {owner}; leaving them out would change the model, so the merge is refused"


def cause_of_experts(names: Iterable[str], method: str, config: Any, model: nn.Module) -> tuple[str, str] | None:
    """Find a tensor of a single expert, for a model that has all experts of a layer in one parameter.

    Args:
        names: of tensors of an adapter, as PEFT has them.
        method: PEFT's name of the adapter's.
        config: of the adapter.
        model: of the base.

    Returns:
        The tensor, and the end of a sentence that says why it cannot be merged; None where there is none.
    """
    modules = {name for name, _ in model.named_modules()}
    for name in names:
        owner = owner_of(name, PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]) or ""
        if owner not in modules and _EXPERT.fullmatch(owner):
            break
    else:
        return None
    if method != "LORA":
        other = f"this is {method}"
    elif config.use_dora:
        other = "this one has use_dora"
    elif getattr(config, "lora_bias", False):
        other = "this one has lora_bias"
    else:
        other = "this adapter is one of several, or the base's files hold the experts together"
    return name, (
        f"it is of a single expert, and transformers makes all experts of a layer one parameter of "
        f"{type(model).__name__}; single experts are merged by plain LoRA, one adapter at a time, into a base whose "
        f"files hold them one by one, as its maker published it; {other}"
    )
