"""The libraries that are followed bit for bit are those of the table in docs/followed.md, bounded and installed."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| ([\w-]+) \| ([\d.]+) \| .* \| (.*) \| (.*) \|$", (ROOT / "docs" / "followed.md").read_text(), re.MULTILINE
)
REQUIREMENTS = {
    requirement.name: requirement
    for requirement in map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
}


@pytest.mark.parametrize(("name", "followed", "places", "suites"), ROWS, ids=[row[0] for row in ROWS])
def test_a_library_that_moves_is_looked_at(name, followed, places, suites):
    installed = importlib.metadata.version(name)
    advice = (
        f"{name} {installed}: docs/followed.md has {followed}; look at {places}, run {suites}, then change the table"
    )
    assert installed.startswith(followed), advice
    major, minor = Version(followed).release[:2]
    bound = REQUIREMENTS[name].specifier
    assert not bound.contains(f"{major}.{minor + 1}"), f"{name} has no upper bound in pyproject.toml"
    assert bound.contains(installed)


def test_every_upper_bound_has_its_row():
    bounded = {name for name, each in REQUIREMENTS.items() if any(part.operator == "<" for part in each.specifier)}
    assert bounded == {row[0] for row in ROWS}


@pytest.mark.parametrize(
    "place", sorted({place for row in ROWS for place in re.findall(r"`([\w/.]*/[\w/.]*)`", row[2])})
)
def test_places_that_are_named_exist(place):
    assert (ROOT / place).exists()
