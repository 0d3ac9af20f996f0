"""Every method of the installed PEFT is either merged or refused by name; a new PEFT with a new one fails here."""

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

from tests.methods import METHODS
from workers.adapters.methods import MERGED, REFUSED, SHAPED_BY_VALUES, WEIGHED

OFFERED = {method.value for method in PEFT_TYPE_TO_TUNER_MAPPING}


def test_every_method_of_the_installed_peft_is_known():
    assert MERGED | REFUSED.keys() == OFFERED, f"PEFT {peft.__version__}"
    assert not MERGED & REFUSED.keys()
    assert SHAPED_BY_VALUES <= WEIGHED <= MERGED


def test_what_is_refused_is_what_peft_cannot_merge():
    mergeable = {
        method.value
        for method, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if issubclass(tuner, BaseTuner) and hasattr(tuner, "merge_and_unload")
    }
    assert len(mergeable) == 38
    assert mergeable - MERGED == {"LILY", "POLY", "SHADOW", "XLORA"}
    assert mergeable >= MERGED


def test_there_is_an_adapter_to_try_of_every_method_that_is_merged():
    assert METHODS.keys() >= MERGED


@pytest.mark.parametrize("method", sorted(REFUSED))
def test_a_reason_is_given_for_each_refusal(method):
    assert PeftType(method)
    assert REFUSED[method]
