"""What only the directory sink has to stand: files in the way, links, and files touched after they were checked."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.errors import BadInputError, DestinationOccupiedError, InternalError
from jobs.locations import LocalPath
from jobs.release import Artifact, Manifest
from tests.releases import fill, make_files
from workers.files.local import FileState
from workers.releases.sinks.directory import DirectorySink, DirectoryStaging

KEY = "a" * 64
FILES = {name: data for name, data in make_files().items() if not name.endswith(".safetensors")}


def stage(destination: Path) -> tuple[DirectoryStaging, Manifest]:
    staging = DirectorySink(LocalPath(destination)).open(KEY)
    return staging, fill(staging, FILES)


def test_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    staging, manifest = stage(tmp_path / "r")
    assert staging.publish(manifest).created
    staging.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_what_an_attempt_leaves_that_dies_when_it_has_published_is_removed(tmp_path: Path) -> None:
    staging, manifest = stage(tmp_path / "r")
    staging.publish(manifest)
    alive, _ = stage(tmp_path / "other")
    staging._owned.abandon()
    assert len(list(tmp_path.iterdir())) == 4
    assert DirectorySink(LocalPath(tmp_path / "r")).clear(staging.directory.name, unused=False)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"r", alive.directory.name, f"{alive.directory.name}.lock"}
    alive.discard()


def test_directory_filled_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    staging, manifest = stage(tmp_path / "r")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "theirs").write_text("theirs")

    with pytest.raises(DestinationOccupiedError, match="theirs"):
        staging.publish(manifest)
    staging.discard()

    assert [path.name for path in tmp_path.rglob("*")] == ["r", "theirs"]


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("a file")
    with pytest.raises(DestinationOccupiedError, match="is a file"):
        DirectorySink(LocalPath(tmp_path / "r")).existing()
    with pytest.raises(BadInputError, match=str(tmp_path / "r")):
        DirectorySink(LocalPath(tmp_path / "r" / "deeper")).open(KEY)


def test_link_that_leads_back_to_itself(tmp_path: Path) -> None:
    (tmp_path / "r1").symlink_to("r1")
    for ask in (
        DirectorySink(LocalPath(tmp_path / "r1")).existing,
        lambda: DirectorySink(LocalPath(tmp_path / "r1")).open("a" * 64),
    ):
        with pytest.raises(DestinationOccupiedError, match="is a link that leads back to itself"):
            ask()


def test_link_to_a_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "disk" / "r")
    staging, manifest = stage(tmp_path / "r")

    assert staging.publish(manifest).created
    staging.discard()

    assert (tmp_path / "r").is_symlink()
    assert DirectorySink(LocalPath(tmp_path / "disk" / "r")).existing() == manifest


def _flip(directory: Path) -> None:
    (directory / "config.json").write_bytes(b'{"seed": 9}\n')


def _add(directory: Path) -> None:
    (directory / "notes.txt").write_bytes(b"unannounced")


@pytest.mark.parametrize(("touch", "name"), [(_flip, "config.json"), (_add, "notes.txt")])
def test_what_was_not_checked_is_not_published(tmp_path: Path, touch: Callable[[Path], None], name: str) -> None:
    staging, manifest = stage(tmp_path / "r")
    touch(staging.directory)

    with pytest.raises(InternalError, match=rf"{name} was written without put, or after it"):
        staging.publish(manifest)
    staging.discard()

    assert list(tmp_path.iterdir()) == []


def test_file_in_the_state_it_was_hashed_in_is_not_read_again(tmp_path: Path) -> None:
    staging = DirectorySink(LocalPath(tmp_path / "release")).open(KEY)
    path = staging.directory / "model.safetensors"
    path.write_bytes(b"as it was hashed")
    state = FileState.of(path.stat())
    # Nothing but a read could tell that this is not its digest.
    artifact = Artifact(path=path.name, num_bytes=16, sha256="0" * 64)
    staging.put(artifact, state)
    with pytest.raises(InternalError, match="has SHA-256"):
        staging.put(artifact)
    staging.discard()


def test_file_written_to_since_it_was_hashed_is_read_again(tmp_path: Path) -> None:
    staging = DirectorySink(LocalPath(tmp_path / "release")).open(KEY)
    path = staging.directory / "model.safetensors"
    path.write_bytes(b"as it was hashed")
    state = FileState.of(path.stat())
    artifact = Artifact(path=path.name, num_bytes=16, sha256=hashlib.sha256(b"as it was hashed").hexdigest())
    time.sleep(0.02)
    path.write_bytes(b"as it is by now!")
    with pytest.raises(InternalError, match="has SHA-256"):
        staging.put(artifact, state)
    time.sleep(0.02)
    path.write_bytes(b"as it was hashed")
    staging.put(artifact, state)
    staging.discard()
