"""Ledgers of older and newer schemas: refused as they are, and brought up by one command alone."""

import re

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, inspect, select, text

from jobs.errors import BadInputError, NotFoundError
from jobs.ledger.schema import SCHEMA, jobs, metadata
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore, upgrade_store
from jobs.states import JobState
from tests.unit.jobs.ledger.conftest import OLD_JOBS, raw

OLD = ["0001", "0002", "0003"]


def everything(connection: Connection) -> dict[str, list[tuple[object, ...]]]:
    """Return all rows of all tables."""
    names = sorted(inspect(connection).get_table_names())
    return {name: sorted(map(tuple, connection.execute(text(f"SELECT * FROM {name}")))) for name in names}


def shape(connection: Connection) -> dict[str, object]:
    """Return what a database says of its tables, but the order of their columns."""
    seen = inspect(connection)
    tables: dict[str, object] = {}
    for table in seen.get_table_names():
        columns = {
            column["name"]: (str(column["type"]), column["nullable"], column["default"] is not None)
            for column in seen.get_columns(table)
        }
        foreign = {(*key["constrained_columns"], key["referred_table"]) for key in seen.get_foreign_keys(table)}
        unique = {tuple(key["column_names"]) for key in seen.get_unique_constraints(table)}
        checks = {key["name"] for key in seen.get_check_constraints(table)}
        primary = seen.get_pk_constraint(table)["constrained_columns"]
        tables[table] = columns, foreign, unique, checks, primary
    if connection.dialect.name == "sqlite":
        query = "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    else:
        query = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    # Alembic gives the key of its table another name.
    indexes = {name: re.sub(r"[\s()]+", " ", sql).strip() for name, sql in connection.execute(text(query))}
    return tables | {f"index {name}": sql for name, sql in indexes.items() if not name.startswith("alembic_")}


class TestOlder:
    @pytest.mark.parametrize("schema", OLD)
    @pytest.mark.parametrize("create", [True, False])
    def test_it_is_refused_with_the_command_that_brings_it_up_and_stays_as_it_is(
        self, new_url, make_old, schema, create
    ):
        make_old(new_url, schema)
        with raw(new_url) as connection:
            before = everything(connection)
        with pytest.raises(
            BadInputError, match=rf"expected schema {SCHEMA}, found {schema}; .*mergefleet store upgrade"
        ):
            JobStore(new_url, create=create)
        with raw(new_url) as connection:
            assert everything(connection) == before

    @pytest.mark.parametrize("schema", OLD)
    def test_it_is_brought_up_with_all_that_is_in_it(self, new_url, make_old, schema):
        make_old(new_url, schema)
        assert upgrade_store(new_url) == (schema, SCHEMA)
        assert upgrade_store(new_url) == (SCHEMA, SCHEMA)
        store = JobStore(new_url, create=False)
        assert {job.id: job.state for job in store.jobs()} == {
            name: JobState(columns["state"]) for name, columns in OLD_JOBS.items()
        }
        assert {job.batch for job in store.jobs()} == {"earlier"}
        (batch,) = store.batches()
        assert (batch.name, batch.created_at, sum(batch.counts.values())) == ("earlier", 3.0, len(OLD_JOBS))
        assert [work.base for work in store.work()] == [f"/models/{number}" for number in range(1, 6)]
        assert store.ids(Selection(labels={"team": "x"})) == tuple(OLD_JOBS)
        assert [event.sequence for name in OLD_JOBS for event in store.events(name)] == [1] * len(OLD_JOBS)
        # The attempts of lost drivers do not count, begun or not: they were counted when the jobs were claimed.
        leases = {lease.job_id: lease for lease in store.claim("driver", 9, 60)}
        assert {name: lease.attempts for name, lease in leases.items()} == {
            "queued": 1,
            "leased": 2,
            "merging": 2,
            "died": 2,
        }
        # Schema 2 knew suspects; of schema 1, those are that have cost a worker.
        suspect = "died" if schema == "0001" else "queued"
        assert [name for name, lease in leases.items() if lease.suspect] == [suspect]
        assert store.retry(["failed"]) == ("failed",)
        assert leases.keys().isdisjoint(lease.job_id for lease in store.claim("driver", 9, 60))
        store.close()

    @pytest.mark.parametrize("schema", OLD)
    def test_it_then_has_the_tables_of_a_new_one(self, open_url, make_old, schema):
        with open_url() as old, open_url() as new:
            make_old(old, schema)
            upgrade_store(old)
            JobStore(new).close()
            with raw(old) as migrated, raw(new) as made:
                assert compare_metadata(MigrationContext.configure(migrated), metadata) == []
                expected = shape(made)
                assert {"jobs", "pauses", "index jobs_by_turn", "index jobs_one_per_destination"} <= expected.keys()
                found = shape(migrated)
                assert {name: found.get(name) for name in expected} == expected
                assert found.keys() == expected.keys()

    def test_one_without_jobs(self, new_url, make_old):
        make_old(new_url, "0001")
        with raw(new_url) as connection:
            for table in ("events", "labels", "jobs"):
                connection.execute(text(f"DELETE FROM {table}"))
        upgrade_store(new_url)
        store = JobStore(new_url)
        assert store.batches() == ()
        store.close()

    def test_a_migration_that_fails_leaves_it_as_it_was(self, new_url, make_old):
        make_old(new_url, "0001")
        with raw(new_url) as connection:
            connection.execute(text("UPDATE jobs SET request = '{}' WHERE id = 'failed'"))
            before = everything(connection)
        with pytest.raises(KeyError, match="base"):
            upgrade_store(new_url)
        with raw(new_url) as connection:
            assert everything(connection) == before


class TestNewer:
    def test_it_is_refused_and_stays_as_it_is(self, store, store_url):
        store.close()
        with raw(store_url) as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
            before = everything(connection)
        for call in (lambda: JobStore(store_url), lambda: upgrade_store(store_url)):
            with pytest.raises(BadInputError, match=rf"expected schema {SCHEMA}, found 0099; open it with"):
                call()
        with raw(store_url) as connection:
            assert everything(connection) == before


class TestMissing:
    def test_it_is_not_made_by_commands_that_only_read_or_upgrade(self, new_url):
        for call in (lambda: JobStore(new_url, create=False), lambda: upgrade_store(new_url)):
            with pytest.raises((NotFoundError, BadInputError), match="no ledger"):
                call()

    def test_the_tables_of_another_program_are_left_alone(self, new_url):
        with raw(new_url) as connection:
            connection.execute(text("CREATE TABLE events (x INTEGER)"))
            before = everything(connection)
        for call in (lambda: JobStore(new_url), lambda: upgrade_store(new_url)):
            with pytest.raises(BadInputError, match="tables of another program: events"):
                call()
        with raw(new_url) as connection:
            assert everything(connection) == before

    def test_a_new_one_has_the_tables_as_they_stand(self, new_url):
        JobStore(new_url).close()
        with raw(new_url) as connection:
            assert compare_metadata(MigrationContext.configure(connection), metadata) == []
            assert connection.scalar(text("SELECT version_num FROM alembic_version")) == SCHEMA
            assert connection.execute(select(jobs)).all() == []
