"""What each class of failure leads to: how often a job is tried, how long it waits, what rests meanwhile."""

import random
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from jobs.errors import FailureClass
from jobs.frozen import Frozen
from jobs.states import Decision, JobState


class ClassPolicy(Frozen):
    """What follows failures of one class."""

    attempts: Annotated[int, Field(ge=1)] = 1
    """Attempts that count before the failure is final; of lost workers, losses while the job runs alone."""
    delay_seconds: Annotated[float, Field(ge=0)] = 2.0
    """Longest wait before the second attempt; doubles with each one."""
    max_delay_seconds: Annotated[float, Field(ge=0)] = 300.0
    """Longest wait before any attempt; also the longest pause of a place."""
    pauses_place: bool = False
    """Whether a place that is known to be at fault is paused, and the attempt does not count."""
    alone: bool = False
    """Whether the job runs in a pass of its own from then on."""

    def longest_wait(self, number: int) -> float:
        """Return the longest wait (seconds) after so many tries: it doubles with each of them, up to a limit."""
        return min(self.max_delay_seconds, self.delay_seconds * 2.0 ** min(number - 1, 64))


class FailurePolicy(Frozen):
    """The policies of all classes."""

    by_class: Mapping[FailureClass, ClassPolicy]

    def __getitem__(self, failure: FailureClass) -> ClassPolicy:
        return self.by_class[failure]

    def decide(self, failure: FailureClass, *, attempts: int, worker_losses: int, rng: random.Random) -> Decision:
        """Decide what follows the failure of one attempt that counts.

        Exponential backoff with full jitter (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter).

        Args:
            failure: the class of the error.
            attempts: attempts that count so far, this one included.
            worker_losses: workers this job has cost so far while it ran alone, this one included.
            rng: source of the jitter.

        Returns:
            The next state and the delay before it may be claimed.
        """
        policy = self[failure]
        if failure is FailureClass.CANCELLED:
            return Decision(state=JobState.CANCELLED)
        if failure is FailureClass.WORKER_LOST and worker_losses >= policy.attempts:
            return Decision(state=JobState.QUARANTINED, alone=policy.alone)
        if failure is not FailureClass.WORKER_LOST and attempts >= policy.attempts:
            return Decision(state=JobState.FAILED, alone=policy.alone)
        delay_seconds = rng.uniform(0, policy.longest_wait(attempts))
        return Decision(state=JobState.RETRY_WAIT, delay_seconds=delay_seconds, alone=policy.alone)


def failure_policy(
    *,
    max_attempts: int = 5,
    max_worker_losses: int = 2,
    delay_seconds: float = 2.0,
    max_delay_seconds: float = 300.0,
    overrides: Mapping[FailureClass, Mapping[str, object]] | None = None,
) -> FailurePolicy:
    """Return the policies, as an operator's settings have them.

    Args:
        max_attempts: of the classes that may go away by themselves.
        max_worker_losses: before a job is quarantined.
        delay_seconds: longest wait before a second attempt.
        max_delay_seconds: longest wait before any.
        overrides: by class, fields of its policy that are set apart.
    """
    waits = {"delay_seconds": delay_seconds, "max_delay_seconds": max_delay_seconds}
    once = ClassPolicy(**waits)
    again = ClassPolicy(attempts=max_attempts, **waits)
    rests = again.model_copy(update={"pauses_place": True})
    defaults = dict.fromkeys(FailureClass, once) | {
        FailureClass.TRANSIENT_IO: rests,
        FailureClass.NO_CAPACITY: rests,
        FailureClass.AUTH: once.model_copy(update={"pauses_place": True}),
        FailureClass.OUT_OF_MEMORY: again.model_copy(update={"alone": True}),
        FailureClass.WORKER_LOST: ClassPolicy(attempts=max_worker_losses, alone=True, **waits),
        FailureClass.INTERNAL: once.model_copy(update={"alone": True}),
    }
    set_apart = {
        failure: ClassPolicy.model_validate(defaults[failure].model_dump() | dict(fields))
        for failure, fields in (overrides or {}).items()
    }
    return FailurePolicy(by_class=defaults | set_apart)
