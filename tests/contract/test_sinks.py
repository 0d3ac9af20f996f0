"""What every sink promises, kept by the real thing: a file system, SeaweedFS, and huggingface_hub against a Hub."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobs.errors import BadInputError, DestinationOccupiedError, InternalError, NotFoundError
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from tests.contract.places import (
    Place,
    content,
    putting_process,
    sink_of,
    wait_until,
)
from tests.releases import SHARD, fill, make_files, make_manifest, write_files
from workers.releases.delivery import pull_release, verify_release
from workers.releases.sinks import Staging

KEY, OTHER_KEY = "a" * 64, "d" * 64
FILES, OTHER_FILES = make_files(), make_files(seed=1, merge_key=OTHER_KEY)


def stage(place: Place, files: dict[str, bytes] = FILES, merge_key: str = KEY) -> tuple[Staging, Manifest]:
    """Open a staging and put all files; the manifest is what is left to publish."""
    staging = sink_of(place).open(merge_key)
    return staging, fill(staging, files, merge_key)


def release(place: Place, files: dict[str, bytes] = FILES, merge_key: str = KEY) -> Release:
    staging, manifest = stage(place, files, merge_key)
    try:
        return staging.publish(manifest)
    finally:
        staging.discard()


def test_free_place_has_nothing(place: Place) -> None:
    assert sink_of(place).existing() is None


def test_nothing_is_visible_until_published_and_then_everything(place: Place) -> None:
    staging, manifest = stage(place)
    assert place.visible() == {}
    assert sink_of(place).existing() is None

    published = staging.publish(manifest)
    staging.discard()

    assert published.created
    assert published.location == place.location
    assert content(place) == FILES
    assert sink_of(place).existing() == manifest == published.manifest
    assert verify_release(place.location, place.scratch) == manifest
    assert place.leftovers() == []


def test_same_release_again_is_a_success_that_changes_nothing(place: Place) -> None:
    first = release(place)
    before = place.visible()

    second = release(place)

    assert (first.created, second.created) == (True, False)
    assert second.manifest_sha256 == first.manifest_sha256
    assert place.visible() == before
    assert place.leftovers() == []


def test_another_release_is_refused_and_changes_nothing(place: Place) -> None:
    release(place)
    before = place.visible()

    with pytest.raises(DestinationOccupiedError, match=r"merge key aaaa.*expected dddd.*another destination"):
        release(place, OTHER_FILES, OTHER_KEY)

    assert place.visible() == before
    assert place.leftovers() == []


@pytest.mark.parametrize("name", ["weights.bin", MANIFEST_NAME])
def test_foreign_content_is_refused(place: Place, name: str) -> None:
    place.write(name, b'{"not": "ours"}')

    with pytest.raises(DestinationOccupiedError, match=name):
        sink_of(place).existing()
    with pytest.raises(DestinationOccupiedError, match=name):
        release(place)

    assert content(place) == ({} if name == MANIFEST_NAME else {name: b'{"not": "ours"}'})
    assert place.leftovers() == []


def race(place: Place, entries: list[tuple[dict[str, bytes], str]]) -> list[Release | Exception]:
    """Publish several releases at the same moment, each from a staging that was filled before."""
    stagings = [sink_of(place).open(key) for _, key in entries]
    manifests = [fill(staging, files, key) for staging, (files, key) in zip(stagings, entries, strict=True)]
    together = threading.Barrier(len(entries))

    def publish(number: int) -> Release | Exception:
        together.wait()
        try:
            return stagings[number].publish(manifests[number])
        except DestinationOccupiedError as error:
            return error
        finally:
            stagings[number].discard()

    with ThreadPoolExecutor(len(entries)) as pool:
        return list(pool.map(publish, range(len(entries))))


def test_of_publishers_of_one_release_exactly_one_creates_it(place: Place) -> None:
    results = race(place, [(FILES, KEY)] * 3)

    assert sorted(result.created for result in results) == [False, False, True]
    assert content(place) == FILES
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def test_of_publishers_of_two_releases_exactly_one_succeeds(place: Place) -> None:
    results = race(place, [(FILES, KEY), (OTHER_FILES, OTHER_KEY)])

    (winner,) = [result for result in results if isinstance(result, Release)]
    assert winner.created
    assert content(place) == (FILES if winner.manifest.merge_key == KEY else OTHER_FILES)
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def test_discard_leaves_nothing(place: Place) -> None:
    staging, _ = stage(place)
    assert place.leftovers() != []

    staging.discard()
    staging.discard()

    assert place.leftovers() == []
    assert place.visible() == {}
    assert sink_of(place).existing() is None


def test_killed_in_the_middle_of_put_leaves_nothing_to_the_next(place: Place) -> None:
    with putting_process(place) as process:
        wait_until(place.is_busy)
        process.send_signal(signal.SIGKILL)
    assert place.visible() == {}
    assert place.leftovers() != []

    sink_of(place).open(KEY).discard()

    assert place.leftovers() == []
    assert release(place).created
    assert content(place) == FILES


def test_living_stagings_are_not_swept(place: Place) -> None:
    first = sink_of(place).open(KEY)
    second = sink_of(place).open(KEY)
    write_files(first.directory, FILES)

    assert first.directory != second.directory
    second.discard()
    assert first.publish(fill(first, FILES)).created
    first.discard()


@pytest.mark.parametrize("name", [SHARD, "config.json"])
def test_file_altered_after_its_digest_is_never_shipped(place: Place, name: str) -> None:
    staging = sink_of(place).open(KEY)
    write_files(staging.directory, FILES)
    flipped = bytearray(FILES[name])
    flipped[-1] ^= 1
    (staging.directory / name).write_bytes(flipped)

    with pytest.raises(InternalError, match=rf"{name} has SHA-256 \w+, expected"):
        staging.put(artifact_of(name))
    staging.discard()

    assert place.visible() == {}
    assert place.leftovers() == []


def test_truncated_file_is_never_shipped(place: Place) -> None:
    staging = sink_of(place).open(KEY)
    write_files(staging.directory, {SHARD: FILES[SHARD][:-1]})

    with pytest.raises(InternalError, match=SHARD):
        staging.put(artifact_of(SHARD))
    staging.discard()


def test_manifest_must_name_what_was_put(place: Place) -> None:
    staging, manifest = stage(place)
    fewer = manifest.model_copy(update={"files": manifest.files[1:]})

    with pytest.raises(InternalError, match=manifest.files[0].path):
        staging.publish(fewer)
    staging.discard()

    assert place.visible() == {}


def test_put_again_after_an_error_starts_over(place: Place) -> None:
    staging = sink_of(place).open(KEY)
    write_files(staging.directory, FILES | {SHARD: b"half"})
    with pytest.raises(InternalError):
        staging.put(artifact_of(SHARD))

    manifest = fill(staging, FILES)
    staging.put(artifact_of(SHARD))

    assert staging.publish(manifest).created
    staging.discard()
    assert content(place) == FILES


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("config.json", b'{"seed": 1}\n', r"config\.json: SHA-256 \w+, expected"),
        ("config.json", b"", r"config\.json: 0 bytes, expected 12"),
        ("config.json", None, r"config\.json: missing"),
        ("extra/notes.txt", b"hello", r"extra/notes\.txt: not in the manifest"),
    ],
    ids=["flipped", "truncated", "missing", "extra"],
)
def test_verify_and_pull_find_damage(
    place: Place, tmp_path: Path, name: str, data: bytes | None, expected: str
) -> None:
    release(place)
    place.write(name, data)

    with pytest.raises(BadInputError, match=expected):
        verify_release(place.location, place.scratch)
    with pytest.raises(BadInputError, match=expected):
        pull_release(place.location, tmp_path / "pulled")

    assert not (tmp_path / "pulled").exists()
    assert place.leftovers() == []
    assert [path.name for path in tmp_path.iterdir() if "pulled" in path.name] == []


def test_pull_brings_the_very_bytes(place: Place, tmp_path: Path) -> None:
    published = release(place)

    manifest = pull_release(place.location, tmp_path / "pulled")

    assert manifest == published.manifest
    seen = {path.relative_to(tmp_path / "pulled").as_posix(): path for path in (tmp_path / "pulled").rglob("*")}
    assert {name: path.read_bytes() for name, path in seen.items() if path.is_file()} == place.visible()


def test_verify_and_pull_of_nothing(place: Place, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        verify_release(place.location, place.scratch)
    with pytest.raises(NotFoundError):
        pull_release(place.location, tmp_path / "pulled")


def artifact_of(name: str) -> Artifact:
    return next(artifact for artifact in make_manifest(FILES).files if artifact.path == name)
