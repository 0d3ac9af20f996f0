"""The ledger as its users see it: queries, cancelling, retrying, pruning."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import FailureClass
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.states import Decision, JobState
from tests.releases import settle


class TestReading:
    def test_filters(self, store, make_request):
        labels = [{"team": "x", "tier": "1"}, {"team": "x"}, {"team": "y", "tier": "1"}, {}]
        store.submit([make_request(name, labels=label) for name, label in zip("abcd", labels, strict=True)])
        store.cancel(["b"])

        def ids(**filters):
            found = [job.id for job in store.jobs(Selection(**filters))]
            assert store.ids(Selection(**filters)) == tuple(found)
            return found

        assert ids() == ["a", "b", "c", "d"]
        assert ids(ids=["d", "a", "nope", "d"]) == ["a", "d"]
        assert ids(ids=[]) == []
        assert ids(states=[JobState.CANCELLED]) == ["b"]
        assert ids(states=[]) == []
        assert ids(labels={"team": "x"}) == ["a", "b"]
        assert ids(labels={"team": "x", "tier": "1"}) == ["a"]
        assert ids(labels={"tier": "x"}) == []
        assert ids(labels={"team": "x"}, states=[JobState.QUEUED], ids=["a", "b", "c"]) == ["a"]

    def test_counts_have_every_state(self, store, make_request):
        assert store.counts() == dict.fromkeys(JobState, 0)
        store.submit([make_request("a"), make_request("b")])
        store.cancel(["b"])
        assert store.counts() == dict.fromkeys(JobState, 0) | {JobState.QUEUED: 1, JobState.CANCELLED: 1}

    def test_when_something_is_due(self, store, make_request, make_release):
        assert store.seconds_until_due() is None
        store.submit([make_request("a"), make_request("b")])
        assert store.seconds_until_due() == 0
        one, two = store.claim("driver", 2, 100)
        assert 90 < store.seconds_until_due() <= 100
        store.fail(
            "a", one.token, FailureClass.TRANSIENT_IO, "x", Decision(state=JobState.RETRY_WAIT, delay_seconds=50)
        )
        assert 40 < store.seconds_until_due() <= 50
        store.cancel(["a"])
        settle(store, "b", two.token, make_release("b"), None)
        assert store.seconds_until_due() is None

    def test_events_of_an_unknown_job(self, store):
        assert store.events("nope") == ()


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    store = JobStore(f"sqlite:///{tmp_path_factory.mktemp('ledger')}/jobs.db")
    yield store
    store.close()


class TestStoredValues:
    @settings(max_examples=30, deadline=None)
    @given(
        labels=st.dictionaries(texts, texts, max_size=3),
        prompts=st.lists(texts.filter(bool), min_size=1, max_size=3).map(tuple),
    )
    def test_requests(self, shared_store, make_request, labels, prompts):
        name = f"r{len(shared_store.jobs())}"
        request = make_request(name, labels=labels, parity={"prompts": prompts}, priority=1000)
        shared_store.submit([request])
        (job,) = shared_store.jobs(Selection(ids=[name]))
        assert job.request == request
        for label, value in labels.items():
            assert name in [job.id for job in shared_store.jobs(Selection(labels={label: value}))]
        (lease,) = shared_store.claim("driver", 1, 60)
        assert lease.request == request

    @settings(max_examples=30, deadline=None)
    @given(message=texts)
    def test_events_failures_and_releases(self, shared_store, make_request, make_release, message):
        name = f"e{len(shared_store.jobs())}"
        shared_store.submit([make_request(name, priority=999)])
        (lease,) = shared_store.claim("driver", 1, 60)
        shared_store.let_go(name, lease.token, message)
        assert shared_store.events(name)[-1].detail == {"reason": message}
        (lease,) = shared_store.claim("driver", 1, 60)
        shared_store.fail(name, lease.token, FailureClass.INTERNAL, message, Decision(state=JobState.RETRY_WAIT))
        assert shared_store.jobs(Selection(ids=[name]))[0].failure_message == message
        (lease,) = shared_store.claim("driver", 1, 60)
        manifest = make_release(name).manifest.model_copy(update={"versions": {message: message}})
        release = make_release(name).model_copy(update={"manifest": manifest})
        settle(shared_store, name, lease.token, release, None)
        assert shared_store.jobs(Selection(ids=[name]))[0].release == release
