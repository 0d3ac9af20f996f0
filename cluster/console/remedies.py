"""What a person can do about each class of failure."""

from collections.abc import Mapping

from jobs.errors import FailureClass

REMEDIES: Mapping[FailureClass, str] = {
    FailureClass.BAD_INPUT: (
        "mend what the message names, then `mergefleet retry`; where the request itself has to change, submit it under "
        "another id"
    ),
    FailureClass.AUTH: (
        "give driver and workers credentials that may do this (AWS_*, HF_TOKEN), then `mergefleet retry`"
    ),
    FailureClass.NOT_FOUND: (
        "put what is named where the request says, then `mergefleet retry`; or submit it with the right place under "
        "another id"
    ),
    FailureClass.TRANSIENT_IO: (
        "it met this fault again and again while others got past the place: look at what the message names, then "
        "`mergefleet retry`"
    ),
    FailureClass.NO_CAPACITY: "make room on the disk that is named, then `mergefleet retry`",
    FailureClass.OUT_OF_MEMORY: (
        "give it more memory: fewer workers on a machine (MERGEFLEET_WORKERS), a larger machine, or parity level "
        "arithmetic; then `mergefleet retry`"
    ),
    FailureClass.TOO_LARGE: (
        "add a machine that has what the message asks for, or move cache and scratch to a larger disk; then "
        "`mergefleet retry`"
    ),
    FailureClass.PARITY_FAILED: (
        "nothing was published: its parity report names the tensors or figures; look at adapter and base, and at the "
        "thresholds of the request; if neither explains it, it is a fault of mergefleet"
    ),
    FailureClass.WORKER_LOST: (
        "alone on them, it ends its workers: its events and `mergefleet logs` have the end of each; look at its "
        "adapter and at the memory of the machine before `mergefleet retry`"
    ),
    FailureClass.TIMED_OUT: (
        "its events say in which state the time went; submit it with a larger timeout_seconds, or `mergefleet retry` "
        "when the machine has less to do"
    ),
    FailureClass.DEADLINE_PASSED: "submit it again with a later deadline, or a higher priority",
    FailureClass.CANCELLED: "`mergefleet retry` if it should be merged after all",
    FailureClass.LEASE_LOST: "another driver took it over: `mergefleet status` has the drivers",
    FailureClass.INTERNAL: (
        "a fault of mergefleet: `mergefleet logs` has its traceback, which belongs in a report of it; `mergefleet "
        "retry` tries once more"
    ),
}
