"""What is free on a machine, and what there is of it in all: memory, and room on file systems."""

import os
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

    def take(self, directory: Path, num_bytes: int) -> None:
        """Count what a release will take.

        Args:
            directory: where it is written.
            num_bytes: of its tensors.

        Raises:
            TooLargeError: the file system is smaller than that.
            NoCapacityError: there is no room for it beside the others now.
        """
        mount = mount_point(directory)
        status = os.statvfs(directory)
        free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
        taken = self._taken.get(mount, 0)
        if num_bytes > total:
            raise TooLargeError(
                f"{directory}: the release takes {num_bytes / 1e6:.0f} MB, and its file system has "
                f"{total / 1e6:.0f} MB in all; choose another"
            )
        if taken + num_bytes > free:
            beside = f" beside {taken / 1e6:.0f} MB of others" if taken else ""
            message = (
                f"{directory}: the release takes {num_bytes / 1e6:.0f} MB{beside}, and {free / 1e6:.0f} MB are free"
            )
            if taken:
                raise NotNowError(f"{message}; it waits until the others have ended")
            raise NoCapacityError(f"{message}; free some space").at(file_place(mount))
        self._taken[mount] = taken + num_bytes
