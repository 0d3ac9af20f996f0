"""Names of batches and durations, as people write them."""

import pytest

from jobs.batch import batch_name
from jobs.durations import parse_duration
from jobs.errors import InvalidValueError


@pytest.mark.parametrize("name", ["night", "2026-01-31", "a", "a.b_c-d", "x" * 128])
def test_names_that_people_give_are_kept(name):
    assert batch_name(name, given=True) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "x" * 129, "é"])
def test_names_that_people_give_are_refused_rather_than_changed(name):
    with pytest.raises(InvalidValueError, match="a batch of 1 to 128 letters"):
        batch_name(name, given=True)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("night.yaml", "night.yaml"),
        ("my batch (2)", "my-batch-2-"),
        ("..hidden", "hidden"),
        ("éé", "batch"),
        ("", "batch"),
    ],
)
def test_names_of_files_become_names_of_batches(file, name):
    assert batch_name(file, given=False) == name
    assert batch_name(name, given=True) == name


def test_long_names_of_files_are_cut():
    assert batch_name("x" * 500, given=False) == "x" * 128


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("1.5h", 5400), ("3d", 259_200), ("2 min", 120), ("2m", 120), ("1w", 604_800), (" 5 s ", 5)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "90", "s", "-1s", "1e3s", "1y", "1h30m", "٣s"])
def test_what_is_no_duration(text):
    with pytest.raises(InvalidValueError, match="a number with s, m, h, d or w"):
        parse_duration(text)
