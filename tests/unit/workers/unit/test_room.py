"""What is admitted: memory, disks and the uplink, against the machine's own figures."""

import os
from types import SimpleNamespace

import pytest

from jobs.errors import FailureClass, NoCapacityError, NotNowError, TooLargeError
from jobs.places import file_place
from workers.files.local import mount_point
from workers.merging.outcomes import Failure
from workers.unit.room import Disks, Room, Uplink

JOB = SimpleNamespace(request=SimpleNamespace(adapter_words="nice"))


def test_what_fits_is_let_in():
    Room("memory", free=10, total=lambda: 20).check(10, JOB, 0)


def test_what_never_fits_says_the_numbers_and_is_not_tried_again():
    with pytest.raises(TooLargeError, match=r"nice takes 30 MB of memory, and this machine has 20 MB in all") as caught:
        Room("memory", free=10_000_000, total=lambda: 20_000_000).check(30_000_000, JOB, 0)
    assert Failure.of(caught.value).failure_class is FailureClass.TOO_LARGE


@pytest.mark.parametrize(("needed", "beside"), [(15, 0), (15, 2), (30, 2)])
def test_what_does_not_fit_now_waits(needed, beside):
    """Beside others it says nothing that all of them together need more than there is."""
    with pytest.raises(NotNowError) as caught:
        Room("memory", free=10, total=lambda: 20).check(needed, JOB, beside)
    assert Failure.of(caught.value).waits


def test_a_disk_takes_what_is_free(tmp_path):
    status = os.statvfs(tmp_path)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    disks = Disks()
    disks.take(tmp_path, 1000, tmp_path, 0)
    with pytest.raises(NotNowError, match="beside 0 MB of others"):
        disks.take(tmp_path, free, tmp_path, 0)
    disks.take(tmp_path, 1000, tmp_path, 0)  # what was refused is not counted
    with pytest.raises(TooLargeError, match="choose another"):
        disks.take(tmp_path, total + 1, tmp_path, 0)
    with pytest.raises(NoCapacityError, match="free some space") as caught:
        Disks().take(tmp_path, free + (total - free) // 2, tmp_path, 0)
    assert caught.value.place == file_place(mount_point(tmp_path))
    assert not Failure.of(caught.value).waits


def test_what_a_job_alone_has_no_room_for_does_not_wait_for_others(tmp_path):
    """Its release and what it writes to scratch are its own, also where both lie on one file system."""
    status = os.statvfs(tmp_path)
    half = status.f_bavail * status.f_frsize // 2 + (1 << 20)
    with pytest.raises(NoCapacityError, match="and the base as numbers for parity full, takes"):
        Disks().take(tmp_path, half, tmp_path, half)
    disks = Disks()
    disks.take(tmp_path, half, tmp_path, 0)
    with pytest.raises(NotNowError):
        disks.take(tmp_path, half, tmp_path, half)


def test_an_uplink_takes_what_it_can_send_in_time():
    def job(timeout_seconds):
        return SimpleNamespace(request=SimpleNamespace(destination="s3://b/x", timeout_seconds=timeout_seconds))

    uplink = Uplink(100e6)
    uplink.take(job(100), 10_000_000_000)  # just so
    uplink.take(job(None), 10_000_000_000)  # it has all the time there is
    with pytest.raises(NotNowError, match=r"sending 1 MB after 20000 MB of others takes 200 s at the 100 MB/s") as late:
        uplink.take(job(200), 1_000_000)
    assert Failure.of(late.value).waits
    uplink.take(job(200.01), 1_000_000)  # what was refused is not counted
    with pytest.raises(TooLargeError, match="timeout_seconds of the request is 100; give it more time"):
        Uplink(100e6).take(job(100), 10_000_000_001)
