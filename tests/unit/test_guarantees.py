"""The tests that docs/guarantees.md names are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "guarantees.md"


def test_every_named_test_exists():
    missing, path = [], None
    for named in re.findall(r"`((?:[\w/]+\.py)?(?:::\w+)?)`", PAGE.read_text()):
        file, _, test = named.partition("::")
        path = TESTS / file if file else path
        if path is None or not path.is_file() or (test and f"def {test}(" not in path.read_text()):
            missing.append(named)
    assert missing == []


def test_every_promise_of_the_readme_is_there():
    readme = (TESTS.parent / "README.md").read_text().split("## What is guaranteed")[1].split("\nNot guaranteed")[0]
    promises = re.findall(r"^- \*\*([^*]+)\.\*\*", readme, flags=re.MULTILINE)
    assert promises
    assert [promise for promise in promises if f"**{promise}**" not in PAGE.read_text()] == []
