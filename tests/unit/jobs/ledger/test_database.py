"""The database below the ledger: locks, its clock, schema versions, and what its faults become."""

import json
import sqlite3
import stat
import threading
import time

import pytest

from cluster.settings import Settings
from jobs.errors import BadInputError, FailureClass, TransientIOError
from jobs.ledger.store import JobStore
from tests.releases import settle


class TestOpening:
    def test_the_directory_is_made_and_commits_reach_the_disk(self, store, database):
        assert database.is_file()
        store.counts()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.parent.glob(f"{database.name}*")}
        assert len(modes) > 1
        assert set(modes.values()) == {0o600}
        with store._database.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1

    def test_what_is_there_is_kept(self, store, database, make_request):
        store.submit([make_request("a")])
        again = JobStore(f"sqlite:///{database}")
        assert again.jobs() == store.jobs()
        again.close()

    def test_a_relative_path_stays_where_it_was(self, tmp_path, monkeypatch, make_request):
        monkeypatch.chdir(tmp_path)
        store = JobStore("sqlite:///here/jobs.db")
        monkeypatch.chdir("/")
        store.submit([make_request("a")])
        store.close()
        assert (tmp_path / "here" / "jobs.db").is_file()

    def test_a_newer_schema_is_refused(self, store, database):
        store.close()
        with sqlite3.connect(database) as connection:
            connection.execute("UPDATE mergefleet_schema SET version = 99")
        connection.close()
        with pytest.raises(BadInputError, match="expected schema 2, found 99"):
            JobStore(f"sqlite:///{database}")

    def test_an_older_schema_is_brought_up_to_this_one(self, store, driver, make_request, database):
        store.submit([make_request(name) for name in ("died", "good")])
        store.isolate("died", driver.claim("died").token, FailureClass.WORKER_LOST, "lost", "why")
        store.close()
        with sqlite3.connect(database) as connection:  # as version 1 had it
            for column in ("suspect", "excused_losses"):
                connection.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
            connection.execute("UPDATE mergefleet_schema SET version = 1")
        connection.close()
        for _ in range(2):
            again = JobStore(f"sqlite:///{database}")
            assert [(job.id, job.failure_class) for job in again.jobs()] == [("died", "worker_lost"), ("good", None)]
            again.close()
        again = JobStore(f"sqlite:///{database}")
        assert [(lease.job_id, lease.suspect) for lease in again.claim("driver", 2, 60)] == [
            ("died", True),
            ("good", False),
        ]
        again.close()

    def test_the_tables_of_another_program_are_left_alone(self, tmp_path):
        path = tmp_path / "other.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE jobs (x)")
        connection.close()
        with pytest.raises(BadInputError, match="tables of another program: jobs"):
            JobStore(f"sqlite:///{path}")

    def test_a_file_that_is_no_database(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("x" * 2000)
        with pytest.raises(BadInputError, match="file is not a database"):
            JobStore(f"sqlite:///{path}")
        assert path.read_text() == "x" * 2000

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "nonsense",
            "sqlite://",
            "sqlite:///:memory:",
            "sqlite:///",
            "mysql://user:secret@host/name",
            "a:secret@b",
        ],
    )
    def test_urls_that_name_no_store(self, url):
        with pytest.raises(BadInputError, match="expected a store such as") as caught:
            JobStore(url)
        assert "secret" not in str(caught.value)

    def test_a_missing_driver(self):
        with pytest.raises(BadInputError, match=r"postgresql\+nodriver://user:\*\*\*@host/name: its driver"):
            JobStore("postgresql+nodriver://user:secret@host/name")

    def test_a_directory_in_place_of_a_file(self, tmp_path):
        with pytest.raises(BadInputError, match="cannot be opened"):
            JobStore(f"sqlite:///{tmp_path}")
        (tmp_path / "file").touch()
        with pytest.raises(BadInputError, match="cannot make its directory"):
            JobStore(f"sqlite:///{tmp_path}/file/jobs.db")


class TestDatabase:
    def test_a_transaction_that_raises_leaves_nothing(self, store, driver, make_request, make_release, monkeypatch):
        store.submit([make_request("a")])
        token = driver.claim("a").token
        before = driver.record("a"), store.events("a")
        release = make_release("a").model_copy(update={"manifest": make_release("a").manifest})
        monkeypatch.setattr(type(release), "model_dump_json", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            settle(store, "a", token, release, None)
        assert (driver.record("a"), store.events("a")) == before

    def test_the_database_itself_refuses_two_jobs_for_one_destination(self, store, make_request, database):
        store.submit([make_request("a"), make_request("b")])
        with sqlite3.connect(database) as connection, pytest.raises(sqlite3.IntegrityError, match="destination"):
            connection.execute("UPDATE jobs SET destination = '/releases/a' WHERE id = 'b'")
        connection.close()

    def test_a_writer_that_holds_on_for_too_long_is_a_transient_fault(self, store, make_request, database):
        with store._database.write() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 50")
        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(TransientIOError, match="database is locked"):
            store.submit([make_request("a")])
        assert store.jobs() == ()
        holder.execute("ROLLBACK")
        holder.close()
        assert store.submit([make_request("a")]).created == ("a",)

    def test_a_driver_that_waits_for_a_writer_can_still_keep_its_leases(self, store):
        with store._database.read() as connection:
            wait_milliseconds = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
        # Leases are extended every third of their length.
        assert wait_milliseconds / 1000 <= Settings().lease_seconds / 3

    def test_readers_do_not_wait_for_a_writer(self, store, make_request, database):
        store.submit([make_request("a")])
        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        assert [job.id for job in store.jobs()] == ["a"]
        assert time.monotonic() - start < 5
        holder.close()

    def test_threads_share_a_store(self, store, make_request):
        store.submit([make_request(f"r{index}") for index in range(40)])
        taken = []

        def drain(owner):
            while leases := store.claim(owner, 1, 60):
                taken.extend(lease.job_id for lease in leases)

        threads = [threading.Thread(target=drain, args=(f"driver-{index}",)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(taken) == sorted(f"r{index}" for index in range(40))

    def test_events_are_readable_by_any_tool(self, store, driver, make_request, database):
        store.submit([make_request("a")])
        driver.claim("a")
        with sqlite3.connect(database) as connection:
            rows = connection.execute("SELECT sequence, state, detail FROM events ORDER BY sequence").fetchall()
        connection.close()
        assert [(number, state) for number, state, _ in rows] == [(1, "QUEUED"), (2, "LEASED")]
        assert json.loads(rows[1][2])["owner"] == "driver"
