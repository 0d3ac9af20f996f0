"""The rules as data: who refuses what, where it was seen, and the page that lists them."""

import re

import pytest

from tests.rules_page import PAGE, written
from workers.releases.checks.checking import RULES
from workers.releases.checks.rules import Engine, Rule, Severity, finding, for_engine


def test_the_page_lists_the_rules():
    """`docs/checking.md` has a row for each rule, as it is."""
    assert PAGE.read_text() == written(PAGE.read_text()), "run: python -m tests.rules_page"


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.id)
def test_a_rule_says_who_where_and_what_to_do(rule):
    """Stable ids, advice, and a source that names a library with a file, or a public thread."""
    assert re.fullmatch(r"[a-z]+\.[a-z-]+", rule.id)
    assert rule.advice
    assert not rule.advice.endswith(".")
    assert re.search(r"\.py|issues? \d+|pull requests? \d+|user guide|safetensors 0\.8", rule.source)
    assert not set(rule.refused_by) & set(rule.misread_by)
    if rule.severity is Severity.ERROR:
        assert rule.refused_by or rule.misread_by or rule.id == "index.wrong-shard"


def test_ids_are_not_given_twice():
    """One rule, one id."""
    assert len(RULES) == len({id(rule) for rule in RULES.values()})


def rule(severity, refused=(), misread=()):
    return Rule(
        id="x.y", what="w", severity=severity, refused_by=refused, misread_by=misread, advice="do", source="issue 1"
    )


def test_what_an_engine_refuses_is_an_error_to_it():
    """Refused: an error. Misread: a warning, or worse. Neither: left out; of no engine: as it is."""
    for_all = rule(Severity.WARNING)
    refused = rule(Severity.NOTE, refused=(Engine.VLLM,))
    misread = rule(Severity.NOTE, misread=(Engine.VLLM,))
    worse = rule(Severity.ERROR, misread=(Engine.VLLM,))
    found = tuple(finding(each, "f", found="a", expected="b") for each in (for_all, refused, misread, worse))
    assert [each.severity for each in for_engine(found, Engine.VLLM)] == [
        Severity.WARNING,
        Severity.ERROR,
        Severity.WARNING,
        Severity.ERROR,
    ]
    assert [each.rule for each in for_engine(found, Engine.BEDROCK)] == [for_all]
