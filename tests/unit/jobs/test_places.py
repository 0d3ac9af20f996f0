"""Places: what locations are in, and what covers them."""

from pathlib import Path

import pytest

from jobs.errors import InvalidValueError
from jobs.locations import parse_location
from jobs.places import bucket_place, file_place, is_covered, locations_of, node_place, parse_place, place_of
from jobs.request import MergeRequest


@pytest.mark.parametrize(
    ("location", "place"),
    [("s3://bucket/a/b", "s3://bucket"), ("hf://org/name@v1", "hf://"), ("/mnt/a", "file:///mnt/a")],
)
def test_every_location_is_in_a_place_that_covers_it(location, place):
    parsed = parse_location(location)
    assert place_of(parsed) == place
    assert is_covered(parsed, place)


@pytest.mark.parametrize(
    ("location", "place", "expected"),
    [
        ("s3://bucket/a", "s3://bucket", True),
        ("s3://bucket2/a", "s3://bucket", False),
        ("s3://bucket/a", "hf://", False),
        ("hf://org/name", "hf://", True),
        ("hf://org/name", "file:///", False),
        ("/mnt/a/b", "file:///mnt", True),
        ("/mnt/a", "file:///mnt/a", True),
        ("/mnt/ab", "file:///mnt/a", False),
        ("/mnt", "file:///mnt/a", False),
        ("/mnt/a", "file:///", True),
        ("/MNT/a", "file:///mnt", False),
        ("/mnt/a", "s3://mnt", False),
        ("/mnt/a", "node:host", False),
        ("hf://org/name", "node:host", False),
    ],
)
def test_covering(location, place, expected):
    assert is_covered(parse_location(location), place) is expected


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/some/prefix", "s3://bucket"),
        ("hf", "hf://"),
        ("hf://", "hf://"),
        ("hf://org/name", "hf://"),
        ("/mnt/releases", "file:///mnt/releases"),
        ("/mnt/releases/", "file:///mnt/releases"),
        ("file:///mnt/releases", "file:///mnt/releases"),
        ("/", "file:///"),
        ("node:10.0.0.7", "node:10.0.0.7"),
    ],
)
def test_what_people_write(text, place):
    assert parse_place(text) == place
    assert parse_place(place) == place


@pytest.mark.parametrize("text", ["", "s3://", "s3://B", "node:", "ftp://host/x", "hf://a/b/../c"])
def test_what_is_no_place(text):
    with pytest.raises(InvalidValueError, match="a place: s3://bucket, hf://, a directory or node:NAME"):
        parse_place(text)


def test_their_names():
    assert (bucket_place("b"), file_place(Path("/mnt")), node_place("x")) == ("s3://b", "file:///mnt", "node:x")


def test_a_request_is_in_the_places_of_all_it_names():
    request = MergeRequest(
        base="/models/base",
        adapters=[{"adapter": "hf://org/a"}, {"adapter": "s3://bucket/a"}],
        combination={"type": "linear"},
        destination="s3://releases/x",
    )
    assert {place_of(location) for location in locations_of(request)} == {
        "file:///models/base",
        "hf://",
        "s3://bucket",
        "s3://releases",
    }
