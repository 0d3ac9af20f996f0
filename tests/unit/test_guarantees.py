"""Every promise has tests that hold it, and they exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PAGE = (ROOT / "docs" / "guarantees.md").read_text()
HELD_BY = PAGE.split("## Held by")[1]


def promises_of(text):
    return re.findall(r"^(?:-|\d\.) \*\*([^*]+)\.\*\*", text, flags=re.MULTILINE)


def test_every_named_test_exists():
    missing, path = [], None
    for named in re.findall(r"`((?:[\w/]+\.py)?(?:::\w+)?)`", HELD_BY):
        file, _, test = named.partition("::")
        path = TESTS / file if file else path
        if path is None or not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            missing.append(named)
    assert missing == []


def test_every_promise_has_a_row_of_tests():
    promises = promises_of(PAGE.split("## What is guaranteed")[1].split("## What is not")[0])
    assert promises
    assert [promise for promise in promises if f"**{promise}**" not in HELD_BY] == []


def test_every_promise_of_the_readme_is_on_the_page():
    promises = promises_of((ROOT / "README.md").read_text().split("## What is guaranteed")[1])
    assert promises
    told = {promise.casefold() for promise in promises_of(PAGE)}
    assert [one for promise in promises for one in promise.casefold().split(", ") if one not in told] == []
