"""What a configuration says of the dtype of its weights, and what that is."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from workers.bases.codes import PLAIN
from workers.files.layout import TensorSpec
from workers.releases.checks.checkpoint import CONFIG, Checkpoint
from workers.releases.checks.rules import SERVERS, TRANSFORMERS, Engine, Finding, Rule, Severity, finding

_READ = "transformers 5.23 configuration_utils.py PreTrainedConfig.__post_init__ (torch_dtype, dtype)"
UNKNOWN = Rule(
    id="dtype.unknown",
    what="no dtype of torch",
    severity=Severity.ERROR,
    refused_by=(*TRANSFORMERS, *SERVERS),
    advice="write bfloat16, float16 or float32",
    source=_READ,
)
DISAGREES = Rule(
    id="dtype.disagrees",
    what="the dtype of the configuration is not that of the weights",
    severity=Severity.WARNING,
    misread_by=(*TRANSFORMERS, *SERVERS),
    advice="write the dtype of the weights: engines load them in the one that is written there, into other numbers or "
    "twice the memory",
    source=f"{_READ}; llama.cpp conversion/base.py ModelBase.__init__ (some finetunes lie)",
)
DIFFER = Rule(
    id="dtype.fields-differ",
    what="torch_dtype and dtype say different things",
    severity=Severity.WARNING,
    misread_by=TRANSFORMERS,
    advice="write the same under both: transformers 4 goes by torch_dtype, transformers 5 by dtype",
    source=f"{_READ} (If both are provided, keep `dtype`)",
)
NEW_FIELD = Rule(
    id="dtype.new-field",
    what="the dtype stands under its new name alone",
    severity=Severity.NOTE,
    misread_by=(Engine.TRANSFORMERS_4,),
    advice="write it under torch_dtype, too: older transformers load float32 where that is not there",
    source=_READ,
)
ABSENT = Rule(
    id="dtype.absent",
    what="no dtype is written",
    severity=Severity.NOTE,
    misread_by=(Engine.TRANSFORMERS_4,),
    advice="write dtype and torch_dtype",
    source=_READ,
)
RULES = (UNKNOWN, DISAGREES, DIFFER, NEW_FIELD, ABSENT)

_WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MOST = 0.75
"""Of the elements: some modules are kept in float32 in checkpoints of 16 bits."""
_ALIASES = {"half": "float16", "float": "float32", "double": "float64"}


def find(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Find dtypes that are none, not there, or not those of the weights."""
    if CONFIG not in checkpoint.documents:
        return
    new, old = _stated(checkpoint, "dtype"), _stated(checkpoint, "torch_dtype")
    if new is None and old is None:
        yield finding(ABSENT, CONFIG, "dtype", found="nothing", expected="dtype and torch_dtype")
        return
    if new is not None and old is not None and _word(new) != _word(old):
        yield finding(DIFFER, CONFIG, "torch_dtype", found=str(old), expected=f"{new}, as dtype says")
        return
    if old is None:
        yield finding(NEW_FIELD, CONFIG, "dtype", found=f"{new}, and no torch_dtype", expected="both")
    stated = _word(old if new is None else new)
    if stated not in _WORDS:
        if stated != "auto":
            field = "torch_dtype" if new is None else "dtype"
            yield finding(UNKNOWN, CONFIG, field, found=repr(stated)[:80], expected=", ".join(_WORDS))
        return
    actual = _most(checkpoint.specs)
    if actual is not None and actual != _WORDS[stated]:
        by_code = {code: word for word, code in _WORDS.items()}
        yield finding(
            DISAGREES, CONFIG, "dtype" if new is not None else "torch_dtype", found=stated, expected=by_code[actual]
        )


def _stated(checkpoint: Checkpoint, field: str) -> Any:
    found = checkpoint.config.get(field)
    return checkpoint.text_config.get(field) if found is None else found


def _word(stated: Any) -> str:
    if isinstance(stated, dict):  # by part of the model: that of all others
        stated = stated.get("") or next(iter(stated.values()), "auto")
    word = str(stated).removeprefix("torch.")
    return _ALIASES.get(word, word)


def _most(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the code of most of the plain numbers; None where most weights are codes, or nothing is clear."""
    num_bytes = Counter[str]()
    for name, spec in specs.items():
        is_part = "scale" in name or "zero" in name or "absmax" in name or "quant_map" in name
        num_bytes[spec.code if spec.code in PLAIN else ""] += 0 if is_part else spec.num_elements
    codes = num_bytes.pop("", 0)
    if not num_bytes or codes > sum(num_bytes.values()) / 10:
        return None
    (code, most), *_ = num_bytes.most_common(1)
    return code if most > sum(num_bytes.values()) * _MOST else None
