"""Finished shards outlive a killed attempt, on every sink, and nothing about them is believed but their bytes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.contract.places import DirectoryPlace, Place, S3Place, content, dying_process, sink_of
from tests.releases import (
    FILES,
    KEY,
    SHARD,
    SMALL,
    artifact_of,
    fill,
    make_files,
    make_manifest,
    record_of,
    write_files,
)
from workers.releases.delivery import verify_release
from workers.releases.records import decode_record, encode_record
from workers.releases.sinks import Staging
from workers.releases.sinks.local_records import RECORDS_DIRECTORY

OTHER_KEY = "d" * 64


def kill_after(place: Place, *names: str) -> None:
    """Have an attempt killed when it has put everything, and recorded some shards."""
    with dying_process(place, *names) as kill:
        kill()
    assert place.visible() == {}


def leave(place: Place, *names: str) -> None:
    """Leave what an attempt leaves that is killed when it has recorded some shards; faster than `kill_after`."""
    staging = sink_of(place).open(KEY)
    fill(staging, FILES)
    for name in names:
        staging.records.keep(record_of(name))
    staging.discard(keep=True)


def go_on(staging: Staging, names: set[str], *, whole: bool = False) -> None:
    """Claim some of what was left, put the rest anew, publish, and check what came of it."""
    claimed = set()
    for record in staging.records.left():
        if record.artifact.path in names:
            assert staging.records.claim(record, whole=whole) is not None
            claimed.add(record.artifact.path)
    assert claimed == names
    staging.records.clear(besides=claimed)
    rest = {name: data for name, data in FILES.items() if name not in claimed}
    write_files(staging.directory, rest)
    for name in rest:
        staging.put(artifact_of(name))


def assert_released(place: Place, staging: Staging) -> None:
    assert staging.publish(make_manifest(FILES)).created
    staging.discard()
    assert content(place) == FILES
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def local_records(place: Place) -> list[Path]:
    """Return the records in the directories of stagings."""
    parent = place.location.path.parent if isinstance(place, DirectoryPlace) else place.scratch
    return sorted(parent.glob(f"*/{RECORDS_DIRECTORY}/*.json"))


@pytest.mark.parametrize("whole", [False, True])
def test_recorded_shards_are_used_by_the_next_attempt(place: Place, whole: bool) -> None:
    kill_after(place, SHARD, SMALL)
    staging = sink_of(place).open(KEY)
    left = {record.artifact.path: record for record in staging.records.left()}
    assert {name: record.checks for name, record in left.items()} == {n: record_of(n).checks for n in (SHARD, SMALL)}
    go_on(staging, {SHARD, SMALL}, whole=whole)
    assert_released(place, staging)


def test_what_has_no_record_is_swept(place: Place) -> None:
    kill_after(place, SMALL)
    staging = sink_of(place).open(KEY)
    assert [record.artifact.path for record in staging.records.left()] == [SMALL]
    assert [path.name for path in staging.directory.iterdir() if path.is_file()] == [SMALL]
    if isinstance(place, S3Place):
        assert place.uploads() == []
    go_on(staging, {SMALL})
    assert_released(place, staging)


def test_attempts_that_are_killed_one_after_the_other(place: Place) -> None:
    kill_after(place, SHARD)
    kill_after(place, SHARD, SMALL)  # it puts its own, and clears nothing
    staging = sink_of(place).open(KEY)
    go_on(staging, {SHARD, SMALL})
    assert_released(place, staging)


def test_what_was_found_and_not_claimed_stays_as_it_was_found(place: Place) -> None:
    leave(place, SHARD, SMALL)
    for _ in range(2):
        staging = sink_of(place).open(KEY)
        assert {record.artifact.path for record in staging.records.left()} == {SHARD, SMALL}
        staging.discard()
    staging = sink_of(place).open(KEY)
    go_on(staging, {SHARD, SMALL})
    assert_released(place, staging)


def test_what_is_cleared_is_gone(place: Place) -> None:
    leave(place, SHARD, SMALL)
    staging = sink_of(place).open(KEY)
    for record in staging.records.left():
        assert staging.records.claim(record, whole=False) is not None
    staging.records.clear()
    go_on(staging, set())
    assert_released(place, staging)


def test_what_is_claimed_goes_with_the_attempt(place: Place) -> None:
    leave(place, SHARD, SMALL)
    staging = sink_of(place).open(KEY)
    go_on(staging, {SHARD, SMALL})
    staging.discard()
    assert place.leftovers() == []
    assert place.visible() == {}


def test_a_staging_that_is_kept_is_as_one_that_died(place: Place) -> None:
    leave(place, SHARD, SMALL)
    assert place.visible() == {}
    staging = sink_of(place).open(KEY)
    go_on(staging, {SHARD, SMALL})
    assert_released(place, staging)


def test_a_staging_without_records_is_not_kept(place: Place) -> None:
    staging = sink_of(place).open(KEY)
    fill(staging, FILES)
    staging.discard(keep=True)
    assert place.leftovers() == []


def test_another_release_finds_nothing_and_clears_the_place(place: Place) -> None:
    leave(place, SHARD, SMALL)
    other = make_files(seed=1, merge_key=OTHER_KEY)
    staging = sink_of(place).open(OTHER_KEY)
    assert staging.records.left() == ()
    assert staging.publish(fill(staging, other, OTHER_KEY)).created
    staging.discard()
    assert content(place) == other
    assert place.leftovers() == []


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "link"])
def test_a_file_with_other_bytes_is_not_claimed(place: Place, tmp_path: Path, damage: str, whole: bool) -> None:
    leave(place, SHARD, SMALL)
    path = local_records(place)[0].parents[1] / SHARD
    flipped = bytearray(FILES[SHARD])
    flipped[1 << 20] ^= 1
    match damage:
        case "flipped":
            path.write_bytes(flipped)
        case "truncated":
            path.write_bytes(FILES[SHARD][:-1])
        case "missing":
            path.unlink()
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
    staging = sink_of(place).open(KEY)
    left = {record.artifact.path: record for record in staging.records.left()}
    if isinstance(place, S3Place) and not whole:  # its parts are at the store
        assert staging.records.claim(left[SHARD], whole=False) is not None
        go_on(staging, {SHARD, SMALL})
    else:
        assert SHARD not in left or staging.records.claim(left[SHARD], whole=whole) is None
        go_on(staging, {SMALL}, whole=whole)
    assert_released(place, staging)
    if damage == "link":
        assert (tmp_path / "elsewhere").read_bytes() == FILES[SHARD]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
@pytest.mark.parametrize("what", ["directory", "file"])
def test_what_another_user_has_left_is_not_believed(tmp_path: Path, what: str) -> None:
    """In a directory for all, anyone can leave records of what they like."""
    place = DirectoryPlace(tmp_path)
    leave(place, SHARD, SMALL)
    directory = local_records(place)[0].parents[1]
    os.chown(directory if what == "directory" else directory / SHARD, 12345, -1)
    staging = sink_of(place).open(KEY)
    left = {record.artifact.path for record in staging.records.left()}
    assert left == (set() if what == "directory" else {SMALL})
    go_on(staging, left)
    assert_released(place, staging)


def rewrite_record(place: S3Place, name: str, damage: Callable[[bytes], bytes]) -> None:
    """Put a record at the store in the place of another, as who may write there could."""
    at = {"Bucket": place.server.bucket}
    (record,) = [entry for entry in place.uploads() if "/.mergefleet-uploads/" in entry[0] and entry[0].endswith(name)]
    key, upload = record
    place.client.abort_multipart_upload(**at, Key=key, UploadId=upload)
    new = place.client.create_multipart_upload(**at, Key=key)["UploadId"]
    data = damage(encode_record(record_of(name)))
    place.client.upload_part(**at, Key=key, UploadId=new, PartNumber=1, Body=data)


def edited(data: bytes) -> bytes:
    return data.replace(b'"rounding_excess":0.5', b'"rounding_excess":0.4')


def of_another_release(data: bytes) -> bytes:
    record = decode_record(data, KEY)
    assert record is not None
    return encode_record(record.model_copy(update={"merge_key": OTHER_KEY}))


def with_a_field_more(data: bytes) -> bytes:
    body = json.dumps(json.loads(data[65:]) | {"trust": "me"}).encode()
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


DAMAGED_RECORDS = {
    "torn": lambda data: data[:-1],
    "empty": lambda _: b"",
    "edited": edited,
    "of another release": of_another_release,
    "of another version": with_a_field_more,
    "no text": lambda _: b"\xff" * 200,
}


@pytest.mark.parametrize("damage", DAMAGED_RECORDS.values(), ids=DAMAGED_RECORDS)
def test_a_record_that_is_none_leads_to_a_shard_made_anew(place: Place, damage) -> None:
    leave(place, SHARD, SMALL)
    for path in local_records(place):
        data = path.read_bytes()
        if SHARD.encode() in data:
            path.write_bytes(damage(data))
    if isinstance(place, S3Place):
        rewrite_record(place, SHARD, damage)
    staging = sink_of(place).open(KEY)
    assert [record.artifact.path for record in staging.records.left()] == [SMALL]
    go_on(staging, {SMALL})
    assert_released(place, staging)


def test_a_living_attempt_is_left_alone(place: Place) -> None:
    """On S3, where uploads have no lock, both have what is finished."""
    first = sink_of(place).open(KEY)
    manifest = fill(first, FILES)
    for name in (SHARD, SMALL):
        first.records.keep(record_of(name))
    second = sink_of(place).open(KEY)
    left = {record.artifact.path for record in second.records.left()}
    assert left == ({SHARD} if isinstance(place, S3Place) else set())
    go_on(second, left)
    second.discard()
    assert first.publish(manifest).created
    first.discard()
    assert content(place) == FILES
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []
