"""How many jobs of one driver ended how: a count for each way, whatever the number of jobs."""

from collections import Counter

from cluster.driving.events import JobSettled, Summary
from jobs.errors import FailureClass
from jobs.states import FINAL_STATES, JobState


class Tally:
    """Counts jobs as they end; one that is tried again counts when it is final."""

    def __init__(self) -> None:
        self._ended: Counter[str] = Counter()

    def count(self, event: JobSettled) -> None:
        """Count what became of an attempt."""
        if event.state is JobState.PUBLISHED:
            self._ended["published" if event.created else "unchanged"] += 1
        elif event.state is JobState.CANCELLED:
            self._ended["cancelled"] += 1
        elif event.state in FINAL_STATES and event.failure_class is not None:
            self._ended[event.failure_class] += 1

    def summary(self, left: int) -> Summary:
        """Return what became of the jobs so far.

        Args:
            left: jobs of the ledger that are not final.
        """
        return Summary(
            published=self._ended["published"],
            unchanged=self._ended["unchanged"],
            cancelled=self._ended["cancelled"],
            failures={failure: self._ended[failure] for failure in FailureClass if self._ended[failure]},
            left=left,
        )
