"""A driver that follows another waits for what is away; the first one says at once what is wrong."""

import contextlib
import sqlite3
import stat
import threading

import pytest

from cluster.commands.run import _enter, _insisted
from cluster.ray_fleet.losses import SessionLostError
from cluster.ray_fleet.session import _enable_token_auth
from cluster.settings import Settings
from jobs.errors import NoCapacityError, TransientIOError
from jobs.ledger import sqlite
from jobs.ledger.store import JobStore


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite, "_BUSY_SECONDS", 0.1)
    it = Settings(home=tmp_path, poll_seconds=0.05)
    with contextlib.closing(JobStore(it.store)) as store:
        store.register_driver("first", "host", 1, "")
    return it


@pytest.fixture
def locked(settings):
    """The ledger, locked by a process that does not go on until the event is set."""
    free, is_locked = threading.Event(), threading.Event()

    def hold():
        with contextlib.closing(sqlite3.connect(settings.home / "mergefleet.db", isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            is_locked.set()
            free.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    is_locked.wait()
    yield free
    free.set()
    thread.join()


def test_the_first_driver_says_at_once_that_the_store_does_not_answer(settings, locked):  # noqa: ARG001
    with contextlib.ExitStack() as stack, pytest.raises(TransientIOError, match="locked by another process"):
        _enter(stack, settings, "second", None)


def test_a_driver_that_follows_another_waits_for_the_store(settings, locked, caplog):
    threading.Timer(0.5, locked.set).start()
    with contextlib.ExitStack() as stack:
        store = _enter(stack, settings, "second", "first")
        assert [each.owner for each in store.drivers()] == ["first", "second"]
        with pytest.raises(Exception, match="has a driver already"), store.one_driver("third"):
            pass
    assert "store does not answer; tried again" in caplog.messages


def test_ray_that_cannot_start_ends_a_first_driver_and_has_a_later_one_started_anew():
    with pytest.raises(NoCapacityError), _insisted(None):
        raise NoCapacityError("the disk is full")
    with pytest.raises(SessionLostError, match="the disk is full"), _insisted("first"):
        raise NoCapacityError("the disk is full")


@pytest.fixture
def no_token(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_token_is_made_once_and_for_this_user_alone(tmp_path, no_token, monkeypatch):  # noqa: ARG001
    path = _enable_token_auth(tmp_path / "home")
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert _enable_token_auth(tmp_path / "home").read_text() == token
    assert [each.name for each in path.parent.iterdir()] == ["ray_auth_token"]


def test_a_home_that_cannot_be_written_to_is_no_fault_of_mergefleet(tmp_path, no_token):  # noqa: ARG001
    (tmp_path / "home").symlink_to("/proc")  # where no one makes files
    with pytest.raises(Exception, match="keeping the token of Ray") as caught:
        _enable_token_auth(tmp_path / "home")
    assert caught.type.__module__ == "jobs.errors"
