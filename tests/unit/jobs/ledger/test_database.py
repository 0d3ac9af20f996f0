"""The database below the ledger: its URL, its file, locks and its clock, and what its faults become."""

import json
import os
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest

from cluster.settings import Settings
from jobs.errors import BadInputError, TransientIOError
from jobs.ledger.store import JobStore
from tests.releases import settle


class TestOpening:
    def test_the_directory_is_made_and_commits_reach_the_disk(self, sqlite_store, database):
        assert database.is_file()
        sqlite_store.counts()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in database.parent.glob(f"{database.name}*")}
        assert len(modes) > 1
        assert set(modes.values()) == {0o600}
        with sqlite_store._database.read() as connection:
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
            assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1

    def test_what_is_there_is_kept(self, sqlite_store, database, make_request):
        sqlite_store.submit([make_request("a")])
        again = JobStore(f"sqlite:///{database}")
        assert again.jobs() == sqlite_store.jobs()
        again.close()

    def test_a_relative_path_stays_where_it_was(self, tmp_path, monkeypatch, make_request):
        monkeypatch.chdir(tmp_path)
        store = JobStore("sqlite:///here/jobs.db")
        monkeypatch.chdir("/")
        store.submit([make_request("a")])
        store.close()
        assert (tmp_path / "here" / "jobs.db").is_file()

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
        with pytest.raises(BadInputError, match="cannot be made or opened"):
            JobStore(f"sqlite:///{tmp_path}/file/jobs.db")


class TestFile:
    """What may happen to the file of a ledger."""

    def test_a_missing_one_is_not_made_by_commands_that_only_read(self, database):
        with pytest.raises(BadInputError, match=r"no ledger here; `mergefleet submit` makes one, or set MERGEFLEET_"):
            JobStore(f"sqlite:///{database}", create=False)
        assert not database.parent.exists()

    def test_a_new_one_appears_whole_and_leaves_nothing_beside_it(self, sqlite_store, database):
        sqlite_store.close()
        assert [path.name for path in database.parent.iterdir()] == [database.name]
        assert database.stat().st_size > 0

    @pytest.mark.parametrize("create", [True, False])
    def test_an_empty_one_is_refused_and_stays(self, database, create):
        database.parent.mkdir()
        database.touch()
        with pytest.raises(BadInputError, match=r"is an empty file, .* restore it .* or delete it to begin anew"):
            JobStore(f"sqlite:///{database}", create=create)
        assert database.stat().st_size == 0

    def test_one_with_overwritten_pages_is_refused_at_the_first_page_that_is_wrong(
        self, sqlite_store, database, make_request
    ):
        sqlite_store.submit([make_request(f"r{index}") for index in range(500)])
        sqlite_store.close()
        num_bytes = database.stat().st_size
        with database.open("r+b") as file:  # all but the page that names the tables
            file.seek(num_bytes // 4)
            file.write(b"\xa5" * (num_bytes // 2))
        again = JobStore(f"sqlite:///{database}")
        with pytest.raises(
            BadInputError, match=r"is damaged, .*; restore it from a backup \(docs/operations.md, Backup\)"
        ):
            again.jobs()
        again.close()

    def test_one_that_was_cut_off_is_refused(self, sqlite_store, database, make_request):
        sqlite_store.submit([make_request(f"r{index}") for index in range(500)])
        sqlite_store.close()
        os.truncate(database, 100)
        with pytest.raises(BadInputError, match="is damaged"):
            JobStore(f"sqlite:///{database}")

    @pytest.mark.parametrize("verb", ["read", "write"])
    def test_one_that_is_deleted_while_it_is_open(self, sqlite_store, database, make_request, verb):
        database.rename(database.with_name("elsewhere.db"))
        with pytest.raises(BadInputError, match="was moved or deleted while it was open; put it back"):
            sqlite_store.jobs() if verb == "read" else sqlite_store.submit([make_request("a")])
        assert not database.exists()
        database.with_name("elsewhere.db").rename(database)
        assert sqlite_store.submit([make_request("a")]).created == ("a",)

    @pytest.mark.parametrize("verb", ["read", "write"])
    def test_one_that_is_replaced_while_it_is_open(self, sqlite_store, database, make_request, verb):
        JobStore(f"sqlite:///{database}.new").close()
        Path(f"{database}.new").replace(database)
        with pytest.raises(BadInputError, match="was replaced by another file while it was open; start again"):
            sqlite_store.jobs() if verb == "read" else sqlite_store.submit([make_request("a")])
        again = JobStore(f"sqlite:///{database}")
        assert again.jobs() == ()
        again.close()


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

    def test_the_database_itself_refuses_two_jobs_for_one_destination(self, sqlite_store, make_request, database):
        sqlite_store.submit([make_request("a"), make_request("b")])
        with sqlite3.connect(database) as connection, pytest.raises(sqlite3.IntegrityError, match="destination"):
            connection.execute("UPDATE jobs SET destination = '/releases/a' WHERE id = 'b'")
        connection.close()

    def test_a_writer_that_holds_on_for_too_long_is_a_transient_fault(self, sqlite_store, make_request, database):
        with sqlite_store._database.write() as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 50")
        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(TransientIOError, match="locked by another process that does not go on"):
            sqlite_store.submit([make_request("a")])
        assert sqlite_store.jobs() == ()
        holder.execute("ROLLBACK")
        holder.close()
        assert sqlite_store.submit([make_request("a")]).created == ("a",)

    def test_a_driver_that_waits_for_a_writer_can_still_keep_its_leases(self, sqlite_store):
        with sqlite_store._database.read() as connection:
            wait_milliseconds = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()
        # Leases are extended every third of their length.
        assert wait_milliseconds / 1000 <= Settings().lease_seconds / 3

    def test_readers_do_not_wait_for_a_writer(self, sqlite_store, make_request, database):
        sqlite_store.submit([make_request("a")])
        holder = sqlite3.connect(database, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        start = time.monotonic()
        assert [job.id for job in sqlite_store.jobs()] == ["a"]
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

    def test_events_are_readable_by_any_tool(self, sqlite_store, make_request, database):
        sqlite_store.submit([make_request("a")])
        sqlite_store.claim("driver", 1, 60)
        with sqlite3.connect(database) as connection:
            rows = connection.execute("SELECT sequence, state, detail FROM events ORDER BY sequence").fetchall()
        connection.close()
        assert [(number, state) for number, state, _ in rows] == [(1, "QUEUED"), (2, "LEASED")]
        assert json.loads(rows[1][2])["owner"] == "driver"
