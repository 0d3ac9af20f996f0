"""What commands about the queue begin with: the queue itself, and which of its jobs are meant."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jobs.errors import BadInputError, FailureClass
from jobs.states import JobState

if TYPE_CHECKING:
    from cluster.front.service import Service
    from jobs.ledger.selection import Selection
    from jobs.ledger.store import JobStore


@contextlib.contextmanager
def open_service() -> "Iterator[Service]":
    """Open the queue of the settings: behind their server where one is set, else over their ledger.

    A ledger that is missing is made by what adds to it alone; a question to none is answered so.
    """
    from cluster.settings import load_settings
    from workers.sources.folders import Folders

    settings = load_settings()
    if settings.server is not None:
        from cluster.front.client import HttpService

        service: Service = HttpService(settings.server, settings.read_token(), Folders)
    else:
        from cluster.front.ledger import LedgerService

        service = LedgerService(settings, Folders)
    with contextlib.closing(service):
        yield service


@contextlib.contextmanager
def open_store() -> "Iterator[JobStore]":
    """Open the ledger of the settings, for its upkeep.

    Raises:
        BadInputError: the settings name a server, whose ledger is elsewhere.
    """
    from cluster.settings import load_settings
    from jobs.ledger.store import JobStore

    settings = load_settings()
    if settings.server is not None:
        raise BadInputError("this command works on the ledger itself: run it where that is, without MERGEFLEET_SERVER")
    with contextlib.closing(JobStore(settings.store, create=False)) as store:
        yield store


def select(
    service: "Service | JobStore",
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
        BadInputError: a label is no K=V, or a batch is none.
    """
    from jobs.ledger.selection import Selection

    given = (*(ids or ()), *(labels or ()), batch or "")
    if broken := [text for text in given if any("\ud800" <= letter <= "\udfff" for letter in text)]:
        raise BadInputError(f"expected ids, labels and batches in UTF-8, found {broken[0]!r}")
    pairs = [label.partition("=") for label in labels or ()]
    if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
        raise BadInputError(f"--label: expected K=V, found {wrong[0]!r}")
    if batch is not None and batch not in (known := [each.name for each in service.batches()]):
        raise BadInputError(f"no such batch: {batch}; there are: {', '.join(known[-20:]) or 'none'}")
    return Selection(
        ids=ids or None,
        batch=batch,
        states=states or None,
        labels={name: value for name, _, value in pairs},
        failures=failures or None,
        since=since,
    )


def choose(service: "Service", **narrows: object) -> "Selection":
    """Return the jobs a person chose to change; arguments as `select` takes them.

    Raises:
        BadInputError: nothing was chosen; all jobs are never meant by saying nothing.
    """
    if not any(narrows.values()):
        raise BadInputError("name the jobs: ids, --batch, --state, --label, or for retry --failed and --class")
    return select(service, **narrows)  # type: ignore[arg-type]
