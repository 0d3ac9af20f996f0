"""What is so on Postgres alone: what its faults become, and what its reads see."""

import socket

import pytest
from sqlalchemy import make_url

from jobs.errors import AuthError, BadInputError, NotFoundError, TransientIOError
from jobs.ledger.store import JobStore
from tests.unit.jobs.ledger.conftest import raw

pytestmark = pytest.mark.postgres

SECRET = "hunter2"


@pytest.fixture
def url(postgres_server):
    with postgres_server.database() as url:
        yield url


@pytest.fixture
def store(url):
    store = JobStore(url)
    yield store
    store.close()


@pytest.fixture
def other(url, store):
    other = JobStore(url)
    assert store.ids() == other.ids()
    yield other
    other.close()


class TestFaults:
    """Told in words, with what to do and without passwords."""

    def refuse(self, kind, match, url):
        with pytest.raises(kind, match=match) as caught:
            JobStore(url)
        shown = f"{caught.value} {caught.value.__cause__}"
        assert SECRET not in shown
        assert "postgresql" in str(caught.value)

    def test_a_server_that_is_away(self):
        with socket.socket() as held:  # bound, and not listening: it is no one else's
            held.bind(("127.0.0.1", 0))
            port = held.getsockname()[1]
            self.refuse(TransientIOError, "does not answer", f"postgresql://user:{SECRET}@127.0.0.1:{port}/name")

    def test_a_host_that_is_none(self):
        self.refuse(TransientIOError, "does not answer", f"postgresql://user:{SECRET}@nowhere.invalid/name")

    def test_a_wrong_password_and_the_right_one(self, postgres_server, url):
        postgres_server.make_user("guest", "right")
        postgres_server.execute(f"GRANT ALL ON DATABASE {make_url(url).database} TO guest")
        guest = make_url(url).set(username="guest")
        wrong = guest.set(password=SECRET).render_as_string(hide_password=False)
        self.refuse(AuthError, "refuses this user; check the user, its password", wrong)
        in_query = guest.set(password=None).update_query_dict({"password": SECRET})
        self.refuse(AuthError, "refuses this user", in_query.render_as_string(hide_password=False))
        without = guest.set(password=None).render_as_string()
        self.refuse(AuthError, "refuses this user", without)
        # It may connect, and may not make tables.
        right = guest.set(password="right").render_as_string(hide_password=False)
        self.refuse(AuthError, "does not let this user do that; grant it", right)

    def test_a_database_that_is_missing(self, url):
        missing = make_url(url).set(database="nothing", password=SECRET).render_as_string(hide_password=False)
        self.refuse(NotFoundError, "has no such database", missing)

    def test_a_user_that_is_missing(self, url):
        unknown = make_url(url).set(username="nobody", password=SECRET).render_as_string(hide_password=False)
        self.refuse(NotFoundError, "role", unknown)

    def test_an_option_that_is_none(self, url):
        self.refuse(BadInputError, "invalid .*option", f"{url}&speed=high")

    def test_connections_that_are_broken_between_two_calls_are_made_anew(
        self, store, postgres_server, url, make_request
    ):
        store.submit([make_request("a")])
        assert postgres_server.end_connections(url) > 0
        assert store.submit([make_request("b")]).created == ("b",)
        assert postgres_server.end_connections(url) > 0
        assert store.ids() == ("a", "b")

    def test_one_that_is_broken_inside_of_a_call_is_a_transient_fault_that_wrote_nothing(
        self, store, postgres_server, url, make_request, monkeypatch
    ):
        now = store._database.now
        monkeypatch.setattr(store._database, "now", lambda _: postgres_server.end_connections(url))
        with pytest.raises(TransientIOError, match="does not answer; nothing was written"):
            store.submit([make_request("a")])
        monkeypatch.setattr(store._database, "now", now)
        assert store.ids() == ()
        assert store.submit([make_request("a")]).created == ("a",)

    def test_a_lock_that_is_not_given_is_a_transient_fault(self, store, url, make_request):
        store.submit([make_request("a")])
        with raw(url) as holder:
            holder.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")
            with pytest.raises(TransientIOError, match="lock timeout"):
                self.wait_for_rows(store)
        assert store.cancel(["a"]) == ("a",)

    def wait_for_rows(self, store):
        with store._database.write() as connection:
            assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "10s"
            connection.exec_driver_sql("SET LOCAL lock_timeout = 50")
            connection.exec_driver_sql("SELECT * FROM jobs FOR UPDATE")


class TestReads:
    def test_all_of_a_question_sees_one_moment(self, store, other, make_request):
        with store._database.read() as connection:
            count = "SELECT count(*) FROM batches"
            assert connection.exec_driver_sql(count).scalar() == 0
            other.submit([make_request("a")])
            assert connection.exec_driver_sql(count).scalar() == 0
        assert [batch.name for batch in store.batches()] == ["default"]

    def test_it_changes_nothing(self, store):
        with pytest.raises(Exception, match="read-only transaction"), store._database.read() as connection:
            connection.exec_driver_sql("DELETE FROM jobs")
        with store._database.write() as connection:
            connection.exec_driver_sql("DELETE FROM jobs")


def test_no_plan_is_kept_from_when_there_were_few_jobs(store, make_request):
    """The second ten thousand requests took six seconds, and the third ten, by a plan from an empty table."""
    for number in range(10):
        store.submit([make_request(f"job-{number}")])
    with store._database.read() as connection:
        plans = connection.exec_driver_sql(
            "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements "
            "WHERE cardinality(parameter_types) > 0"
        )
        num_kept, num_made = plans.one()
    assert (num_kept, num_made > 0) == (0, True)


def test_no_url_shows_its_password(url):
    full = make_url(url).set(password=SECRET).update_query_dict({"password": SECRET, "sslpassword": SECRET})
    store = JobStore(full.render_as_string(hide_password=False))
    name = store._database.name
    store.close()
    assert SECRET not in name
    assert name.startswith("postgresql://postgres:***@/")
