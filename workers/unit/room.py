"""What is free on a machine, and what there is of it in all: memory, room on file systems, and its uplink."""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from jobs.errors import NoCapacityError, NotNowError, TooLargeError
from jobs.places import file_place
from workers.files.local import mount_point
from workers.merging.job import Job


class Room:
    """Memory of one kind."""

    def __init__(self, what: str, free: int, total: Callable[[], int]) -> None:
        """Take what there is.

        Args:
            what: its name.
            free: bytes of it that are free now.
            total: returns the bytes of it in all; asked where there is not enough.
        """
        self._what = what
        self._free = free
        self._total = total

    def check(self, needed: int, job: Job, num_beside: int) -> None:
        """Check that there is enough.

        Args:
            needed: bytes, of all jobs so far.
            job: the last of them.
            num_beside: how many come before it.

        Raises:
            TooLargeError: the job alone needs more than there is in all.
            NotNowError: it does not fit beside the others, or into what is free.
        """
        if needed <= self._free:
            return
        beside = f" beside {num_beside} others" if num_beside else ""
        takes = f"merging {job.request.adapter_words}{beside} takes {needed / 1e6:.0f} MB of {self._what}"
        if not num_beside and needed > (total := self._total()):
            raise TooLargeError(
                f"{takes}, and this machine has {total / 1e6:.0f} MB in all; it takes a larger one, or fewer "
                "num_threads"
            )
        raise NotNowError(
            f"{takes}, and {self._free / 1e6:.0f} MB are free; it waits until others have ended. Lower "
            "max_jobs_per_pass or num_threads, or run fewer workers on this machine, if that is often so"
        )


class Disks:
    """Room on the file systems that the releases of a pass are written to."""

    def __init__(self) -> None:
        self._taken: dict[Path, int] = {}

    def take(self, directory: Path, num_bytes: int, scratch: Path, scratch_bytes: int) -> None:
        """Count what a job will write.

        Args:
            directory: where its release is written.
            num_bytes: of its tensors.
            scratch: where else it writes.
            scratch_bytes: that it writes there: a base as numbers, for parity full.

        Raises:
            TooLargeError: a file system is smaller than that.
            NoCapacityError: there is no room for it beside the others now.
        """
        wanted: dict[Path, int] = defaultdict(int)
        places: dict[Path, Path] = {}
        for place, size in ((directory, num_bytes), (scratch, scratch_bytes)):
            if size or place == directory:
                wanted[mount_point(place)] += size
                places.setdefault(mount_point(place), place)
        for mount, size in wanted.items():
            self._check(mount, size, places[mount], with_base=scratch_bytes > 0)
        for mount, size in wanted.items():
            self._taken[mount] = self._taken.get(mount, 0) + size

    def _check(self, mount: Path, num_bytes: int, place: Path, *, with_base: bool) -> None:
        status = os.statvfs(place)
        free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
        taken = self._taken.get(mount, 0)
        what = f"{place}: the release{', and the base as numbers for parity full,' if with_base else ''} takes"
        if num_bytes > total:
            raise TooLargeError(
                f"{what} {num_bytes / 1e6:.0f} MB, and its file system has {total / 1e6:.0f} MB in all; choose another"
            )
        if taken + num_bytes > free:
            beside = f" beside {taken / 1e6:.0f} MB of others" if taken else ""
            message = f"{what} {num_bytes / 1e6:.0f} MB{beside}, and {free / 1e6:.0f} MB are free"
            if taken:
                raise NotNowError(f"{message}; it waits until the others have ended")
            raise NoCapacityError(f"{message}; free some space").at(file_place(mount))


class Uplink:
    """What a machine sends to remote stores in a second."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._num_bytes = 0

    def take(self, job: Job, num_bytes: int) -> None:
        """Count what a release will send.

        Args:
            job: its release goes to a remote store.
            num_bytes: of its tensors that are not there yet.

        Raises:
            TooLargeError: sending them alone takes longer than an attempt may.
            NotNowError: sending them after the others does.
        """
        beside = f" after {self._num_bytes / 1e6:.0f} MB of others" if self._num_bytes else ""
        seconds, limit = (self._num_bytes + num_bytes) / self._bytes_per_second, job.request.timeout_seconds
        if limit is not None and seconds > limit:
            message = (
                f"{job.request.destination}: sending {num_bytes / 1e6:.0f} MB{beside} takes {seconds:.0f} s at the "
                f"{self._bytes_per_second / 1e6:g} MB/s of this machine's uplink, and timeout_seconds of the request "
                f"is {limit:g}"
            )
            if self._num_bytes:
                raise NotNowError(f"{message}; it waits until the others have ended")
            raise TooLargeError(f"{message}; give it more time, or set uplink_bytes_per_second to what it really is")
        self._num_bytes += num_bytes
