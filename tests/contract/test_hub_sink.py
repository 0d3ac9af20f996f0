"""What only the Hub sink has to stand: tokens, lost answers, commits by others, and both ways to send large files."""

import itertools
from pathlib import Path

import huggingface_hub
import pytest

from jobs.errors import AuthError, BadInputError, DestinationOccupiedError, NotFoundError, TransientIOError
from jobs.locations import HubRepo
from jobs.release import Manifest
from tests.contract.places import HubPlace, content
from tests.releases import SHARD, fill, make_files
from tests.servers.hub import Hub
from workers.releases.delivery import pull_release, verify_release
from workers.releases.records import ShardRecord
from workers.releases.sinks.hub import HubSink, HubStaging
from workers.sources.hub_client import HubStore

KEY = "a" * 64
FILES = make_files()

_numbers = itertools.count()


@pytest.fixture
def place(hub: Hub, tmp_path: Path) -> HubPlace:
    return HubPlace(tmp_path, hub, f"fault-{next(_numbers)}")


def stage(place: HubPlace) -> tuple[HubStaging, Manifest]:
    staging = HubSink(place.location, place.scratch).open(KEY)
    return staging, fill(staging, FILES)


def titles(place: HubPlace) -> list[str]:
    return [commit.title for commit in place.hub.repos[place.location.repo_id]]


def test_wrong_token(place: HubPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_token")
    sink = HubSink(place.location, place.scratch)
    for ask in (sink.existing, lambda: sink.open(KEY)):
        with pytest.raises(AuthError, match="HF_TOKEN") as caught:
            ask()
        assert "hf_wrong_token" not in str(caught.value)
    assert place.leftovers() == []


def test_unreachable_hub_is_named(place: HubPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TransientIOError, match=r"http://127\.0\.0\.1:9 did not answer: check HF_ENDPOINT"):
        HubSink(place.location, place.scratch).existing()


def test_signed_urls_stay_out_of_messages(place: HubPlace) -> None:
    store = HubStore(place.location)
    text = "error sending request for url (https://cas/xorb?X-Amz-Signature=0123&X-Amz-Expires=9)"
    with pytest.raises(TransientIOError, match=r"url \(https://cas/xorb\)"), store.errors():
        raise ConnectionError(text)


def test_missing_branch(place: HubPlace) -> None:
    place.hub.create(place.location.repo_id)
    with pytest.raises(NotFoundError, match="no such revision: create it, or use main"):
        HubSink(HubRepo(place.location.repo_id, "v2"), place.scratch).existing()


def test_commit_is_no_destination(place: HubPlace) -> None:
    with pytest.raises(BadInputError, match="publish to a branch"):
        HubSink(HubRepo("org/name", "0" * 40), place.scratch)


def test_one_commit_holds_the_whole_release(place: HubPlace) -> None:
    staging, manifest = stage(place)
    assert titles(place) == ["initial commit"]

    staging.publish(manifest)
    staging.discard()

    assert titles(place) == ["initial commit", "Release job-1"]


def test_large_files_go_through_xet(place: HubPlace) -> None:
    staging, manifest = stage(place)
    staging.publish(manifest)
    staging.discard()

    assert place.hub.repos[place.location.repo_id][-1].files[SHARD].xet is not None


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4, of httpx2
def test_large_files_go_through_lfs_where_xet_is_off(place: HubPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    staging, manifest = stage(place)

    assert staging.publish(manifest).created
    staging.discard()

    blob = place.hub.repos[place.location.repo_id][-1].files[SHARD]
    assert (blob.xet, blob.path.read_bytes()) == (None, FILES[SHARD])
    verify_release(place.location, place.scratch)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4, of httpx2
def test_a_finished_shard_of_a_dead_attempt_is_not_sent_again(place: HubPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    files = make_files(seed=7)  # that no other test has sent
    staging = HubSink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, files)
    (artifact,) = [artifact for artifact in manifest.files if artifact.path == SHARD]
    record = ShardRecord(merge_key=KEY, origin="0" * 64, artifact=artifact, checks=())
    staging.records.keep(record)
    staging.discard(keep=True)
    assert place.hub.lfs_puts.count(artifact.sha256) == 1

    staging = HubSink(place.location, place.scratch).open(KEY)
    assert staging.records.left() == (record,)
    assert staging.records.claim(record, whole=False) is not None
    fill(staging, {name: data for name, data in files.items() if name != SHARD})
    assert staging.publish(manifest).created
    staging.discard()

    assert place.hub.lfs_puts.count(artifact.sha256) == 1
    assert content(place) == files


def test_lost_answer_is_not_committed_twice(place: HubPlace) -> None:
    staging, manifest = stage(place)
    place.hub.fail("POST", "/commit/")

    assert staging.publish(manifest).created
    staging.discard()

    assert titles(place) == ["initial commit", "Release job-1"]
    assert content(place) == FILES


def test_commit_that_failed_is_tried_again(place: HubPlace) -> None:
    staging, manifest = stage(place)
    place.hub.fail("POST", "/commit/", status=503, times=2)

    assert staging.publish(manifest).created
    staging.discard()

    assert titles(place) == ["initial commit", "Release job-1"]


def test_hub_that_stays_down_is_given_up(place: HubPlace) -> None:
    staging, manifest = stage(place)
    place.hub.fail("POST", "/commit/", status=503, times=99)

    with pytest.raises(TransientIOError, match="503"):
        staging.publish(manifest)
    staging.discard()

    assert titles(place) == ["initial commit"]


def test_card_edited_meanwhile_is_no_obstacle(place: HubPlace) -> None:
    staging, manifest = stage(place)
    place.write("README.md", b"# Mine\n")

    assert staging.publish(manifest).created
    staging.discard()

    assert titles(place) == ["initial commit", "by hand", "Release job-1"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_card_of_a_person_stays(place: HubPlace, when: str) -> None:
    files = make_files()
    if when == "before":
        place.write("README.md", b"# Mine\n")
    staging = HubSink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, files | {"README.md": b"# Ours"})
    if when == "meanwhile":
        place.write("README.md", b"# Mine\n")

    release = staging.publish(manifest)
    staging.discard()

    assert content(place) == files | {"README.md": b"# Mine\n"}
    assert {artifact.path for artifact in release.manifest.files} == files.keys()
    assert verify_release(place.location, place.scratch) == release.manifest
    assert pull_release(place.location, place.scratch / "pulled") == release.manifest


def test_weights_committed_meanwhile_are_not_overwritten(place: HubPlace) -> None:
    staging, manifest = stage(place)
    place.write(SHARD, b"theirs")

    with pytest.raises(DestinationOccupiedError, match=SHARD):
        staging.publish(manifest)
    staging.discard()

    assert titles(place) == ["initial commit", "by hand"]


def test_a_release_that_was_copied_into_a_folder_is_pulled_from_there(place: HubPlace, tmp_path: Path) -> None:
    """Nothing is published into folders; what a person put there is checked and pulled as any other release."""
    staging, manifest = stage(place)
    staging.publish(manifest)
    staging.discard()
    repo = HubRepo(f"{place.location.repo_id}-copies")
    seen = place.visible()
    place.hub.create(repo.repo_id, {f"v1/merged/{name}": data for name, data in seen.items()} | {"notes.txt": b"ours"})
    assert verify_release(repo.folder("v1/merged"), place.scratch) == manifest
    pull_release(repo.folder("v1/merged"), tmp_path / "pulled")
    found = {path.relative_to(tmp_path / "pulled").as_posix(): path for path in (tmp_path / "pulled").rglob("*")}
    assert {name: path.read_bytes() for name, path in found.items() if path.is_file()} == seen
    with pytest.raises((BadInputError, NotFoundError)):
        verify_release(repo, place.scratch)
