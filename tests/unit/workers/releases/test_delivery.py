"""A release is taken as it is, or not at all."""

import hashlib
import json
import math
import os
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.errors import BadInputError, DestinationOccupiedError, NotFoundError
from jobs.locations import LocalPath
from jobs.release import MANIFEST_NAME, REPORT_NAME, Manifest
from tests.releases import SHARD, make_files, make_manifest, write_files
from workers.releases.delivery import pull_release, verify_release
from workers.releases.released import encode_manifest
from workers.releases.sinks.directory import DirectorySink

FILES = make_files()
WHOLE = {"config.json": b"{}", REPORT_NAME: FILES[REPORT_NAME], "model.safetensors": b"weights"}
"""The least that a release has."""
REPORT = json.loads(FILES[REPORT_NAME])


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_release(tmp_path / "release", FILES)


def write_release(directory: Path, files: dict[str, bytes], manifest: Manifest | None = None) -> Path:
    write_files(directory, files | {MANIFEST_NAME: encode_manifest(manifest or make_manifest(files)).data})
    return directory


def test_every_difference_is_listed_at_once(release: Path, tmp_path: Path) -> None:
    flipped = bytearray(FILES[SHARD])
    flipped[len(flipped) // 2] ^= 1
    (release / SHARD).write_bytes(flipped)
    (release / "model-00002-of-00002.safetensors").write_bytes(b"cut")
    (release / "config.json").unlink()
    (release / "extra.bin").write_bytes(b"?")

    with pytest.raises(BadInputError) as caught:
        verify_release(LocalPath(release), tmp_path / "scratch")

    head, *lines = str(caught.value).splitlines()
    assert head == f"{release} is not what its manifest says, do not deploy it:"
    assert [line.split(":")[0].strip() for line in lines] == [
        "config.json",
        "extra.bin",
        SHARD,
        "model-00002-of-00002.safetensors",
    ]
    assert "3 bytes, expected 70000" in lines[3]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_files_are_never_whole_in_memory(tmp_path: Path) -> None:
    large = tmp_path / "large"
    files = WHOLE | {"model.safetensors": bytes(200 << 20)}
    write_release(large, files)
    del files
    tracemalloc.start()
    verify_release(LocalPath(large), tmp_path / "scratch")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"schema": 2}', b"\xff\xfe"])
def test_manifest_of_something_else(tmp_path: Path, data: bytes) -> None:
    write_files(tmp_path / "r", {MANIFEST_NAME: data})
    with pytest.raises(BadInputError, match=r"manifest\.json is no manifest of mergefleet"):
        verify_release(LocalPath(tmp_path / "r"), tmp_path / "scratch")


def test_manifest_that_names_files_elsewhere(tmp_path: Path) -> None:
    data = encode_manifest(make_manifest({"config.json": b"{}"})).data.replace(b"config.json", b"../config.json")
    write_files(tmp_path / "r", {MANIFEST_NAME: data})
    with pytest.raises(BadInputError, match="plain relative file name"):
        pull_release(LocalPath(tmp_path / "r"), tmp_path / "pulled")


def test_no_release_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        verify_release(LocalPath(tmp_path / "missing"), tmp_path / "scratch")
    write_files(tmp_path / "other", {"readme": b"x"})
    with pytest.raises(NotFoundError, match=r"expected manifest\.json, found readme"):
        verify_release(LocalPath(tmp_path / "other"), tmp_path / "scratch")


def test_pull_again_checks_what_is_there(release: Path, tmp_path: Path) -> None:
    pulled = tmp_path / "pulled"
    first = pull_release(LocalPath(release), pulled)
    identity = (pulled / SHARD).stat().st_ino

    assert pull_release(LocalPath(release), pulled) == first
    assert (pulled / SHARD).stat().st_ino == identity

    (pulled / "config.json").write_bytes(b"{}")
    with pytest.raises(BadInputError, match=rf"{pulled} is not what its manifest says"):
        pull_release(LocalPath(release), pulled)


def test_pull_refuses_a_directory_with_something_else(release: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "pulled", {"mine.txt": b"x"})
    with pytest.raises(DestinationOccupiedError, match=r"mine\.txt"):
        pull_release(LocalPath(release), tmp_path / "pulled")

    other = write_release(tmp_path / "other", {"config.json": b"{}"})
    with pytest.raises(DestinationOccupiedError, match="something other than this release"):
        pull_release(LocalPath(release), other)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "pulled", "release"]


def test_pull_into_an_empty_directory(release: Path, tmp_path: Path) -> None:
    (tmp_path / "pulled").mkdir()
    pull_release(LocalPath(release), tmp_path / "pulled")
    verify_release(LocalPath(tmp_path / "pulled"), tmp_path / "scratch")


def test_a_damaged_release_does_not_arrive(release: Path, tmp_path: Path) -> None:
    (release / "tokenizer.json").write_bytes(bytes(len(FILES["tokenizer.json"])))
    with pytest.raises(BadInputError, match=r"tokenizer\.json: SHA-256"):
        pull_release(LocalPath(release), tmp_path / "pulled")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def _replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)


ODDITIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "link": (lambda path: _replace(path / "config.json", lambda one: one.symlink_to("tokenizer.json")),
             "config.json: is a symbolic link, expected a regular file"),
    "link to a directory": (lambda path: (path / "more").symlink_to("/etc"),
                            "more: is a symbolic link, expected a regular file"),
    "link to nothing": (lambda path: (path / "more").symlink_to("none"),
                        "more: is a symbolic link, expected a regular file"),
    "fifo": (lambda path: _replace(path / "empty.txt", os.mkfifo),
             "empty.txt: is a FIFO, a socket or a device, expected a regular file"),
    "empty directory": (lambda path: (path / "a" / "b").mkdir(parents=True),
                        "a/b: is an empty directory, which no release holds"),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ODDITIES)
def test_what_has_no_place_in_a_release_is_told(release: Path, tmp_path: Path, kind: str) -> None:
    damage, expected = ODDITIES[kind]
    damage(release)
    for check in (verify_release, pull_release):
        with pytest.raises(BadInputError) as caught:
            check(LocalPath(release), tmp_path / "elsewhere")
        assert str(caught.value).splitlines()[1:] == [f"  {expected}"]


@pytest.mark.timeout(30)
def test_manifest_that_is_no_file(tmp_path: Path) -> None:
    for name, make in (("fifo", os.mkfifo), ("link", lambda path: path.symlink_to("/etc/hostname"))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / MANIFEST_NAME)
        with pytest.raises(BadInputError, match=r"manifest\.json is a .*, expected a regular file; do not deploy it"):
            verify_release(LocalPath(tmp_path / name), tmp_path / "scratch")
        with pytest.raises(DestinationOccupiedError, match=r"a manifest\.json that is no regular file"):
            DirectorySink(LocalPath(tmp_path / name)).existing()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 2, "news": 1}, "has schema 2, and this mergefleet reads up to 1; use the version that wrote it"),
        ({"files": "twice"}, r"names config\.json more than once, expected each file once"),
        (
            {"files": "other case"},
            r"names Config\.json, config\.json more than once, .* upper and lower case and forms of one letter taken",
        ),
        ({"files": "other form"}, "names e\u0301, \xe9 more than once"),
        ({"files": "itself"}, "names itself, which no manifest of mergefleet does"),
    ],
    ids=["newer", "twice", "other case", "other form", "itself"],
)
def test_manifest_that_cannot_be_true(release: Path, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    found = json.loads((release / MANIFEST_NAME).read_text())
    first = found["files"][0]
    if change.get("files"):
        more = {
            "twice": first,
            "other case": first | {"path": "Config.json"},
            "itself": first | {"path": MANIFEST_NAME},
        }
        forms = [first | {"path": name} for name in ("e\u0301", "\u00e9")]
        added = forms if change["files"] == "other form" else [more[change["files"]]]
        change = {"files": [*found["files"], *added]}
    (release / MANIFEST_NAME).write_text(json.dumps(found | change))
    with pytest.raises(BadInputError, match=expected):
        verify_release(LocalPath(release), tmp_path / "scratch")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"merge_key": "b" * 64}, f"merge_key is {'b' * 64}, manifest.json says {'a' * 64}"),
        ({"adapter": "/adapters/other"}, "adapter is /adapters/other, manifest.json says /adapters/a"),
        ({"base_quantization": "nf4"}, "base_quantization is nf4, manifest.json says none"),
        ({"tensors": []}, "num_tensors is 0, manifest.json says 2"),
        ({"passed": False}, "says that parity did not pass"),
        ({"failures": ["x differs"]}, "names a failure: 'x differs'"),
        ({"tensors": [REPORT["tensors"][0] | {"num_bad_elements": 5}]}, "'x' has 5 elements above the bound"),
        ({"tensors": [REPORT["tensors"][0] | {"max_abs_error": math.nan}]}, "'x' has an error that is no number"),
        ({"schema": 2, "news": 1}, "has schema 2, and this mergefleet reads up to 1"),
        ({"passed": "maybe"}, "is no parity report of mergefleet: passed: Input should be a valid boolean"),
    ],
)  # fmt: skip
def test_report_that_says_something_else(tmp_path: Path, change: dict[str, Any], expected: str | None) -> None:
    files = WHOLE | {REPORT_NAME: json.dumps(REPORT | change).encode()}
    location = LocalPath(write_release(tmp_path / "release", files))
    for check in (verify_release, pull_release):
        if expected is None:
            check(location, tmp_path / "elsewhere")
            continue
        with pytest.raises(BadInputError) as caught:
            check(location, tmp_path / "elsewhere")
        assert f"\n  {REPORT_NAME}: {expected}" in str(caught.value)


def test_pull_takes_each_digest_once(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    class Counting:
        def __init__(self, data: bytes = b"") -> None:
            self._digest = hashlib.sha256()
            self.update(data)

        def update(self, data: bytes) -> None:
            hashed.append(len(data))
            self._digest.update(data)

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    monkeypatch.setattr("workers.releases.delivery.hashlib", SimpleNamespace(sha256=Counting))
    monkeypatch.setattr("workers.releases.released.sha256_of", lambda path: pytest.fail(f"{path} is read again"))
    pull_release(LocalPath(release), tmp_path / "pulled")
    assert sum(hashed) == sum(len(data) for data in FILES.values())


def test_pull_into_the_working_directory(release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BadInputError, match=r"is the working directory.* name one that does not exist yet"):
        pull_release(LocalPath(release), Path())
    write_files(tmp_path / "here", {"mine.txt": b"x"})
    with pytest.raises(DestinationOccupiedError, match=r"mine\.txt"):
        pull_release(LocalPath(release), Path())
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["mine.txt"]
    pull_release(LocalPath(release), Path("../here/../pulled"))
    monkeypatch.chdir(tmp_path / "pulled")
    assert pull_release(LocalPath(release), Path()) == verify_release(LocalPath(release), tmp_path / "scratch")


def test_pull_into_a_release(release: Path, tmp_path: Path) -> None:
    outer = write_release(tmp_path / "outer", WHOLE)
    with pytest.raises(DestinationOccupiedError, match=f"lies inside the release at {outer}"):
        pull_release(LocalPath(release), outer / "inner")
    verify_release(LocalPath(outer), tmp_path / "scratch")


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ({"config.json"}, ["config.json"]),
        ({REPORT_NAME}, [REPORT_NAME]),
        ({"model.safetensors"}, ["*.safetensors"]),
        (set(WHOLE), ["*.safetensors", "config.json", REPORT_NAME]),
    ],
)
def test_a_manifest_without_what_every_release_has(tmp_path: Path, gone: set[str], expected: list[str]) -> None:
    files = {name: data for name, data in WHOLE.items() if name not in gone}
    location = LocalPath(write_release(tmp_path / "release", files))
    for check in (verify_release, pull_release):
        with pytest.raises(BadInputError) as caught:
            check(location, tmp_path / "elsewhere")
        assert str(caught.value).splitlines()[1:] == [
            f"  {name}: not in the manifest, and every release has it" for name in expected
        ]


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b'{"weight_map": {"a": "model.safetensors"}}', None),
        (
            b'{"weight_map": {"a": "model.safetensors", "b": "gone.safetensors"}}',
            "names 'gone.safetensors', manifest.json",
        ),
        (b"[]", "is no index of safetensors files"),
    ],
)
def test_an_index_with_a_shard_that_no_manifest_names(tmp_path: Path, index: bytes, expected: str | None) -> None:
    location = LocalPath(write_release(tmp_path / "release", WHOLE | {"model.safetensors.index.json": index}))
    if expected is None:
        verify_release(location, tmp_path / "scratch")
        return
    with pytest.raises(BadInputError, match=re.escape(f"model.safetensors.index.json: {expected}")):
        verify_release(location, tmp_path / "scratch")


@pytest.mark.parametrize("name", [MANIFEST_NAME, REPORT_NAME])
def test_a_field_that_stands_twice(tmp_path: Path, name: str) -> None:
    twice = b'{"merge_key": "' + b"0" * 64 + b'",'
    report = FILES[REPORT_NAME].replace(b"{", twice, 1) if name == REPORT_NAME else FILES[REPORT_NAME]
    release = write_release(tmp_path / "release", WHOLE | {REPORT_NAME: report})
    if name == MANIFEST_NAME:
        data = (release / name).read_bytes()
        (release / name).write_bytes(data.replace(b"{", twice, 1))
    with pytest.raises(BadInputError, match=rf"{name}:? names the field 'merge_key' twice"):
        verify_release(LocalPath(release), tmp_path / "scratch")
