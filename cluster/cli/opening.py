"""What commands about the queue begin with: the ledger, and which of its jobs are meant."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.errors import BadInputError, FailureClass
from jobs.states import JobState

if TYPE_CHECKING:
    from jobs.ledger.selection import Selection
    from jobs.ledger.store import JobStore


@contextlib.contextmanager
def open_store(*, create: bool = False) -> "Iterator[JobStore]":
    """Open the ledger of the settings.

    Args:
        create: whether one that is missing is made; a question to none is answered so.
    """
    from cluster.settings import load_settings
    from jobs.ledger.store import JobStore

    with contextlib.closing(JobStore(load_settings().store, create=create)) as store:
        yield store


def select(
    store: "JobStore",
    *,
    ids: list[str] | None = None,
    batch: str | None = None,
    states: list[JobState] | None = None,
    labels: list[str] | None = None,
    failures: list[FailureClass] | None = None,
    since: float | None = None,
) -> "Selection":
    """Return the jobs a person asked for; everything when nothing narrows it.

    Raises:
        BadInputError: a label is no K=V, or an id or batch is none.
    """
    from jobs.ledger.selection import Selection

    given = (*(ids or ()), *(labels or ()), batch or "")
    if broken := [text for text in given if any("\ud800" <= letter <= "\udfff" for letter in text)]:
        raise BadInputError(f"expected ids, labels and batches in UTF-8, found {broken[0]!r}")
    pairs = [label.partition("=") for label in labels or ()]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise BadInputError(f"--label: expected K=V, found {wrong[0]!r}")
    if ids and (unknown := set(ids) - set(store.ids(Selection(ids=ids)))):
        raise BadInputError(f"no such job: {', '.join(sorted(unknown))}")
    if batch is not None and batch not in (known := [each.name for each in store.batches()]):
        raise BadInputError(f"no such batch: {batch}; there are: {', '.join(known[-20:]) or 'none'}")
    return Selection(
        ids=ids or None,
        batch=batch,
        states=states or None,
        labels={name: value for name, _, value in pairs},
        failures=failures or None,
        since=since,
    )


def choose(store: "JobStore", **narrows: object) -> tuple[str, ...]:
    """Return the ids of the jobs a person chose to change; arguments as `select` takes them.

    Raises:
        BadInputError: nothing was chosen; all jobs are never meant by saying nothing.
    """
    if not any(narrows.values()):
        raise BadInputError("name the jobs: ids, --batch, --state, --label, or for retry --failed and --class")
    return store.ids(select(store, **narrows))  # type: ignore[arg-type]
