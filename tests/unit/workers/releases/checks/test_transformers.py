"""What rules say of transformers 5, against transformers 5: it refuses, or reports, what they say it refuses."""

import pytest
import transformers
from transformers import AutoTokenizer, GenerationConfig

from tests.faults import FAULTS
from workers.bases.model import load_config, model_class, quiet_transformers
from workers.releases.checks.checking import RULES
from workers.releases.checks.rules import Engine

REPORTED = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "conversion_errors")
REFUSED = [done for done, (_, rule, _) in FAULTS.items() if Engine.TRANSFORMERS_5 in RULES[rule].refused_by]
REPORTED_OF = ("names.", "tensors.")
MISREAD = [
    done
    for done, (_, rule, _) in FAULTS.items()
    if Engine.TRANSFORMERS_5 in RULES[rule].misread_by and rule.startswith(REPORTED_OF) and rule != "tensors.twice"
]


def load(directory):
    """Load a checkpoint, its tokenizer and its generation configuration; return what is reported of its tensors."""
    with quiet_transformers():
        found = model_class(load_config(directory)).from_pretrained(
            directory, dtype="auto", local_files_only=True, output_loading_info=True
        )[1]
        if (directory / "generation_config.json").exists():
            GenerationConfig.from_pretrained(directory)
        if (directory / "tokenizer.json").exists():
            AutoTokenizer.from_pretrained(directory)
    return [f"{name}: {sorted(map(str, found[name]))[:2]}" for name in REPORTED if found.get(name)]


def refusal(directory):
    """What loading raises; None where it does not."""
    try:
        load(directory)
    except Exception as error:  # noqa: BLE001 - whatever it raises
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("done", REFUSED)
def test_transformers_refuses_what_a_rule_says_it_refuses(done, copy):
    """A fault whose rule names transformers 5 among those that refuse it: loading ends with an error."""
    kind, _, fault = FAULTS[done]
    directory = copy(kind)
    fault(directory)
    assert refusal(directory), f"transformers {transformers.__version__} loads it"


@pytest.mark.parametrize("done", MISREAD)
def test_transformers_reports_tensors_that_a_rule_says_it_misreads(done, copy):
    """A fault of names or tensors that it loads all the same, with random values, or without what is stored."""
    kind, _, fault = FAULTS[done]
    directory = copy(kind)
    fault(directory)
    assert refusal(directory) or load(directory), f"transformers {transformers.__version__} loads it without a word"


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in FAULTS.values()} - {"awq", "fp8", "gguf"}))
def test_transformers_says_nothing_of_good_releases(kind, good):
    """The other way round; FP8 and AWQ need kernels that are not here, and GGUF is loaded by the name of its file."""
    assert load(good(kind)) == []
