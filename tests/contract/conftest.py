"""The three kinds of destination, one after the other, each free at first."""

import itertools
from pathlib import Path

import pytest

from tests.contract.places import DirectoryPlace, HubPlace, Place, S3Place

_numbers = itertools.count()


@pytest.fixture(params=["directory", pytest.param("s3", marks=pytest.mark.s3), "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    name = f"r{next(_numbers)}n"  # with a number after it, it is no other test's
    if request.param == "directory":
        return DirectoryPlace(tmp_path)
    if request.param == "s3":
        return S3Place(tmp_path, request.getfixturevalue("s3"), f"team/{name}")
    return HubPlace(tmp_path, request.getfixturevalue("hub"), name)
