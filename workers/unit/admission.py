"""Whether a pass fits into what is free: memory of the machine and of its GPU, room on disks, and the uplink."""

import functools
from collections.abc import Sequence
from pathlib import Path

from workers.bases.resident_bases import ResidentBases
from workers.files.local import file_errors
from workers.files.memory import available_device_bytes, available_host_bytes, total_device_bytes, total_host_bytes
from workers.merging.base_plan import BasePlan
from workers.merging.context import Context
from workers.merging.failures import own_failure
from workers.merging.job import Job
from workers.merging.plain_base import plain_layout, plain_release_bytes
from workers.merging.plan import MergePlan
from workers.merging.wider import most_bytes
from workers.unit.footprint import device_bytes, pass_bytes, passing_bytes, resident_bytes
from workers.unit.room import Disks, Room, Uplink


def admit_to_disks(jobs: Sequence[Job], base: BasePlan, scratch: Path) -> None:
    """Refuse jobs, the last ones first, until what is left to be written fits onto the disks that it goes to.

    What never fits fails with TooLargeError. What does not fit beside others waits (NotNowError); where it does not
    fit by itself, its disk is full (NoCapacityError).

    Args:
        jobs: their stagings are open, what a dead attempt has finished lies there, and they have their leaders.
        base: of all of them.
        scratch: where base and releases are written as numbers, where they have to be.
    """
    disks = Disks()
    plain_bytes = plain_layout(base).num_bytes if base.misread is not None else 0
    largest_release = 0
    for job in jobs:
        beside = of_all = of_release = 0
        if job.request.parity.level == "full":
            of_all, of_release = plain_bytes, plain_release_bytes(job.plan)
            beside = of_all + max(of_release - largest_release, 0)
        if job.merges_apart and job.leader is None:
            beside += job.in_work.merged.num_bytes
        with own_failure(job), file_errors(f"looking at {job.directory}", job.directory):
            disks.take(job.directory, most_bytes(job.in_work), scratch, beside)
            # One is enough for all: the base stays, and of releases there is one at a time.
            plain_bytes -= of_all
            largest_release = max(largest_release, of_release)


def admit_to_uplink(jobs: Sequence[Job], bytes_per_second: float | None) -> None:
    """Refuse jobs, the last ones first, until the others can be sent to their remote stores in the time they have.

    What could not be sent in time by itself fails with TooLargeError; what cannot be beside others waits (NotNowError).

    Args:
        jobs: their stagings are open.
        bytes_per_second: of this machine's uplink; None where it is not known, and nothing is refused.
    """
    if bytes_per_second is None:
        return
    uplink = Uplink(bytes_per_second)
    for job in jobs:
        if not job.staging.in_place:
            with own_failure(job):
                uplink.take(job, most_bytes(job.in_work))


class Admission:
    """What one pass over one base takes."""

    def __init__(self, context: Context, base: BasePlan, residents: ResidentBases, pass_key: str) -> None:
        self._device = context.device
        self._num_threads = context.num_threads
        self._base = base
        self._residents = residents
        self._pass_key = pass_key

    def admit(self, jobs: Sequence[Job]) -> None:
        """Refuse jobs, the last ones first, until the pass fits into the memory that is free.

        What never fits fails with TooLargeError, with the numbers; what does not fit now waits (NotNowError).
        """
        free_on_device = self.make_room(jobs)
        on_device = self._base_bytes(jobs, free_on_device)
        memory = Room("memory", available_host_bytes(), total_host_bytes)
        device_memory = None
        if free_on_device is not None:
            total = functools.partial(total_device_bytes, self._device)
            device_memory = Room("GPU memory", free_on_device, total)
        admitted: list[MergePlan] = []
        for job in jobs:
            with own_failure(job):
                plans = [*admitted, job.plan]
                memory.check(pass_bytes(plans, self._num_threads, self._device.type), job, len(admitted))
                if device_memory is not None:
                    needed = on_device + device_bytes(plans, self._num_threads)
                    device_memory.check(needed, job, len(admitted))
                admitted.append(job.plan)

    def fits(self, jobs: Sequence[Job], room: int | None) -> bool:
        """Whether the GPU has room for the whole base in 4-bit beside some jobs; what it has not comes tile by tile."""
        if room is None:
            return True
        return resident_bytes(self._base) + self._bytes_of(jobs) <= room

    def make_room(self, jobs: Sequence[Job]) -> int | None:
        """Let go of bases that other passes left on the GPU, if they have to.

        They stay where this pass's own would not fit beside it even without them.

        Returns:
            Bytes of the GPU that this pass may take, the base it holds included; None on the CPU.
        """
        if self._device.type == "cpu" or not jobs:
            return None
        held = self._residents.num_device_bytes(self._pass_key)
        free = available_device_bytes(self._device) + held
        beside = self._residents.num_device_bytes_beside(self._pass_key)
        wanted = self._base_bytes(jobs, free + beside) + self._bytes_of(jobs)
        self._residents.make_room(self._pass_key, wanted - free)
        return available_device_bytes(self._device) + held

    def _base_bytes(self, jobs: Sequence[Job], room: int | None) -> int:
        """Return what the base takes of the GPU: whole, where it fits beside one job, or tile by tile."""
        if jobs and not self.fits(jobs[:1], room):
            return passing_bytes(self._base, self._num_threads)
        return resident_bytes(self._base)

    def _bytes_of(self, jobs: Sequence[Job]) -> int:
        return device_bytes([job.plan for job in jobs], self._num_threads)
