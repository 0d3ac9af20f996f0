"""A release is taken as it is, or not at all."""

import tracemalloc
from pathlib import Path

import pytest

from jobs.errors import BadInputError, DestinationOccupiedError, NotFoundError
from jobs.locations import LocalPath
from jobs.release import MANIFEST_NAME, Manifest
from tests.releases import SHARD, make_files, make_manifest, write_files
from workers.delivery import pull_release, verify_release
from workers.released import encode_manifest

FILES = make_files()


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
    files = {"model.safetensors": bytes(200 << 20)}
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
