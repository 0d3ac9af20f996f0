"""Each fault is found under its rule, and nothing else is called an error because of it."""

import pytest

from tests.faults import FAULTS
from tests.models import build_llama, make_adapter
from workers.releases.checks.checking import RULES, check_checkpoint
from workers.releases.checks.rules import Severity


@pytest.mark.parametrize("done", FAULTS)
def test_a_fault_is_named_and_no_other_error(done, copy):
    """A good release, broken in one way: its rule is found, and no other error or warning."""
    kind, rule, fault = FAULTS[done]
    directory = copy(kind)
    fault(directory)
    found = check_checkpoint(directory)
    assert rule in {each.rule.id for each in found}, [each.sentence for each in found]
    others = [each.sentence for each in found if each.severity is not Severity.NOTE and each.rule.id != rule]
    assert others == []
    named = next(each for each in found if each.rule.id == rule)
    assert named.file
    assert named.found
    assert named.expected
    assert str(directory) not in named.sentence


def test_an_adapter_alone_is_told_to_be_one(tmp_path):
    """Nothing asks to remove its files, as where they stand beside merged weights."""
    adapter = make_adapter(build_llama(tmp_path / "base"), tmp_path / "adapter")
    found = [each for each in check_checkpoint(adapter) if each.severity is not Severity.NOTE]
    assert [each.rule.id for each in found] == ["files.no-config"]
    assert "an adapter alone" in found[0].found


def test_every_rule_has_a_fault():
    """No rule stands there that no test shows at work; but for the sizes of an import, which take 100 GB."""
    shown = {rule for _, rule, _ in FAULTS.values()}
    assert RULES.keys() - shown == {"bedrock.size", "config.rope-new"}
