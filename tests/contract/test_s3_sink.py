"""What only the S3 sink has to stand: credentials, buckets, lost answers, corrupted parts, crashes halfway."""

import io
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import AuthError, BadInputError, DestinationOccupiedError, NotFoundError, TransientIOError
from jobs.locations import S3Prefix
from jobs.release import MANIFEST_NAME
from tests.contract.places import S3Place, content, sink_of
from tests.releases import SHARD, fill, make_files, make_manifest, write_files
from tests.servers.s3 import S3Server
from workers.releases.delivery import verify_release
from workers.releases.released import encode_manifest
from workers.releases.sinks.s3 import S3Sink
from workers.releases.sinks.s3_objects import part_bytes
from workers.releases.sinks.s3_records import abort_recorded
from workers.releases.sinks.s3_staging import S3Staging
from workers.sources.s3_client import S3Store

pytestmark = pytest.mark.s3

KEY, OTHER_KEY = "a" * 64, "d" * 64
FILES = make_files()

_numbers = itertools.count()


@pytest.fixture
def place(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Place:
    monkeypatch.setattr("workers.releases.sinks.s3_objects.MIN_PART_BYTES", 5 << 20)
    return S3Place(tmp_path, s3, f"faults/r{next(_numbers)}/eu")


def before_call(staging: S3Staging, operation: str, act: Callable[[dict[str, Any]], None]) -> None:
    """Do something just before requests of one kind are signed and sent."""
    staging._store.client.meta.events.register(f"before-call.s3.{operation}", lambda params, **_: act(params))


def lose_first_answer(staging: S3Staging, operation: str) -> list[int]:
    """Make the client ask again after a success, as it does when the answer is lost on the way."""
    statuses: list[int] = []

    def forget(response: tuple[Any, Any] | None, **_: Any) -> int | None:
        statuses.append(response[0].status_code)
        return 0 if len(statuses) == 1 else None

    staging._store.client.meta.events.register_first(f"needs-retry.s3.{operation}", forget)
    return statuses


def answer_instead(staging: S3Staging, operation: str, name: str, status: int, times: int) -> list[str]:
    """Answer requests for one file in the place of the store, which never hears of them."""
    asked: list[str] = []

    def answer(request: Any, **_: Any) -> AWSResponse | None:
        url = request.url.partition("?")[0]
        if not url.endswith(f"/{name}") or len(asked) == times:
            return None
        asked.append(url)
        code = {
            403: "AccessDenied",
            409: "ConditionalRequestConflict",
            412: "PreconditionFailed",
            503: "ServiceUnavailable",
        }[status]
        raw = AWSResponse(url, status, {}, None)
        raw._content = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        return raw

    staging._store.client.meta.events.register(f"before-send.s3.{operation}", answer)
    staging._sleep = lambda _: None
    return asked


@pytest.mark.parametrize("status", [409, 412])
@pytest.mark.parametrize(
    ("operation", "name"),
    [("PutObject", "config.json"), ("PutObject", MANIFEST_NAME), ("CompleteMultipartUpload", SHARD)],
)
def test_refusal_of_a_conditional_request_is_asked_again(
    place: S3Place, status: int, operation: str, name: str
) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    asked = answer_instead(staging, operation, name, status, times=2)

    assert staging.publish(manifest).created
    staging.discard()

    assert len(asked) == 2
    assert content(place) == FILES
    assert place.leftovers() == []
    verify_release(place.location, place.scratch)


def test_store_that_stays_in_conflict_is_given_up(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    answer_instead(staging, "PutObject", "config.json", 409, times=99)

    with pytest.raises(TransientIOError, match=r"config\.json changed again and again"):
        staging.publish(manifest)
    staging.discard()

    assert place.visible() == {}
    assert place.leftovers() == []


def test_manifest_that_may_come_late_keeps_its_files(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    answer_instead(staging, "PutObject", MANIFEST_NAME, 503, times=99)
    with pytest.raises(TransientIOError, match="503"):
        staging.publish(manifest)
    staging.discard()
    assert place.visible() == FILES

    place.write(MANIFEST_NAME, encode_manifest(manifest).data)  # it comes

    verify_release(place.location, place.scratch)
    assert place.leftovers() == []


def test_manifest_that_was_denied_leaves_nothing(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    answer_instead(staging, "PutObject", MANIFEST_NAME, 403, times=99)
    with pytest.raises(AuthError, match="403"):
        staging.publish(manifest)
    staging.discard()
    assert place.visible() == {}
    assert place.leftovers() == []


def test_manifest_whose_answer_was_lost_is_told_to_whoever_publishes_again(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    staging.publish(manifest)

    assert staging.publish(manifest).created
    staging.discard()

    verify_release(place.location, place.scratch)


def test_deletion_spares_what_came_after_the_look(place: S3Place) -> None:
    place.write("file", b"ours")
    store = S3Store(place.location)
    looked_at = store.objects()["file"].etag
    place.write("file", b"theirs")

    store.delete("file", looked_at)
    assert place.visible() == {"file": b"theirs"}
    store.delete("file", store.objects()["file"].etag)
    store.delete("file", looked_at)
    assert place.visible() == {}


def test_credentials_that_may_not_look_above(place: S3Place) -> None:
    inner = S3Place(place.scratch.parent, place.server, f"{place.location.prefix}/prod")
    sink = S3Sink(inner.location, inner.scratch)

    def deny(request: Any, **_: Any) -> AWSResponse | None:
        if not request.url.endswith(f"/{MANIFEST_NAME}") or "/prod/" in request.url:
            return None
        raw = AWSResponse(request.url, 403, {}, None)
        raw._content = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
        return raw

    sink._store.client.meta.events.register("before-send.s3.GetObject", deny)
    staging = sink.open(KEY)
    assert staging.publish(fill(staging, FILES)).created
    staging.discard()


def test_missing_bucket_is_named(s3: S3Server, tmp_path: Path) -> None:
    sink = S3Sink(S3Prefix("no-such-bucket", "r"), tmp_path)
    for ask in (sink.existing, lambda: sink.open(KEY)):
        with pytest.raises(NotFoundError, match=f"bucket 'no-such-bucket' does not exist at {s3.endpoint}"):
            ask()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize("value", ["wrong-credential", None])
def test_wrong_and_missing_credentials(
    place: S3Place, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None
) -> None:
    if value:
        monkeypatch.setenv(variable, value)
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv(variable, raising=False)

    with pytest.raises(AuthError, match="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY") as caught:
        S3Sink(place.location, place.scratch).existing()

    assert "wrong-credential" not in str(caught.value)


def test_unreachable_endpoint_is_named(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(TransientIOError, match=r"http://127\.0\.0\.1:9 did not answer.*AWS_ENDPOINT_URL_S3"):
        S3Sink(place.location, place.scratch).existing()


def test_endpoint_that_is_none(place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "nonsense")
    with pytest.raises(BadInputError, match="AWS_"):
        S3Sink(place.location, place.scratch).existing()


@pytest.mark.parametrize("operation", ["UploadPart", "PutObject"])
def test_bytes_corrupted_on_the_way_are_refused_by_the_store(place: S3Place, operation: str) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)

    def flip(params: dict[str, Any]) -> None:
        data = bytearray(params["body"].read())
        data[0] ^= 1
        params["body"] = io.BytesIO(data)

    before_call(staging, operation, flip)

    with pytest.raises(TransientIOError, match="BadDigest"):
        staging.publish(fill(staging, FILES))
    staging.discard()

    assert place.visible() == {}
    assert place.leftovers() == []


def test_wrong_checksum_from_the_store_is_noticed(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    staging._store.client.meta.events.register(
        "after-call.s3.UploadPart", lambda parsed, **_: parsed.update(ChecksumCRC64NVME="AAAAAAAAAAA=")
    )
    with pytest.raises(TransientIOError, match=rf"part 1 of .*{SHARD}: the store has CRC-64/NVME AAAAAAAAAAA="):
        fill(staging, FILES)
    staging.discard()


@pytest.mark.parametrize("operation", ["CompleteMultipartUpload", "PutObject"])
def test_lost_answers_do_not_confuse(place: S3Place, operation: str) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    statuses = lose_first_answer(staging, operation)

    release = staging.publish(manifest)
    staging.discard()

    assert statuses[:2] in ([200, 404], [200, 412])
    assert release.created
    assert content(place) == FILES


def test_lost_answer_to_the_manifest_is_still_our_release(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    staging._place_all()
    statuses = lose_first_answer(staging, "PutObject")

    assert staging.publish(manifest).created
    assert statuses == [200, 412]
    staging.discard()


def test_uploads_aborted_by_another_attempt_are_sent_again(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    sink_of(place).open(KEY).discard()
    assert place.uploads() == []

    assert staging.publish(manifest).created
    staging.discard()

    assert content(place) == FILES
    verify_release(place.location, place.scratch)


def test_what_others_removed_before_they_saw_the_manifest_is_written_again(place: S3Place) -> None:
    staging = S3Sink(place.location, place.scratch).open(KEY)
    manifest = fill(staging, FILES)
    touched = []

    def remove(params: dict[str, Any]) -> None:
        if params["url_path"].endswith(MANIFEST_NAME) and not touched:
            touched.append(params["url_path"])
            place.write(SHARD, None)
            place.write("config.json", None)

    before_call(staging, "PutObject", remove)

    assert staging.publish(manifest).created
    staging.discard()

    assert touched
    assert content(place) == FILES


_DYING = """
import os, signal, sys
from pathlib import Path
from jobs.locations import parse_location
from tests.releases import fill, make_files
from workers.releases.sinks import open_sink, s3_objects

s3_objects.MIN_PART_BYTES = 5 << 20
staging = open_sink(parse_location(sys.argv[1]), Path(sys.argv[2])).open("a" * 64)
manifest = fill(staging, make_files())

def die(params, **_):
    if params["url_path"].endswith("manifest.json"):
        os.kill(os.getpid(), signal.SIGKILL)

staging._store.client.meta.events.register("before-call.s3.PutObject", die)
staging.publish(manifest)
"""


@pytest.fixture
def crashed(place: S3Place) -> S3Place:
    """A place where a publisher was killed between its last file and its manifest."""
    command = [sys.executable, "-c", _DYING, str(place.location), str(place.scratch)]
    assert subprocess.run(command, check=False, timeout=60).returncode == -9
    assert place.visible() == FILES
    return place


def test_crash_before_the_manifest_is_no_release(crashed: S3Place) -> None:
    assert sink_of(crashed).existing() is None
    with pytest.raises(NotFoundError, match="holds no release"):
        verify_release(crashed.location, crashed.scratch)


def test_crash_before_the_manifest_sends_nothing_again(crashed: S3Place) -> None:
    staging = S3Sink(crashed.location, crashed.scratch).open(KEY)
    sent: list[str] = []
    for operation in ("UploadPart", "PutObject"):
        before_call(staging, operation, lambda params: sent.append(params["url_path"].rpartition("/")[2]))

    assert staging.publish(fill(staging, FILES)).created
    staging.discard()

    assert sent == [MANIFEST_NAME]
    assert crashed.leftovers() == []
    verify_release(crashed.location, crashed.scratch)


def test_crash_before_the_manifest_and_other_sidecars_now(crashed: S3Place) -> None:
    files = FILES | {"config.json": b'{"seed": "new"}\n'}
    del files["empty.txt"]
    staging = S3Sink(crashed.location, crashed.scratch).open(KEY)

    assert staging.publish(fill(staging, files)).created
    staging.discard()

    assert content(crashed) == files
    verify_release(crashed.location, crashed.scratch)


def test_crash_below_is_not_taken_for_one_of_this_destination(crashed: S3Place) -> None:
    """The same merge key, another destination: what a crash left at `s3://b/n/prod` is not of `s3://b/n`."""
    outer = S3Place(crashed.scratch.parent, crashed.server, crashed.location.prefix.rpartition("/")[0])
    with pytest.raises(DestinationOccupiedError, match="files, but no manifest"):
        sink_of(outer).open(KEY)
    assert crashed.visible() == FILES


def test_crash_above_is_not_cleared_by_an_attempt_below(crashed: S3Place) -> None:
    inner = S3Place(crashed.scratch.parent, crashed.server, f"{crashed.location.prefix}/prod")
    staging = S3Sink(inner.location, inner.scratch).open(KEY)
    assert staging.publish(fill(staging, FILES)).created
    staging.discard()

    assert {name: data for name, data in crashed.visible().items() if not name.startswith("prod/")} == FILES
    with pytest.raises(DestinationOccupiedError, match=f"has the release at {inner.location} below it"):
        sink_of(crashed).open(KEY)
    verify_release(inner.location, inner.scratch)


def test_crash_before_the_manifest_blocks_another_release(crashed: S3Place) -> None:
    with pytest.raises(DestinationOccupiedError, match="what a crash left of another release"):
        sink_of(crashed).open(OTHER_KEY)
    assert crashed.visible() == FILES


def test_neighbouring_prefixes_are_left_alone(place: S3Place, s3: S3Server) -> None:
    neighbour = S3Place(place.scratch.parent, s3, f"{place.location.prefix}-2")
    neighbour.write("weights.bin", b"theirs")
    theirs = S3Sink(neighbour.location.child("deeper"), place.scratch).open(KEY)
    write_files(theirs.directory, {SHARD: FILES[SHARD]})
    theirs.put(next(artifact for artifact in make_manifest(FILES).files if artifact.path == SHARD))

    staging = S3Sink(place.location, place.scratch).open(KEY)
    assert staging.publish(fill(staging, FILES)).created
    staging.discard()

    assert [key for key, _ in neighbour.uploads() if key.endswith(f"deeper/{SHARD}")] != []
    assert neighbour.visible() == {"weights.bin": b"theirs"}
    theirs.discard()


def test_every_page_of_recorded_uploads_is_aborted(place: S3Place) -> None:
    stagings = [S3Sink(place.location, place.scratch).open(KEY) for _ in range(3)]
    theirs = [place.begin_upload(SHARD), place.begin_upload("deeper/weights.bin")]
    for staging in stagings:
        write_files(staging.directory, FILES)
        staging.put(next(artifact for artifact in make_manifest(FILES).files if artifact.path == SHARD))
    store = S3Store(place.location)
    store.client.meta.events.register(
        "provide-client-params.s3.ListMultipartUploads", lambda params, **_: params | {"MaxUploads": 1}
    )
    assert len(place.uploads()) == 2 * len(stagings) + len(theirs)
    assert abort_recorded(store) == len(stagings)
    assert sorted(place.uploads()) == sorted(theirs)
    for staging in stagings:
        staging.discard()


def test_object_that_changes_while_it_is_read(place: S3Place) -> None:
    place.write("file", b"x" * 100)
    store = S3Store(place.location)
    entry = store.objects()["file"]
    assert b"".join(store.read(entry)) == b"x" * 100

    place.write("file", b"y" * 100)

    with pytest.raises(TransientIOError, match="412"):
        list(store.read(entry))


@given(st.integers(min_value=1, max_value=5 << 40))
def test_parts_are_few_enough_and_large_enough(num_bytes: int) -> None:
    size = part_bytes(num_bytes)
    assert 5 << 20 <= size <= 5 << 30
    assert -(-num_bytes // size) <= 10_000
    assert size % (1 << 20) == 0
