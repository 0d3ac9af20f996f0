"""What a claim costs with few jobs and with many: by statements, by rows that are read, and by steps of SQLite."""

import datetime as dt

import pytest
from sqlalchemy import event, update

from jobs.errors import FailureClass
from jobs.ledger.pauses import Scope
from jobs.ledger.schema import jobs
from jobs.states import JobState

FEW, MANY = 100, 1600


@pytest.fixture
def hold(store, make_request):
    """Submit jobs and have them held, in one of several ways, until a claim finds nothing to mark."""

    def hold(way, count):
        fields = {"adapter": "hf://org/a"} if way == "met" else {"destination": "s3://bucket/"}
        requests = [
            make_request(f"{way}{index}", **{name: f"{value}{index}" for name, value in fields.items()})
            for index in range(count)
        ]
        place = "hf://" if way == "met" else "s3://bucket"
        if way == "met":
            store.pause(Scope.PLACE, place, "ann", "why")
            store.submit(requests)
        else:
            store.submit(requests)
            (lease,) = store.claim("driver", 1, 60)
            fault = {"failure": FailureClass.TRANSIENT_IO, "reason": "gone", "state": JobState.MERGING}
            store.pause_place(place, lease.job_id, by="driver", first_seconds=900, max_seconds=900, **fault)
            store.let_go(lease.job_id, lease.token, "fault")
        assert store.claim("driver", 1, 60) == ()
        assert sum(store.num_held().values()) == count

    return hold


def cost_of_claim(store, limit=3):
    """Return how many statements a claim of some jobs runs, how many rows they return, and steps of SQLite."""
    engine = store._database._engine
    statements, rows, steps = [], [], []
    executed = lambda *given: statements.append(given[2])  # noqa: E731 - listeners are removed as they were added

    def fetched(row):
        rows.append(row)

    with store._database.write() as connection:
        driver_connection = connection.connection.driver_connection
    is_sqlite = engine.dialect.name == "sqlite"
    if is_sqlite:
        driver_connection.set_progress_handler(lambda: steps.append(1), 10)
    else:
        make_row = driver_connection.row_factory

        def counting(cursor):
            make = make_row(cursor)
            return lambda values: fetched(values) or make(values)

        driver_connection.row_factory = counting
    event.listen(engine, "before_cursor_execute", executed)
    try:
        leases = store.claim("driver", limit, 60)
    finally:
        event.remove(engine, "before_cursor_execute", executed)
        if is_sqlite:
            driver_connection.set_progress_handler(None, 0)
        else:
            driver_connection.row_factory = make_row
    return leases, len(statements), len(steps) if is_sqlite else len(rows)


@pytest.mark.parametrize("way", ["marked", "met"])
def test_it_does_not_grow_with_jobs_that_are_held(store, make_request, hold, way):
    costs = []
    for round_, count in enumerate((FEW, MANY)):
        if round_:
            names = [f"{way}{index}" for index in range(FEW)]
            store.cancel(names)
            store.resume(Scope.PLACE, "hf://" if way == "met" else "s3://bucket")
            store.purge(-1)
        hold(way, count)
        store.submit([make_request(f"free-{round_}-{index}") for index in range(5)])
        leases, *cost = cost_of_claim(store)
        assert [lease.job_id for lease in leases] == [f"free-{round_}-{index}" for index in range(3)]
        costs.append(cost)
        for lease in leases:
            store.let_go(lease.job_id, lease.token, "drain")
        store.cancel([f"free-{round_}-{index}" for index in range(5)])
    (few_statements, few_steps), (many_statements, many_steps) = costs
    assert few_statements > 0 < few_steps
    assert many_statements == few_statements
    assert many_steps <= 1.5 * few_steps


def test_it_does_not_grow_with_jobs_that_have_ended_after_their_deadlines(sqlite_store, make_request):
    late = dt.datetime.fromtimestamp(sqlite_store.now() + 3600, tz=dt.UTC)
    costs = []
    for round_, count in enumerate((FEW, MANY)):
        names = [f"old-{round_}-{index}" for index in range(count)]
        sqlite_store.submit([make_request(name, deadline=late) for name in names])
        sqlite_store.cancel(names)
        with sqlite_store._database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.deadline.is_not(None)).values(deadline=1))
        sqlite_store.submit([make_request(f"free-{round_}-{index}") for index in range(3)])
        leases, *cost = cost_of_claim(sqlite_store)
        assert len(leases) == 3
        costs.append(cost)
    assert costs[1][0] == costs[0][0]
    assert costs[1][1] <= 1.5 * costs[0][1]


def test_one_claim_leaves_what_takes_too_long_to_the_next(store, make_request, monkeypatch):
    monkeypatch.setattr("jobs.ledger.claims._MAX_MARKED", 200)
    store.submit([make_request(f"r{index}", adapter="hf://org/a") for index in range(700)])
    store.submit([make_request("free")])
    store.pause(Scope.PLACE, "hf://", "ann", "why")
    held = []
    claimed = []
    while not claimed:
        claimed = store.claim("driver", 1, 60)
        held.append(sum(store.num_held().values()))
    assert [lease.job_id for lease in claimed] == ["free"]
    assert len(held) == 3
    assert held == sorted(set(held))
    assert held[-1] == 700
