"""One error tree. The class of an error decides what happens next: retry, wait, or stop and tell the person.

Every error takes positional arguments only, so that it survives pickling between processes.
"""

from enum import StrEnum
from typing import ClassVar, Self


class FailureClass(StrEnum):
    """Why a job failed, as stored in the ledger and shown to people."""

    BAD_INPUT = "bad_input"
    AUTH = "auth"
    NOT_FOUND = "not_found"
    TRANSIENT_IO = "transient_io"
    NO_CAPACITY = "no_capacity"
    OUT_OF_MEMORY = "out_of_memory"
    TOO_LARGE = "too_large"
    PARITY_FAILED = "parity_failed"
    WORKER_LOST = "worker_lost"
    TIMED_OUT = "timed_out"
    DEADLINE_PASSED = "deadline_passed"
    CANCELLED = "cancelled"
    LEASE_LOST = "lease_lost"
    INTERNAL = "internal"


class MergefleetError(Exception):
    """Base of every error mergefleet raises on purpose. The message says what was expected, found, and what to do."""

    failure_class: ClassVar[FailureClass] = FailureClass.INTERNAL
    place: str | None = None
    """Whose fault it is, where many jobs depend on it (`jobs.places`); None when it is no fault of a place."""

    def at(self, place: str | None) -> Self:
        """Name the place whose fault it is."""
        self.place = place
        return self


class BadInputError(MergefleetError):
    """The request, the base or the adapter is wrong, and stays wrong however often it is tried."""

    failure_class = FailureClass.BAD_INPUT


class InvalidValueError(BadInputError, ValueError):
    """One value is not what its field asks for. Also a ValueError: pydantic collects it with the other mistakes.

    Args:
        expected: what the field takes, in words.
        found: what was there, as a person would recognize it.
    """

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        return f"expected {self.expected}, found {self.found}"


class UnsupportedError(BadInputError):
    """The input is valid, but mergefleet refuses it by name rather than merge it wrongly."""


class DestinationOccupiedError(BadInputError):
    """The destination holds something other than this release."""


class StoreUnusableError(BadInputError):
    """The ledger is damaged, was moved or replaced, or may not be opened: it stays so until a person acts."""


class AuthError(MergefleetError):
    """Credentials are missing, wrong or not allowed to do this."""

    failure_class = FailureClass.AUTH


class NotFoundError(MergefleetError):
    """A file, repository, revision or bucket does not exist."""

    failure_class = FailureClass.NOT_FOUND


class StoreMissingError(NotFoundError):
    """The server has no such database, or no such role, for the ledger."""


class TransientIOError(MergefleetError):
    """A network or store fault that is worth trying again."""

    failure_class = FailureClass.TRANSIENT_IO


class NoCapacityError(MergefleetError):
    """Not enough disk, or no worker large enough for this job, at the moment."""

    failure_class = FailureClass.NO_CAPACITY


class NotNowError(NoCapacityError):
    """Others have what this job needs, on the machine that it was given to; it waits for them."""


class TooLargeError(MergefleetError):
    """It needs more than the machine has in all; a larger one may do it."""

    failure_class = FailureClass.TOO_LARGE


class OutOfMemoryError(MergefleetError):
    """Host or device memory ran out."""

    failure_class = FailureClass.OUT_OF_MEMORY


class ParityFailedError(MergefleetError):
    """The merged bytes do not compute what base + adapter computes. Nothing was published."""

    failure_class = FailureClass.PARITY_FAILED


class WorkerLostError(MergefleetError):
    """The worker died or stopped answering."""

    failure_class = FailureClass.WORKER_LOST


class DeviceLostError(WorkerLostError):
    """The worker cannot use its GPU, at its start or any more. Other workers can do its work."""


class TimedOutError(MergefleetError):
    """The attempt took longer than its request allows."""

    failure_class = FailureClass.TIMED_OUT


class CancelledError(MergefleetError):
    """A user asked for this job to stop."""

    failure_class = FailureClass.CANCELLED


class LeaseLostError(MergefleetError):
    """Another driver holds this job now; this one must not write."""

    failure_class = FailureClass.LEASE_LOST


class InternalError(MergefleetError):
    """A fault of mergefleet itself."""
