"""Names that training leaves in a checkpoint, and that no engine takes: of PEFT, of torch.compile, of wrappers."""

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet

from workers.releases.checks.checkpoint import Checkpoint
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity, finding, several
from workers.releases.checks.skeletons import Skeleton

LEFT_OF_PEFT = Rule(
    id="names.left-of-peft",
    what="names of an adapter that was not merged",
    severity=Severity.ERROR,
    refused_by=(*SERVERS, Engine.LLAMA_CPP),
    misread_by=TRANSFORMERS,
    advice="merge before saving (merge_and_unload), and save what that returns; adapters that are not merged are "
    "loaded beside a base",
    source="vLLM issue 1625 (KeyError of lora_A); PEFT 0.21 tuners/tuners_utils.py BaseTuner.merge_and_unload",
)
WRAPPED = Rule(
    id="names.wrapped",
    what="names of a wrapper around the model",
    severity=Severity.ERROR,
    refused_by=(*SERVERS, Engine.LLAMA_CPP),
    misread_by=TRANSFORMERS,
    advice="save the model inside (_orig_mod of torch.compile, module of DDP, FSDP, DeepSpeed), or rename the tensors",
    source="vLLM issue 12783 (There is no module or parameter named '_orig_mod')",
)
PREFIX_TWICE = Rule(
    id="names.prefix-twice",
    what="the prefix of the model stands there twice",
    severity=Severity.ERROR,
    refused_by=(*SERVERS, Engine.LLAMA_CPP),
    advice="rename the tensors: take one of the two away",
    source="transformers 5.23 core_model_loading.py rename_source_key (adds or takes away one prefix); vLLM issue "
    "12783 (names that no module has)",
)
RULES = (LEFT_OF_PEFT, WRAPPED, PREFIX_TWICE)

_OF_PEFT = re.compile(
    r"^base_model\.model\.|\.base_layer\.|\.original_module\.|\.modules_to_save\."
    r"|\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|ia3_l|hada_w[12]_[ab]|lokr_w[12](_[ab])?|oft_[rRs]"
    r"|boft_[RPs]|vera_lambda_[bd]|trainable_tokens_delta)(\.|$)"
)
_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_OUTER = ("module.", "_forward_module.", "model.module.")
_TWICE = re.compile(r"^((\w+)\.)\2\.")


def find(checkpoint: Checkpoint, skeleton: Skeleton | None) -> Iterator[Finding]:
    """Find names that no engine takes.

    Args:
        checkpoint: looked at.
        skeleton: its model; where there is none, only names that no model has are found.
    """
    own: AbstractSet[str] = frozenset() if skeleton is None else skeleton.state.keys()
    names = [name for name in sorted(checkpoint.specs) if name not in own]
    for rule, wrong, expected in (
        (LEFT_OF_PEFT, [name for name in names if _OF_PEFT.search(name)], "names of the model alone"),
        (WRAPPED, _wrapped(names, checkpoint), "names of the model inside"),
        (PREFIX_TWICE, [name for name in names if _is_twice(name, own, skeleton)], "one"),
    ):
        if wrong:
            yield finding(rule, checkpoint.file_of[wrong[0]], wrong[0], found=several(wrong), expected=expected)
            return


def _is_twice(name: str, own: AbstractSet[str], skeleton: Skeleton | None) -> bool:
    """Whether a name is one of the model once a prefix is taken away, and is none as it is."""
    inner = _TWICE.sub(r"\1", name)
    if inner == name or skeleton is None:
        return False
    return inner in own or (name in skeleton.unexpected and skeleton.routes.of(inner)[0] in own)


def _wrapped(names: list[str], checkpoint: Checkpoint) -> list[str]:
    found = [name for name in names if _WRAPPERS.search(name)]
    for outer in _OUTER:
        if not found and checkpoint.specs and all(name.startswith(outer) for name in checkpoint.specs):
            found = [name for name in names if name.startswith(outer)]
    return found
