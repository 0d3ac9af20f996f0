"""What the ledger keeps of an attempt: states, progress, failures, and the fence around them."""

import pytest

from jobs.errors import BadInputError, CancelledError, FailureClass, InternalError, LeaseLostError, NotFoundError
from jobs.ledger.records import Beginning, Fault
from jobs.states import ACTIVE_STATES, CLAIMABLE_STATES, Decision, JobState
from tests.releases import advance, begin, progress_of, settle

STAGES = (JobState.PLANNING, JobState.MERGING, JobState.VERIFYING, JobState.PUBLISHING)
GIVE_UP = Decision(state=JobState.FAILED)
RETRY_NOW = Decision(state=JobState.RETRY_WAIT)


class TestAttempt:
    def test_all_the_way(self, store, driver, make_request, make_release):
        store.submit([make_request("a")])
        token = driver.claim("a").token
        for stage in STAGES:
            key = "f" * 64 if stage is JobState.MERGING else None
            advance(store, "a", token, stage, merge_key=key)
        assert driver.record("a").merge_key == "f" * 64
        settle(store, "a", token, make_release("a"), "/reports/a.html")
        job = driver.record("a")
        assert job.state is JobState.PUBLISHED
        assert job.release == make_release("a")
        assert job.report_path == "/reports/a.html"
        assert job.merge_key == make_release("a").manifest.merge_key
        assert (job.owner, job.lease_expires_at) == (None, None)
        assert driver.states("a") == [JobState.QUEUED, JobState.LEASED, *STAGES, JobState.PUBLISHED]
        assert [event.sequence for event in store.events("a")] == list(range(1, 8))
        assert store.retry(["a"]) == store.cancel(["a"]) == ()

    def test_work_moves_through_stages_only(self, store, driver, make_request):
        store.submit([make_request("a")])
        token = driver.claim("a").token
        begin(store, "a", token)
        for state in set(JobState) - set(STAGES[1:]):
            with pytest.raises(InternalError, match=f"a stage to advance to.*{state}"):
                store.advance({"a": token}, state)
        assert driver.record("a").state is JobState.PLANNING

    def test_work_that_has_not_begun_does_not_move(self, store, driver, make_request):
        store.submit([make_request("a"), make_request("b")])
        tokens = {name: driver.claim(name).token for name in ("a", "b")}
        begin(store, "a", tokens["a"])
        with pytest.raises(InternalError, match="job 'b': expected `begin`"):
            store.advance(tokens, JobState.MERGING)
        assert driver.record("a").state is JobState.PLANNING
        with pytest.raises(InternalError, match="no way leads from PLANNING to PLANNING"):
            begin(store, "a", tokens["a"])
        assert driver.record("a").attempts == 1

    def test_an_attempt_counts_from_its_beginning_which_says_where_it_runs(self, store, driver, make_request):
        names = ("a", "cancelling", "expired", "taken")
        store.submit([make_request(name) for name in names])
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", len(names), 60)}
        assert {job.attempts for job in store.jobs()} == {0}
        store.cancel(["cancelling"])
        driver.expire("expired")
        tokens["taken"] -= 1
        beginnings = [
            Beginning(job_id=name, token=token, worker="worker-3", node="10.0.0.7") for name, token in tokens.items()
        ]
        errors = store.begin(beginnings)
        assert {name: type(error) for name, error in errors.items()} == {
            "cancelling": CancelledError,
            "expired": LeaseLostError,
            "taken": LeaseLostError,
        }
        job = driver.record("a")
        assert (job.state, job.attempts, job.worker, job.node) == (JobState.PLANNING, 1, "worker-3", "10.0.0.7")
        assert abs(job.started_at - store.now()) < 60
        assert store.events("a")[-1].detail == {
            "attempt": 1,
            "owner": "driver",
            "worker": "worker-3",
            "node": "10.0.0.7",
        }
        for name in ("expired", "taken"):
            assert (driver.record(name).state, driver.record(name).attempts) == (JobState.LEASED, 0)
        with pytest.raises(NotFoundError, match="no job unknown"):
            store.begin([Beginning(job_id="unknown", token=1, worker="w", node=None)])

    def test_a_unit_moves_at_once_and_every_state_is_logged(self, store, driver, make_request):
        names = ("planning", "merging", "verifying", "publishing", "cancelling", "expired", "taken")
        store.submit([make_request(name) for name in names])
        leases = {lease.job_id: lease.token for lease in store.claim("driver", len(names), 60)}
        for name, reached in (("planning", 1), ("merging", 2), ("verifying", 3), ("publishing", 4)):
            for stage in STAGES[:reached]:
                advance(store, name, leases[name], stage)
        store.cancel(["cancelling"])
        driver.expire("expired")
        leases["taken"] -= 1
        before = {name: store.events(name) for name in names}
        keys = {name: f"{number:064}" for number, name in enumerate(names)}
        errors = store.advance(leases, JobState.VERIFYING, keys)
        assert {name: type(error) for name, error in errors.items()} == {
            "cancelling": CancelledError,
            "expired": LeaseLostError,
            "taken": LeaseLostError,
        }
        for name in ("planning", "merging"):
            assert driver.states(name) == [JobState.QUEUED, JobState.LEASED, *STAGES[:3]]
            assert [event.sequence for event in store.events(name)] == [1, 2, 3, 4, 5]
            assert driver.record(name).merge_key == keys[name]
        for name in set(names) - {"planning", "merging"}:
            assert store.events(name) == before[name]
            assert driver.record(name).merge_key is None
        assert store.advance(leases, JobState.VERIFYING).keys() == errors.keys()
        assert driver.record("planning").merge_key == keys["planning"]
        with pytest.raises(NotFoundError, match="no job unknown"):
            store.advance(leases | {"unknown": 1}, JobState.PUBLISHING)
        assert driver.record("planning").state is JobState.VERIFYING

    def test_failing_and_waiting(self, store, driver, make_request):
        store.submit([make_request("a")])
        token = driver.begin("a")
        later = Decision(state=JobState.RETRY_WAIT, delay_seconds=100)
        store.fail("a", token, FailureClass.WORKER_LOST, "died", later, worker_lost=True, report_path="/r")
        job = driver.record("a")
        assert job.state is JobState.RETRY_WAIT
        assert (job.failure_class, job.failure_message, job.report_path) == (FailureClass.WORKER_LOST, "died", "/r")
        assert (job.attempts, job.worker_losses, job.owner) == (1, 1, None)
        assert 90 < store.seconds_until_due() <= 100
        assert store.claim("driver", 1, 60) == ()
        assert store.retry(["a"]) == ("a",)
        lease = driver.claim("a")
        assert (lease.attempts, lease.worker_losses, lease.token) == (1, 0, 2)
        begin(store, "a", lease.token)
        store.fail("a", lease.token, FailureClass.TRANSIENT_IO, "again", RETRY_NOW)
        lease = driver.claim("a")
        assert lease.attempts == 2
        assert driver.record("a").not_before is None

    def test_a_failure_is_forgotten_by_the_record_but_not_by_the_log(self, store, driver, make_request, make_release):
        store.submit([make_request("a")])
        store.fail("a", driver.claim("a").token, FailureClass.AUTH, "no key", RETRY_NOW)
        assert driver.record("a").failure_class is FailureClass.AUTH
        settle(store, "a", driver.claim("a").token, make_release("a"), None)
        assert driver.record("a").failure_class is None
        (failed,) = (event for event in store.events("a") if "failure" in event.detail)
        assert failed.detail["message"] == "no key"

    @pytest.mark.parametrize("state", [JobState.QUEUED, JobState.PUBLISHED, JobState.MERGING, JobState.CANCELLING])
    def test_only_some_states_follow_from_failure(self, store, driver, make_request, state):
        store.submit([make_request("a")])
        with pytest.raises(InternalError, match=str(state)):
            store.fail("a", driver.claim("a").token, FailureClass.INTERNAL, "x", Decision(state=state))

    def test_nothing_is_cancelled_that_nobody_cancelled(self, store, driver, make_request):
        store.submit([make_request("a")])
        with pytest.raises(InternalError, match="no way leads from LEASED to CANCELLED"):
            store.fail("a", driver.claim("a").token, FailureClass.CANCELLED, "x", Decision(state=JobState.CANCELLED))

    def test_letting_go_costs_no_attempt(self, store, driver, make_request):
        store.submit([make_request("a")])
        store.let_go("a", driver.claim("a").token, "drain")
        store.let_go("a", driver.begin("a"), "no worker is large enough")
        job = driver.record("a")
        assert (job.state, job.attempts, job.owner) == (JobState.QUEUED, 0, None)
        assert store.events("a")[-1].detail == {"reason": "no worker is large enough"}
        assert driver.claim("a").token == 3

    @pytest.mark.parametrize("delay", [None, 100])
    def test_a_fault_of_others_costs_no_attempt_and_is_remembered(
        self, store, driver, make_request, make_release, delay
    ):
        store.submit([make_request("a")])
        fault = Fault(place="s3://b", failure=FailureClass.TRANSIENT_IO, message="gone \udcff", delay_seconds=delay)
        store.let_go("a", driver.begin("a"), "s3://b is at fault", fault)
        job = driver.record("a")
        assert (job.attempts, job.failure_class, job.failure_message) == (0, FailureClass.TRANSIENT_IO, "gone \\udcff")
        said = {"reason": "s3://b is at fault", "place": "s3://b", "failure": "transient_io", "message": "gone \\udcff"}
        if delay:
            assert job.state is JobState.RETRY_WAIT
            assert 90 < store.seconds_until_due() <= 100
            assert store.events("a")[-1].detail == said | {"delay_seconds": 100}
            assert store.claim("driver", 1, 60) == ()
            store.retry(["a"])
            assert driver.claim("a").excused_faults == 0
            return
        assert (job.state, job.not_before) == (JobState.QUEUED, None)
        assert store.events("a")[-1].detail == said
        lease = driver.claim("a")
        assert (lease.excused_faults, lease.attempts) == (1, 1)
        settle(store, "a", lease.token, make_release("a"), None)
        assert driver.record("a").failure_class is None

    def test_isolating_costs_no_attempt_and_marks_the_job_until_it_is_published_or_retried(
        self, store, driver, make_request, make_release
    ):
        store.submit([make_request("a"), make_request("b")])
        tokens = {"a": driver.begin("a"), "b": driver.claim("b").token}
        for name in ("a", "b"):
            store.isolate(name, tokens[name], FailureClass.WORKER_LOST, "died \udcff", "why")
            assert (driver.record(name).state, driver.record(name).attempts) == (JobState.QUEUED, 0)
            assert (driver.record(name).worker_losses, driver.record(name).failure_message) == (0, "died \\udcff")
        lease = driver.claim("a")
        assert (lease.suspect, lease.attempts, lease.excused_losses) == (True, 1, 1)
        begin(store, "a", lease.token)
        store.fail("a", lease.token, FailureClass.TRANSIENT_IO, "no answer", RETRY_NOW)
        lease = driver.claim("a")
        assert (lease.suspect, lease.attempts) == (True, 2)
        settle(store, "a", lease.token, make_release("a"), None)
        assert driver.record("a").failure_class is None
        store.cancel(["b"])
        assert store.retry(["b"]) == ("b",)
        token = driver.claim("b")
        assert (token.suspect, token.excused_losses) == (False, 0)
        with pytest.raises(InternalError, match="found bad_input"):
            store.isolate("b", token.token, FailureClass.BAD_INPUT, "no", "why")
        with pytest.raises(LeaseLostError):
            store.isolate("b", token.token - 1, FailureClass.WORKER_LOST, "no", "why")

    def test_messages_may_hold_any_bytes(self, store, driver, make_request):
        store.submit([make_request("a")])
        store.fail("a", driver.claim("a").token, FailureClass.INTERNAL, "file '\udcff\0é'", GIVE_UP)
        assert driver.record("a").failure_message == "file '\\udcff\\x00é'"


class TestCancelAndRetry:
    @pytest.mark.parametrize("state", sorted(CLAIMABLE_STATES))
    def test_waiting_jobs_are_cancelled_at_once(self, store, driver, make_request, state):
        store.submit([make_request("a")])
        driver.lead_to("a", state)
        assert store.cancel(["a"]) == ("a",)
        assert driver.record("a").state is JobState.CANCELLED
        assert store.claim("driver", 1, 60) == ()
        assert store.cancel(["a"]) == ()

    @pytest.mark.parametrize("state", sorted(ACTIVE_STATES - {JobState.CANCELLING}))
    def test_jobs_at_work_are_stopped_by_their_driver(self, store, driver, make_request, state):
        store.submit([make_request("a"), make_request("b")])
        token = driver.lead_to("a", state)
        assert store.cancelling({"a": token}) == frozenset()
        assert store.cancel(["a"]) == ("a",)
        assert store.cancel(["a"]) == ()
        assert store.cancelling({"a": token, "b": 0}) == {"a"}
        assert store.cancelling({"a": token + 1}) == frozenset()
        with pytest.raises(CancelledError, match="job 'a'"):
            advance(store, "a", token, JobState.PUBLISHING)
        assert store.extend("driver", {"a": token}, 60) == frozenset()
        store.report_progress(progress_of({"a": token}, stage="merge", bytes_done=1, bytes_total=2))

    def test_jobs_of_lost_drivers_are_cancelled_at_once(self, store, driver, make_request):
        store.submit([make_request("a")])
        driver.lead_to("a", JobState.MERGING)
        driver.expire("a")
        assert store.cancel(["a"]) == ("a",)
        assert driver.states("a")[-2:] == [JobState.CANCELLING, JobState.CANCELLED]

    @pytest.mark.parametrize(
        "decided", [JobState.RETRY_WAIT, JobState.FAILED, JobState.QUARANTINED, JobState.CANCELLED]
    )
    def test_however_a_cancelled_attempt_fails_the_job_is_cancelled(self, store, driver, make_request, decided):
        store.submit([make_request("a")])
        token = driver.lead_to("a", JobState.CANCELLING)
        store.fail("a", token, FailureClass.CANCELLED, "stopped", Decision(state=decided, delay_seconds=5))
        job = driver.record("a")
        assert (job.state, job.not_before, job.failure_message) == (JobState.CANCELLED, None, "stopped")

    def test_a_release_that_is_visible_is_published_all_the_same(self, store, driver, make_request, make_release):
        store.submit([make_request("a")])
        token = driver.lead_to("a", JobState.PUBLISHING)
        store.cancel(["a"])
        settle(store, "a", token, make_release("a"), None)
        assert driver.record("a").state is JobState.PUBLISHED

    @pytest.mark.parametrize("state", [JobState.FAILED, JobState.QUARANTINED, JobState.CANCELLED, JobState.RETRY_WAIT])
    def test_retry_starts_anew_with_a_higher_token(self, store, driver, make_request, state):
        store.submit([make_request("a")])
        token = driver.lead_to("a", state)
        assert store.retry(["a"]) == ("a",)
        job = driver.record("a")
        assert (job.state, job.attempts, job.worker_losses, job.failure_class) == (JobState.QUEUED, 0, 0, None)
        assert store.retry(["a"]) == ()
        assert driver.claim("a").token == token + 1

    def test_two_retries_for_one_destination_conflict(self, store, driver, make_request):
        for name in ("a", "b"):
            store.submit([make_request(name, destination="/releases/x")])
            driver.lead_to(name, JobState.FAILED)
        with pytest.raises(BadInputError, match=r"job 'b'.*belongs to job 'a'"):
            store.retry(["a", "b"])
        assert store.counts()[JobState.FAILED] == 2

    @pytest.mark.parametrize("verb", ["cancel", "retry"])
    def test_unknown_ids_are_all_named_and_nothing_changes(self, store, driver, make_request, verb):
        store.submit([make_request("a")])
        with pytest.raises(NotFoundError, match="no job x, y"):
            getattr(store, verb)(["y", "a", "x"])
        assert driver.record("a").state is JobState.QUEUED
        assert getattr(store, verb)([]) == ()
