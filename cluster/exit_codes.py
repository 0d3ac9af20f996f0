"""Exit codes of the command line: 0 done, 1 some job failed, 2 bad input, 3 parity failed, 4 work is left."""

from collections.abc import Iterable

from jobs.errors import FailureClass

DONE = 0
FAILED = 1
BAD_INPUT = 2
PARITY_FAILED = 3
WORK_LEFT = 4
"""A driver was stopped, or people have paused what is left, or have to approve it; no job failed."""
INTERRUPTED = 130
"""As shells have it: 128 + SIGINT."""

EXIT_CODES = {
    FailureClass.BAD_INPUT: BAD_INPUT,
    FailureClass.AUTH: BAD_INPUT,
    FailureClass.NOT_FOUND: BAD_INPUT,
    FailureClass.TRANSIENT_IO: FAILED,
    FailureClass.NO_CAPACITY: FAILED,
    FailureClass.OUT_OF_MEMORY: FAILED,
    FailureClass.TOO_LARGE: FAILED,
    FailureClass.PARITY_FAILED: PARITY_FAILED,
    FailureClass.WORKER_LOST: FAILED,
    FailureClass.TIMED_OUT: FAILED,
    FailureClass.DEADLINE_PASSED: FAILED,
    FailureClass.CANCELLED: FAILED,
    FailureClass.LEASE_LOST: FAILED,
    FailureClass.INTERNAL: FAILED,
}
"""What a command that fails for this reason ends with."""


def of_command(failures: Iterable[FailureClass]) -> int:
    """Return the code of a command whose own input failed so; parity first, bad input only when it is all."""
    codes = {EXIT_CODES[failure] for failure in failures}
    return next((code for code in (PARITY_FAILED, FAILED, BAD_INPUT) if code in codes), DONE)


def of_jobs(failures: Iterable[FailureClass]) -> int:
    """Return the code of a command that looked after jobs that failed so; their bad input is not the command's."""
    codes = {PARITY_FAILED if failure is FailureClass.PARITY_FAILED else FAILED for failure in failures}
    return max(codes, default=DONE)
