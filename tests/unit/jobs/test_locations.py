"""Locations: directories, S3 prefixes and Hub repositories, parsed, joined and nested."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from jobs.errors import InvalidValueError
from jobs.locations import HubRepo, LocalPath, LocationField, S3Prefix, enclosing, parse_location

names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
parts = names.filter(lambda name: name not in (".", ".."))
locations = st.one_of(
    st.builds(lambda tail: LocalPath(Path("/", *tail)), st.lists(parts, max_size=4)),
    st.builds(
        lambda bucket, tail: S3Prefix(bucket, "/".join(tail)),
        st.from_regex(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", fullmatch=True),
        st.lists(parts, min_size=1, max_size=4),
    ),
    st.builds(
        lambda owner, name, revision, tail: HubRepo(f"{owner}/{name}", revision, "/".join(tail)),
        names.filter(lambda name: name not in ("datasets", "models", "spaces")),
        names,
        names,
        st.lists(st.one_of(parts, st.sampled_from(["a b", ".hidden", "[1]", "%2f", "été", "a:b"])), max_size=4),
    ),
)


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("/models/llama", LocalPath(Path("/models/llama"))),
        ("/models/../bases/llama/", LocalPath(Path("/bases/llama"))),
        ("//models/llama", LocalPath(Path("/models/llama"))),
        ("//", LocalPath(Path("/"))),
        ("s3://bucket/a/b", S3Prefix("bucket", "a/b")),
        ("s3://bucket/a/b/", S3Prefix("bucket", "a/b")),
        ("hf://org/name", HubRepo("org/name", "main")),
        ("hf://org/name@refs/pr/1", HubRepo("org/name", "refs/pr/1")),
        ("hf://gpt2@v1.0", HubRepo("gpt2", "v1.0")),
        ("hf://org/name/a", HubRepo("org/name", "main", "a")),
        ("hf://org/name/a/", HubRepo("org/name", "main", "a")),
        ("hf://org/name/a/checkpoint-5@v1", HubRepo("org/name", "v1", "a/checkpoint-5")),
        ("hf://org/name/a@refs/pr/1", HubRepo("org/name", "refs/pr/1", "a")),
    ],
)
def test_parses(text, location):
    assert parse_location(text) == location


@given(locations)
def test_what_is_written_is_read_back(location):
    assert parse_location(str(location)) == location


def test_relative_paths_are_taken_from_the_given_directory(tmp_path):
    assert parse_location("a/../b", tmp_path) == LocalPath(tmp_path / "b")
    assert parse_location("b") == LocalPath(Path.cwd() / "b")
    assert parse_location("b", Path("here")) == LocalPath(Path.cwd() / "here" / "b")


def test_a_home_directory_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse_location("~/models") == LocalPath(Path("/home/somebody/models"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " /models",
        "/models\n",
        "/a\0b",
        "/a\x1bb",
        "/a\udcffb",
        "~nobody-of-this-name/models",
        "https://host/model",
        "s3:/bucket/prefix",
        "S3://bucket/prefix",
        "hf:org/name",
        "ftp://host/x",
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3://UPPER/x",
        "s3://b/x",
        "s3://bucket\n/x",
        "s3://bucket//x",
        "s3://bucket/a/../b",
        "hf://",
        "hf://a/b//c",
        "hf://a/b//",
        "hf://org//",
        "hf://a/b/../c",
        "hf://a/b/.@v1",
        "hf://a/b/c-*",
        "hf://a/b/c?",
        "hf://a/b/c@",
        "hf://a/b/c@v1@v2",
        "hf://datasets/org/name",
        "hf://models/org/name",
        "hf://org/",
        "hf://../name",
        "hf://org/name@",
        "hf://org/name@-x",
        "hf://org/name@a b",
    ],
)
def test_refuses(text):
    with pytest.raises(InvalidValueError, match=r"expected .*, found "):
        parse_location(text)


def test_children_and_names():
    assert parse_location("/a/b").child("c") == LocalPath(Path("/a/b/c"))
    assert parse_location("s3://bucket/a").child("c") == S3Prefix("bucket", "a/c")
    assert parse_location("hf://org/a@v1").child("c") == HubRepo("org/a-c", "v1")
    assert parse_location("hf://org/a/b@v1").child("c") == HubRepo("org/a", "v1", "b/c")
    places = ("/a/b", "s3://bucket/a/b", "hf://org/b@v1", "hf://org/x/a/b@v1")
    assert [parse_location(text).name for text in places] == ["b", "b", "b", "b"]


@given(locations, st.lists(parts, min_size=1, max_size=3))
def test_a_folder_lies_inside_and_has_the_place_around_it(location, tail):
    inner = location.folder("/".join(tail))
    assert inner.is_inside(location)
    assert not location.is_inside(inner)
    assert inner.name == tail[-1]
    assert location in inner.ancestors()
    assert list(enclosing(str(inner))) == [str(place) for place in inner.ancestors()]


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("//a/b", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/a/b", False),
        ("s3://bucket/a/b", "s3://bucket/a", True),
        ("s3://bucket/ab", "s3://bucket/a", False),
        ("s3://other/a/b", "s3://bucket/a", False),
        ("s3://bucket/a", "/a", False),
        ("hf://org/a@v1", "hf://org/a@v1", True),
        ("hf://org/a@v2", "hf://org/a@v1", False),
        ("hf://org/a/x@v1", "hf://org/a@v1", True),
        ("hf://org/a/x/y@v1", "hf://org/a/x@v1", True),
        ("hf://org/a/xy@v1", "hf://org/a/x@v1", False),
        ("hf://org/a@v1", "hf://org/a/x@v1", False),
        ("hf://org/a/x@v1", "hf://org/a/x@v2", False),
        ("hf://org/ab/x@v1", "hf://org/a@v1", False),
    ],
)
def test_is_inside(inner, outer, expected):
    assert parse_location(inner).is_inside(parse_location(outer)) is expected


@pytest.mark.parametrize(
    ("text", "around"),
    [
        ("/a/b/c", ["/a/b", "/a", "/"]),
        ("/a", ["/"]),
        ("/", []),
        ("s3://bucket/a/b/c", ["s3://bucket/a/b", "s3://bucket/a"]),
        ("s3://bucket/a", []),
        ("hf://org/a@v/1", []),
        ("hf://org/a/b/c@v/1", ["hf://org/a/b@v/1", "hf://org/a@v/1"]),
    ],
)
def test_places_around(text, around):
    assert list(enclosing(text)) == around
    assert [str(place) for place in parse_location(text).ancestors()] == around


def test_a_model_field_reads_text_relative_to_its_context(tmp_path):
    class Place(BaseModel):
        at: LocationField

    place = Place.model_validate({"at": "b"}, context={"relative_to": tmp_path})
    assert place.at == LocalPath(tmp_path / "b")
    assert Place.model_validate_json(place.model_dump_json()) == place
    with pytest.raises(ValueError, match="expected a location as text, found int"):
        Place.model_validate({"at": 3})
