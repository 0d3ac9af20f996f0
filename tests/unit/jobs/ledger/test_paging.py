"""Long lists in pieces, on each kind of store."""

import pytest

from jobs.errors import InvalidValueError, NotFoundError
from jobs.ledger import paging
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState


@pytest.fixture
def store(store_url):
    store = JobStore(store_url)
    fields = {"base": "/b", "adapter": "/a"}
    requests = [
        MergeRequest.model_validate({"id": f"j{each}", "destination": f"/o/{each}", "priority": each % 3, **fields})
        for each in range(8)
    ]
    store.submit(requests[:5], "first")
    store.submit(requests[5:], "second")
    yield store
    store.close()


@pytest.mark.parametrize("order", ["submitted", "updated", "priority"])
@pytest.mark.parametrize("limit", [1, 3, 8, 9])
def test_pages_hold_every_job_once_and_in_order(store, order, limit):
    found, cursor, num_pages = [], None, 0
    while num_pages == 0 or cursor is not None:
        page = store.page(order=order, limit=limit, cursor=cursor)
        assert len(page.jobs) <= limit
        found += page.jobs
        cursor, num_pages = page.next_cursor, num_pages + 1
    assert tuple(found) == store.jobs(order=order)
    assert num_pages == -(-8 // limit)


def test_a_cursor_of_another_order_is_refused(store):
    cursor = store.page(order="priority", limit=1).next_cursor
    with pytest.raises(InvalidValueError, match="in the order 'updated'"):
        store.page(order="updated", limit=1, cursor=cursor)


def test_changes_come_in_pieces_oldest_first(store, monkeypatch):
    monkeypatch.setattr(paging, "_MAX_CHANGES", 3)
    store.cancel(["j0", "j7"])
    found = list(store.changes(0.0))
    assert [(event.job_id, event.state) for event in found] == [
        *((f"j{each}", JobState.QUEUED) for each in range(8)),
        ("j0", JobState.CANCELLED),
        ("j7", JobState.CANCELLED),
    ]
    assert list(store.changes(found[-1].at)) == found[-2:]
    assert list(store.changes(0.0, until=found[-1].at)) == found[:8]


def test_one_batch_is_as_it_is_among_all(store):
    assert [store.batch(name) for name in ("first", "second")] == list(store.batches())
    assert [job.id for job in store.page(Selection(batch="second"), limit=9).jobs] == ["j5", "j6", "j7"]
    with pytest.raises(NotFoundError, match="no such batch: third"):
        store.batch("third")
