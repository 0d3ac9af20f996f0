"""What dead attempts have left is found by their trails and cleared once it is of no use, on every sink."""

import os
import time
from pathlib import Path

import pytest

from jobs.locations import S3Prefix
from tests.contract.places import Place, content, dying_process, sink_of, trails
from tests.contract.test_records import go_on
from tests.releases import FILES, KEY, SHARD, SMALL, fill, record_of
from workers.releases.delivery import verify_release
from workers.releases.sinks import Staging, open_sink
from workers.releases.trails import KEPT_SECONDS, TRAILS, Trail, follow_trails


def begin(place: Place) -> tuple[Trail, Staging]:
    """Begin an attempt as a worker does."""
    trail = Trail.begin(place.scratch, place.location)
    staging = sink_of(place).open(KEY)
    trail.name(staging.ticket.attempt)
    return trail, staging


def kill_after(place: Place, *names: str) -> None:
    with dying_process(place, *names, trail=True) as kill:
        kill()


def make_older(place: Place, seconds: float) -> None:
    """Have all trails begun, and looked at, so long ago."""
    for path in (place.scratch / TRAILS).glob("*/*"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def publish(staging: Staging) -> None:
    assert staging.publish(fill(staging, FILES)).created
    staging.discard()


def test_what_is_left_beside_a_release_is_cleared(place: Place) -> None:
    """The attempt of a driver that lost its lease dies when another one has published."""
    other_machine = place.scratch.with_name("elsewhere")
    with dying_process(place, SHARD, SMALL, trail=True) as kill:
        follow_trails(place.scratch)
        assert place.leftovers() != []
        assert len(trails(place)) == 1
        publish(open_sink(place.location, other_machine).open(KEY))
        kill()
    assert place.leftovers() != []

    follow_trails(place.scratch)

    assert place.leftovers() == []
    assert trails(place) == []
    assert content(place) == FILES
    verify_release(place.location, place.scratch)


def test_shards_wait_for_the_next_attempt_and_the_trail_with_them(place: Place) -> None:
    kill_after(place, SHARD, SMALL)
    for _ in range(2):
        follow_trails(place.scratch)
        make_older(place, 3600)
        assert len(trails(place)) == 1

    staging = sink_of(place).open(KEY)
    assert {record.artifact.path for record in staging.records.left()} >= {SHARD}
    staging.records.clear()
    publish(staging)
    make_older(place, 3600)
    follow_trails(place.scratch)
    assert trails(place) == []
    assert place.leftovers() == []


def test_what_nobody_comes_back_for_goes_after_a_week(place: Place) -> None:
    """A job is rejected or cancelled while its worker dies."""
    kill_after(place, SHARD, SMALL)
    make_older(place, KEPT_SECONDS + 60)
    for path in place.scratch.glob("*/.shards"):  # a unit's sweep looks after these
        os.utime(path, (0, 0))
    follow_trails(place.scratch)
    assert trails(place) == []
    assert [name for name in place.leftovers() if not name.startswith(("s3-", "hub-"))] == []
    assert place.visible() == {}


def test_what_has_no_record_goes_at_once(place: Place) -> None:
    kill_after(place)
    follow_trails(place.scratch)
    assert place.visible() == {}
    if isinstance(place.location, S3Prefix):  # its unfinished uploads tell not whether they are of use
        assert len(trails(place)) == 1
        make_older(place, KEPT_SECONDS + 60)
        follow_trails(place.scratch)
    assert trails(place) == []
    assert place.leftovers() == []


def test_what_an_attempt_in_order_leaves_is_followed(place: Place) -> None:
    trail, staging = begin(place)
    fill(staging, FILES)
    staging.records.keep(record_of(SHARD))
    left = staging.discard(keep=True)
    assert left
    trail.end(left=left)
    assert len(trails(place)) == 1

    trail, staging = begin(place)
    go_on(staging, {SHARD})
    assert staging.publish(fill(staging, FILES)).created
    left = staging.discard()
    assert not left
    trail.end(left=left)
    make_older(place, 3600)
    follow_trails(place.scratch)
    assert trails(place) == []
    assert place.leftovers() == []


def test_one_that_died_before_it_had_a_name(place: Place) -> None:
    Trail.begin(place.scratch, place.location).end(left=True)
    follow_trails(place.scratch)
    assert trails(place) == []


def test_a_place_that_does_not_answer_is_asked_once_and_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for number in range(3):
        trail = Trail.begin(tmp_path, S3Prefix("bucket", f"r{number}"))
        trail.name("attempt")
        trail.end(left=True)

    def num_asked() -> int:
        caplog.clear()
        follow_trails(tmp_path)
        return sum("could not be cleared" in record.message for record in caplog.records)

    assert num_asked() == 1
    assert num_asked() == 1  # the next of them
    for path in (tmp_path / TRAILS).glob("*/*"):
        os.utime(path, (time.time() - KEPT_SECONDS - 60,) * 2)
    assert num_asked() == 1
    assert len(list((tmp_path / TRAILS).glob("*.lock"))) == 2  # nobody waits for it longer than a week
