"""Finished shards at an S3 store: what the store says of their parts decides, and no byte of them is fetched."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse

from jobs.errors import TransientIOError
from jobs.release import MANIFEST_NAME
from tests.contract.places import S3Place, content
from tests.contract.test_records import OTHER_KEY, assert_released, go_on, leave, local_records
from tests.releases import FILES, KEY, SHARD, SMALL, artifact_of, fill, make_files, make_manifest, record_of
from tests.servers.s3 import S3Server
from workers.releases.delivery import verify_release
from workers.releases.records import encode_record
from workers.releases.sinks.s3 import S3Sink
from workers.releases.sinks.s3_records import RECORDS
from workers.releases.sinks.s3_staging import S3Staging

pytestmark = pytest.mark.s3

_numbers = itertools.count()


@pytest.fixture
def place(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    return S3Place(tmp_path, s3, f"records/r{next(_numbers)}/eu")


def next_attempt(place: S3Place, key: str = KEY) -> S3Staging:
    return S3Sink(place.location, place.scratch).open(key)


def left_by(place: S3Place, *names: str, machine_is_gone: bool = True) -> None:
    leave(place, *names)
    if machine_is_gone:
        shutil.rmtree(place.scratch)


def requests_of(staging: S3Staging) -> list[tuple[str, str]]:
    """Return the requests that carry bytes of files, as they are made: operation and name."""
    asked: list[tuple[str, str]] = []

    def note(operation: str) -> Callable[..., None]:
        return lambda params, **_: asked.append((operation, params["url_path"].rpartition("/")[2]))

    for operation in ("UploadPart", "PutObject", "GetObject"):
        staging._store.client.meta.events.register(f"before-call.s3.{operation}", note(operation))
    return asked


def upload_of(place: S3Place, name: str) -> tuple[str, str]:
    (found,) = [entry for entry in place.uploads() if entry[0] == f"{place.location.prefix}/{name}"]
    return found


def test_parts_of_a_machine_that_is_gone_are_used_without_a_byte_of_them(place: S3Place) -> None:
    left_by(place, SHARD)
    staging = next_attempt(place)
    asked = requests_of(staging)
    go_on(staging, {SHARD})
    assert_released(place, staging)
    # Its record is read, and put again; its parts are neither.
    assert {operation for operation, name in asked if name == SHARD} == {"GetObject", "UploadPart"}
    assert [operation for operation, name in asked if name == SHARD].count("UploadPart") == 1
    assert SHARD in place.visible()


def test_a_whole_checkpoint_cannot_be_had_from_parts(place: S3Place) -> None:
    left_by(place, SHARD)
    staging = next_attempt(place)
    (record,) = staging.records.left()
    assert staging.records.claim(record, whole=True) is None
    go_on(staging, set())
    assert_released(place, staging)


def test_a_file_that_is_here_is_sent_again_where_its_parts_are_gone(place: S3Place) -> None:
    left_by(place, SHARD, machine_is_gone=False)
    key, upload = upload_of(place, SHARD)
    place.client.abort_multipart_upload(Bucket=place.server.bucket, Key=key, UploadId=upload)
    staging = next_attempt(place)
    go_on(staging, {SHARD})
    assert_released(place, staging)


def _send_another_part(place: S3Place, key: str, upload: str) -> None:
    at = {"Bucket": place.server.bucket, "Key": key, "UploadId": upload}
    place.client.upload_part(**at, ChecksumAlgorithm="CRC64NVME", PartNumber=2, Body=FILES[SHARD][5 << 20 : -1] + b"x")


def _send_one_part_more(place: S3Place, key: str, upload: str) -> None:
    at = {"Bucket": place.server.bucket, "Key": key, "UploadId": upload}
    place.client.upload_part(**at, ChecksumAlgorithm="CRC64NVME", PartNumber=3, Body=b"more")


def _abort(place: S3Place, key: str, upload: str) -> None:
    place.client.abort_multipart_upload(Bucket=place.server.bucket, Key=key, UploadId=upload)


@pytest.mark.parametrize("damage", [_send_another_part, _send_one_part_more, _abort])
def test_parts_that_are_others_are_not_claimed(place: S3Place, damage: Callable[[S3Place, str, str], None]) -> None:
    left_by(place, SHARD)
    damage(place, *upload_of(place, SHARD))
    staging = next_attempt(place)
    (record,) = staging.records.left()
    assert staging.records.claim(record, whole=False) is None
    go_on(staging, set())
    assert_released(place, staging)


def test_an_upload_with_a_part_missing_is_not_claimed(place: S3Place) -> None:
    """Under a record that names it, and that is a good one of the same bytes."""
    left_by(place, SHARD)
    first = next_attempt(place)
    (record,) = first.records.left()
    first.records.clear()
    first.discard()
    at = {"Bucket": place.server.bucket, "Key": f"{place.location.prefix}/{SHARD}"}
    upload = place.client.create_multipart_upload(**at, ChecksumAlgorithm="CRC64NVME")["UploadId"]
    one = {"UploadId": upload, "PartNumber": 1, "ChecksumAlgorithm": "CRC64NVME"}
    place.client.upload_part(**at, **one, Body=FILES[SHARD][: 5 << 20])
    at["Key"] = f"{place.location.prefix}/{RECORDS}/{KEY[:16]}-0/{upload}/{SHARD}"
    recorded = place.client.create_multipart_upload(**at)["UploadId"]
    place.client.upload_part(**at, UploadId=recorded, PartNumber=1, Body=encode_record(record))
    staging = next_attempt(place)
    assert staging.records.left() == (record,)
    assert staging.records.claim(record, whole=False) is None
    go_on(staging, set())
    assert_released(place, staging)


def die_at_read(place: S3Place, monkeypatch: pytest.MonkeyPatch, key: str = KEY) -> None:
    """Leave what a kill leaves between making an object of a record and deleting it."""

    class Died(BaseException): ...

    def died(*_: Any) -> None:
        raise Died

    staging = next_attempt(place, key)
    with monkeypatch.context() as patch:
        patch.setattr(type(staging._store), "content", lambda _, name, __: None if name == MANIFEST_NAME else died())
        with pytest.raises(Died):
            staging.records.left()
    staging._owned.abandon()
    assert [name.partition("/")[0] for name in place.visible()] == [RECORDS]


def test_a_kill_while_a_record_is_read_leaves_nothing_for_long(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(place, SHARD)
    die_at_read(place, monkeypatch)
    assert S3Sink(place.location, place.scratch).existing() is None
    staging = next_attempt(place)
    assert place.visible() == {}
    go_on(staging, set())
    assert_released(place, staging)


def test_a_record_left_visible_stops_no_other_release(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(place, SHARD)
    die_at_read(place, monkeypatch)
    other = make_files(seed=1, merge_key=OTHER_KEY)
    staging = next_attempt(place, OTHER_KEY)
    assert staging.publish(fill(staging, other, OTHER_KEY)).created
    staging.discard()
    assert content(place) == other
    assert place.leftovers() == []


def test_a_publisher_clears_a_record_that_was_left_visible(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    left_by(place, SHARD)
    publisher = next_attempt(place)
    manifest = fill(publisher, FILES)
    publisher.records.keep(record_of(SHARD))
    die_at_read(place, monkeypatch)
    assert publisher.publish(manifest).created
    publisher.discard()
    assert content(place) == FILES
    verify_release(place.location, place.scratch)


def test_no_record_is_read_beside_a_release(place: S3Place) -> None:
    left_by(place, SHARD)
    late = next_attempt(place)
    first = next_attempt(place)
    assert first.publish(fill(first, FILES)).created
    first.discard()
    assert late.records.left() == ()
    late.records.clear()
    late.discard()
    assert content(place) == FILES
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def test_credentials_that_may_not_list_parts_begin_anew(place: S3Place) -> None:
    left_by(place, SHARD)
    sink = S3Sink(place.location, place.scratch)

    def deny(request: Any, **_: Any) -> AWSResponse:
        raw = AWSResponse(request.url, 403, {}, None)
        raw._content = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        return raw

    sink._store.client.meta.events.register("before-send.s3.ListParts", deny)
    staging = sink.open(KEY)
    assert staging.records.left() == ()
    go_on(staging, set())
    assert_released(place, staging)


def test_what_was_taken_over_is_kept_for_a_third_attempt(place: S3Place) -> None:
    left_by(place, SHARD)
    second = next_attempt(place)
    (record,) = second.records.left()
    receipt = second.records.claim(record, whole=False)
    assert receipt is not None
    second.records.clear(besides={SHARD})
    second.take(receipt)
    second.discard(keep=True)
    assert place.visible() == {}
    shutil.rmtree(place.scratch)
    third = next_attempt(place)
    go_on(third, {SHARD})
    assert_released(place, third)


def test_strangers_uploads_stay(place: S3Place) -> None:
    left_by(place, SHARD)
    theirs = [place.begin_upload(SHARD), place.begin_upload("deeper/weights.bin")]
    staging = next_attempt(place)
    go_on(staging, {SHARD})
    assert staging.publish(make_manifest(FILES)).created
    staging.discard()
    assert content(place) == FILES
    assert sorted(place.uploads()) == sorted(theirs)


def test_parts_that_the_first_attempt_gives_up_are_missed_before_the_manifest(place: S3Place) -> None:
    """Two at once: the second has taken over what the first, which was cut off, then aborts."""
    first = next_attempt(place)
    fill(first, FILES)
    first.records.keep(record_of(SHARD))
    second = next_attempt(place)
    go_on(second, {SHARD})
    first.discard()
    second._sleep = lambda _: None
    with pytest.raises(TransientIOError, match="its parts are gone from the store"):
        second.publish(make_manifest(FILES))
    second.discard()
    assert place.visible() == {}
    assert place.leftovers() == []


def test_an_object_that_is_gone_with_its_bytes_takes_the_manifest_along(place: S3Place) -> None:
    """Two at once: the first deletes a shard between the second's last look and its manifest."""
    left_by(place, SHARD)
    staging = next_attempt(place)
    go_on(staging, {SHARD})

    def remove(params: dict[str, Any], **_: Any) -> None:
        if params["url_path"].endswith(MANIFEST_NAME):
            place.write(SHARD, None)

    staging._store.client.meta.events.register("before-call.s3.PutObject", remove)
    with pytest.raises(TransientIOError, match=f"{SHARD} was removed by another publisher"):
        staging.publish(make_manifest(FILES))
    staging.discard()
    assert place.visible() == {}
    assert place.leftovers() == []


def test_both_of_two_attempts_with_the_same_parts_come_to_one_release(place: S3Place) -> None:
    first = next_attempt(place)
    manifest = fill(first, FILES)
    first.records.keep(record_of(SHARD))
    second = next_attempt(place)
    go_on(second, {SHARD})
    assert second.publish(manifest).created
    assert not first.publish(manifest).created
    first.discard()
    second.discard()
    assert content(place) == FILES
    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def test_the_small_shard_of_a_machine_that_is_gone_is_made_anew(place: S3Place) -> None:
    left_by(place, SHARD, SMALL)
    staging = next_attempt(place)
    assert [record.artifact.path for record in staging.records.left()] == [SHARD]
    go_on(staging, {SHARD})
    assert local_records(place) == []
    assert_released(place, staging)


def test_a_shard_that_has_become_an_object_is_claimed_by_what_the_store_says_of_it(place: S3Place) -> None:
    first = next_attempt(place)
    fill(first, FILES)
    first.records.keep(record_of(SHARD))
    first._place(first._uploads[SHARD])
    first._owned.abandon()
    shutil.rmtree(place.scratch)
    assert place.visible().keys() == {SHARD}
    staging = next_attempt(place)
    asked = requests_of(staging)
    go_on(staging, {SHARD})
    assert_released(place, staging)
    assert ("UploadPart", SHARD) in asked  # of its record
    assert artifact_of(SHARD).sha256 == staging._uploads[SHARD].artifact.sha256
