"""Claiming, extending and losing leases."""

import time

import pytest

from jobs.errors import FailureClass, LeaseLostError, NotFoundError
from jobs.states import ACTIVE_STATES, Decision, JobState
from tests.releases import advance, begin, progress_of, settle

GIVE_UP = Decision(state=JobState.FAILED)


class TestClaim:
    def test_by_priority_then_age(self, store, make_request):
        store.submit(
            [make_request("a"), make_request("b", priority=1), make_request("c"), make_request("d", priority=1)]
        )
        assert [lease.job_id for lease in store.claim("driver", 3, 60)] == ["b", "d", "a"]
        assert [lease.job_id for lease in store.claim("driver", 3, 60)] == ["c"]
        assert store.claim("driver", 3, 60) == ()
        assert store.claim("driver", 0, 60) == ()

    def test_a_lease_says_all_a_driver_needs(self, store, driver, make_request):
        store.submit([make_request("a")])
        lease = driver.claim("a", "driver-1", 60)
        assert lease.request == make_request("a")
        assert (lease.token, lease.attempts, lease.worker_losses) == (1, 1, 0)
        job = driver.record("a")
        assert (job.state, job.owner, job.token) == (JobState.LEASED, "driver-1", 1)
        assert 50 < job.lease_expires_at - time.time() < 70
        assert store.events("a")[-1].detail == {"owner": "driver-1", "token": 1}

    @pytest.mark.parametrize("state", sorted(ACTIVE_STATES - {JobState.CANCELLING}))
    def test_the_job_of_a_lost_driver_is_claimed_again(self, store, driver, make_request, state):
        store.submit([make_request("a")])
        token = driver.lead_to("a", state)
        assert store.claim("other", 1, 60) == ()
        driver.expire("a")
        lease = driver.claim("a", "other")
        assert (lease.token, lease.attempts) == (token + 1, 1)
        *_, lost, leased = store.events("a")
        assert (lost.state, leased.state) == (JobState.QUEUED, JobState.LEASED)
        assert lost.detail == {"reason": "lease expired", "owner": "driver", "token": token, "state": state}

    def test_a_lost_job_is_queued_by_the_next_claim_of_anyone(self, store, driver, make_request):
        store.submit([make_request("a"), make_request("b", priority=1)])
        driver.lead_to("b", JobState.MERGING)
        driver.expire("b")
        assert driver.record("b").state is JobState.MERGING
        assert [lease.job_id for lease in store.claim("other", 1, 60)] == ["b"]
        driver.expire("b")
        store.submit([make_request("c", priority=2)])
        assert [lease.job_id for lease in store.claim("third", 1, 60)] == ["c"]
        assert (driver.record("b").state, driver.record("b").owner) == (JobState.QUEUED, None)

    def test_jobs_that_never_began_are_not_charged_with_their_drivers(self, store, driver, make_request):
        store.submit([make_request("a")])
        for _ in range(6):
            driver.claim("a")
            driver.expire("a")
        lease = driver.claim("a")
        assert (lease.attempts, lease.suspect, lease.driver_losses) == (1, False, 0)

    def test_a_job_at_work_whenever_a_driver_is_lost_runs_alone_after_waits(self, store, driver, make_request):
        store.submit([make_request("a")])
        leases, waits = [], []
        for number in range(5):
            leases.append(driver.claim("a", f"driver-{number}"))
            advance(store, "a", leases[-1].token, JobState.PLANNING)
            driver.expire("a")
            store.claim("next", 1, 60) if number else None
            job = driver.record("a")
            if job.state is JobState.RETRY_WAIT:
                waits.append(job.not_before - job.updated_at)
                driver.be_due("a")
        assert [(lease.attempts, lease.driver_losses, lease.suspect) for lease in leases] == [
            (1, 0, False),
            (1, 1, False),
            (1, 2, True),
            (1, 3, True),
            (1, 4, True),
        ]
        longest = [10, 20, 40, 80]
        assert all(most / 2 <= wait <= most for wait, most in zip(waits, longest, strict=True))

    def test_a_driver_that_is_lost_without_a_job_acquits_it(self, store, driver, make_request):
        store.submit([make_request("a", priority=1), make_request("b")])
        driver.begin("a", "first")
        driver.expire("a")
        driver.begin("a", "second")
        driver.expire("a")
        driver.begin("b", "third")  # while `a` waits
        assert driver.record("a").state is JobState.RETRY_WAIT
        driver.expire("b")
        assert store.claim("fourth", 1, 60)[0].driver_losses == 1
        driver.be_due("a")
        lease = driver.claim("a", "fifth")
        assert (lease.job_id, lease.driver_losses, lease.suspect) == ("a", 0, True)

    def test_a_driver_that_is_lost_with_two_jobs_acquits_neither(self, store, driver, make_request):
        store.submit([make_request("a"), make_request("b")])
        for name in ("a", "b"):
            driver.begin(name, "first")
        for name in ("a", "b"):  # found to be lost one after the other, as many are
            driver.expire(name)
            store.cancel([])
        assert [lease.driver_losses for lease in store.claim("second", 2, 60)] == [1, 1]

    def test_a_driver_that_is_lost_before_work_acquits_what_it_did_not_have(self, store, driver, make_request):
        store.submit([make_request("a", priority=1), make_request("b")])
        driver.begin("a", "first")
        driver.expire("a")
        driver.begin("a", "second")
        driver.claim("b", "third")
        driver.expire("b")
        driver.claim("b", "fourth")
        driver.expire("a")
        assert driver.claim("a", "fifth").driver_losses == 1

    def test_a_cancelled_job_of_a_lost_driver_is_not(self, store, driver, make_request):
        store.submit([make_request("a")])
        driver.lead_to("a", JobState.CANCELLING)
        driver.expire("a")
        assert store.seconds_until_due() == 0
        assert store.claim("other", 1, 60) == ()
        assert driver.record("a").state is JobState.CANCELLED
        assert driver.record("a").owner is None
        assert store.seconds_until_due() is None

    def test_a_lease_runs_out_by_the_clock(self, store, driver, make_request):
        store.submit([make_request("a")])
        lease = driver.claim("a", seconds=0.3)
        wait = store.seconds_until_due()
        assert 0 < wait <= 0.3
        time.sleep(wait + 0.01)
        assert store.seconds_until_due() == 0
        with pytest.raises(LeaseLostError, match="expired"):
            advance(store, "a", lease.token, JobState.PLANNING)
        assert driver.claim("a", "other").token == 2

    def test_progress_starts_anew(self, store, driver, make_request):
        store.submit([make_request("a")])
        token = driver.claim("a").token
        store.report_progress(progress_of({"a": token}, stage="merge", bytes_done=5, bytes_total=9))
        job = driver.record("a")
        assert (job.stage, job.bytes_done, job.bytes_total) == ("merge", 5, 9)
        store.let_go("a", token, "drain")
        driver.claim("a")
        job = driver.record("a")
        assert (job.stage, job.bytes_done, job.bytes_total) == (None, 0, 0)
        assert len(driver.states("a")) == 4


class TestFencing:
    @pytest.fixture
    def leases(self, store, driver, make_request):
        """Tokens of jobs named by what became of their lease."""
        store.submit([make_request(name) for name in ("held", "expired", "taken", "ended", "cancelling")])
        leases = {lease.job_id: lease.token for lease in store.claim("driver", 5, 60)}
        store.let_go("ended", leases["ended"], "drain")
        store.cancel(["cancelling"])  # which would queue jobs again whose leases had expired
        driver.expire("expired")
        driver.expire("taken")
        leases["taken"] -= 1
        return leases

    @pytest.fixture
    def writes(self, store, make_release):
        return {
            "begin": lambda token: begin(store, "a", token),
            "advance": lambda token: advance(store, "a", token, JobState.MERGING),
            "settle": lambda token: settle(store, "a", token, make_release("a"), None),
            "fail": lambda token: store.fail("a", token, FailureClass.INTERNAL, "x", GIVE_UP),
            "let_go": lambda token: store.let_go("a", token, "x"),
            "isolate": lambda token: store.isolate("a", token, FailureClass.WORKER_LOST, "x", "x"),
        }

    @pytest.mark.parametrize("verb", ["begin", "advance", "settle", "fail", "let_go", "isolate"])
    def test_no_write_without_the_lease(self, store, driver, make_request, writes, verb):
        store.submit([make_request("a")])
        with pytest.raises(LeaseLostError, match="the job is QUEUED"):
            writes[verb](0)
        first = driver.claim("a")
        driver.expire("a")
        with pytest.raises(LeaseLostError, match="expired"):
            writes[verb](first.token)
        second = driver.claim("a", "other")
        before = driver.record("a"), store.events("a")
        for stale in (first.token, second.token + 1):
            with pytest.raises(LeaseLostError, match=f"its token is 2 by now, not {stale}"):
                writes[verb](stale)
        assert (driver.record("a"), store.events("a")) == before
        if verb == "advance":
            begin(store, "a", second.token)
        writes[verb](second.token)

    def test_leases_that_are_released_are_lost_at_once(self, store, make_request, writes):
        store.submit([make_request("a"), make_request("b")])
        store.register_driver("driver", "host", 1, "")
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", 2, 600)}
        begin(store, "b", tokens["b"])
        assert store.release_leases("driver") == 2
        for write in writes.values():
            with pytest.raises(LeaseLostError, match="it expired"):
                write(tokens["a"])
        assert store.extend("driver", tokens, 600) == tokens.keys()
        assert store.report_progress(progress_of(tokens, stage="merge", bytes_done=1, bytes_total=2)) == tokens.keys()
        assert store.release_leases("driver") == 0
        assert {lease.job_id: lease.token for lease in store.claim("other", 2, 60)} == {"a": 2, "b": 2}
        assert store.release_leases("driver") == 0
        begin(store, "a", 2)
        with pytest.raises(NotFoundError, match="has no driver nobody; `mergefleet status`"):
            store.release_leases("nobody")

    @pytest.mark.parametrize("end", ["settle", "fail", "let_go", "isolate"])
    def test_no_write_after_the_end_of_the_attempt(self, store, driver, make_request, writes, end):
        store.submit([make_request("a")])
        token = driver.claim("a").token
        writes[end](token)
        for write in writes.values():
            with pytest.raises(LeaseLostError, match="the attempt has ended"):
                write(token)

    def test_extend_names_the_lost(self, store, driver, leases):
        before = driver.record("held").lease_expires_at
        assert store.extend("driver", leases | {"unknown": 1}, 600) == {"expired", "taken", "ended", "unknown"}
        assert driver.record("held").lease_expires_at > before + 500
        assert driver.record("expired").lease_expires_at == 1
        assert store.extend("driver", {}, 600) == frozenset()

    def test_progress_names_the_lost(self, store, leases):
        lost = store.report_progress(progress_of(leases | {"unknown": 1}, stage="merge", bytes_done=5, bytes_total=9))
        assert lost == {"expired", "taken", "ended", "unknown"}
        stages = {job.id: (job.stage, job.bytes_done, job.bytes_total) for job in store.jobs()}
        written, untouched = ("merge", 5, 9), (None, 0, 0)
        assert stages == dict.fromkeys(leases, untouched) | {"held": written, "cancelling": written}

    def test_unknown_jobs(self, writes):
        for write in writes.values():
            with pytest.raises(NotFoundError, match="no job a"):
                write(1)
