"""What both queues promise: the one over the ledger, and the one over HTTP. Same values, same errors."""

import contextlib
import json
from pathlib import Path

import pytest

from cluster.front.client import HttpService
from cluster.front.ledger import LedgerService
from cluster.front.service import Service
from cluster.settings import Settings
from jobs.errors import AuthError, BadInputError, FailureClass, InvalidValueError, NotFoundError, TransientIOError
from jobs.ledger.pauses import Scope
from jobs.ledger.records import Approval
from jobs.ledger.selection import Selection
from jobs.ledger.store import JobStore
from jobs.locations import parse_location
from jobs.release import REPORT_NAME, Release
from jobs.request import MergeRequest
from jobs.request_files.problems import RequestFileError
from jobs.states import Decision, JobState
from tests.contract.test_folders import ADAPTER
from tests.releases import advance, begin, make_manifest, make_report, settle, write_files
from tests.servers.front import TOKEN, serve_front
from workers.sources.folders import Folders

FAILED = Decision(state=JobState.FAILED)


def request_of(name: str, **fields: object) -> MergeRequest:
    values = {"base": "/bases/b", "adapter": "/adapters/a", "destination": f"/out/{name}", "base_quantization": "none"}
    return MergeRequest.model_validate({"id": name, **values, **fields})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, allowed_destinations=("/out", "s3://out"), poll_seconds=0.05)


@pytest.fixture
def store(settings):
    store = JobStore(settings.store)
    yield store
    store.close()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("jobs.ledger.sqlite._BUSY_SECONDS", 0.1)


@pytest.fixture(params=["ledger", "http"])
def service(request, settings, store):  # noqa: ARG001 - the ledger is there before anything is asked
    """A queue; `store` is its ledger, opened by its side."""
    with contextlib.ExitStack() as stack:
        if request.param == "ledger":
            found: Service = LedgerService(settings, Folders)
        else:
            found = HttpService(stack.enter_context(serve_front(settings)).url, TOKEN, Folders)
        yield stack.enter_context(contextlib.closing(found))


def make_release(name: str) -> Release:
    return Release(
        location=parse_location(f"/out/{name}"),
        manifest=make_manifest({"config.json": b"{}"}),
        manifest_sha256="d" * 64,
        created=True,
    )


def publish(store: JobStore, job_id: str, report: Path | None = None) -> None:
    leases = {lease.job_id: lease for lease in store.claim("driver", 99, 60)}
    begin(store, job_id, leases[job_id].token)
    advance(store, job_id, leases[job_id].token, JobState.PUBLISHING)
    settle(store, job_id, leases[job_id].token, make_release(job_id), None if report is None else str(report))


def fail(store: JobStore, job_id: str, failure: FailureClass, message: str) -> None:
    leases = {lease.job_id: lease for lease in store.claim("driver", 99, 60)}
    store.fail(job_id, leases[job_id].token, failure, message, FAILED)


class TestSubmitting:
    def test_requests_become_jobs_once(self, service, store):
        requests = [request_of("one", labels={"team": "x", "zone": "a=b"}), request_of("two", priority=7)]
        result = service.submit(requests, "nightly")
        assert (result.batch, result.created, result.unchanged) == ("nightly", ("one", "two"), ())
        assert service.submit(requests, "nightly").unchanged == ("one", "two")
        assert [job.request for job in store.jobs()] == requests

    def test_everything_a_request_can_say_arrives(self, service, store):
        full = {
            "adapter": None,
            "adapters": [{"adapter": "/adapters/a", "weight": 0.5}, {"adapter": "hf://o/n@v1"}],
            "combination": {"type": "ties", "density": 0.5},
            "destination": "/out/{brace}",
            "base_quantization": "nf4",
            "quantization_options": {"llm_int8_skip_modules": ["lm_head"]},
            "dtype": "bfloat16",
            "max_shard_size": "5GB",
            "parity": {"level": "arithmetic"},
            "deadline": "2999-01-02T03:04:05+02:00",
            "timeout_seconds": 1.5,
            "requires_approval": True,
            "labels": {"ключ": "✓"},
        }
        service.submit([request_of("full", **full)], "b")
        assert [job.request for job in store.jobs()] == [request_of("full", **full)] == [service.job("full").request]

    def test_other_content_under_an_id_is_refused(self, service, store):
        service.submit([request_of("one")], "b")
        with pytest.raises(BadInputError, match="job 'one': expected the same request as before under this id"):
            service.submit([request_of("one", priority=3)], "b")
        with pytest.raises(BadInputError, match="which belongs to job 'one'"):
            service.submit([request_of("two", destination="/out/one")], "b")
        assert len(store.jobs()) == 1

    def test_an_id_or_destination_twice_is_refused(self, service, store):
        with pytest.raises(RequestFileError) as caught:
            service.submit([request_of("one"), request_of("one"), request_of("two", destination="/out/one/x")], "b")
        fields = [problem.field for problem in caught.value.problems]
        assert fields == ["requests[1].id", "requests[1].destination", "requests[2].destination"]
        assert {problem.line for problem in caught.value.problems} == {None}
        assert store.jobs() == ()

    def test_places_that_are_not_allowed_are_all_named(self, service, store):
        with pytest.raises(RequestFileError) as caught:
            service.submit([request_of("one"), request_of("two", destination="/etc/x")], "b")
        (problem,) = caught.value.problems
        assert (problem.field, problem.found) == ("requests[1].destination", "'/etc/x'")
        assert problem.expected.startswith("a destination that this fleet writes to: /out")
        assert store.jobs() == ()

    def test_the_name_of_a_batch_is_checked(self, service):
        with pytest.raises(InvalidValueError, match="expected a batch of 1 to 128 letters"):
            service.submit([request_of("one")], "a b")

    def test_a_file_is_read_with_paths_of_its_directory(self, service, store, tmp_path):
        path = tmp_path / "in" / "requests.yaml"
        path.parent.mkdir()
        path.write_text(
            "defaults: {base: base, base_quantization: none}\n"
            "matrix: {bases: [base], adapters: [a, ../b], quantizations: [none], destination: '/out/{adapter}'}\n"
        )
        assert len(service.submit_file(path, "files").created) == 2
        assert {str(job.request.base) for job in store.jobs()} == {f"{tmp_path}/in/base"}
        assert {str(job.request.adapter) for job in store.jobs()} == {f"{tmp_path}/in/a", f"{tmp_path}/b"}

    def test_patterns_are_looked_up_where_the_file_is(self, service, store, tmp_path):
        """The same file again adds what is new, and says what is still being written."""
        path = tmp_path / "in" / "sweep.yaml"
        for step in (5, 10):
            write_files(tmp_path / "in" / "run" / f"checkpoint-{step}", ADAPTER)
        path.write_text(
            "defaults: {base: /b, labels: {run: r}}\n"
            "matrix: {bases: [/b], adapters: run/checkpoint-*, destination: '/out/{step}', labels: {step: '{step}'}}\n"
        )
        first = service.submit_file(path, "sweep")
        assert (len(first.created), first.unchanged, first.left_out) == (2, (), ())
        (tmp_path / "in" / "run" / "checkpoint-20").mkdir()
        write_files(tmp_path / "in" / "run" / "checkpoint-15", ADAPTER)
        second = service.submit_file(path, "sweep")
        assert (len(second.created), second.unchanged) == (1, first.created)
        assert second.left_out == (f"{tmp_path}/in/run/checkpoint-20: has no adapter_config.json",)
        assert [(job.request.adapter.name, job.request.labels) for job in store.jobs()] == [
            (f"checkpoint-{step}", {"run": "r", "step": step}) for step in ("5", "10", "15")
        ]

    def test_mistakes_of_a_sweep_are_told_with_their_lines(self, service, store, tmp_path):
        path = tmp_path / "sweep.yaml"
        path.write_text(
            "matrix:\n  bases: [/b]\n  adapters:\n    - none/checkpoint-*\n  dtype: int8\n  destination: /out/x\n"
        )
        with pytest.raises(RequestFileError) as caught:
            service.submit_file(path, "b")
        assert [(each.file, each.line, each.field) for each in caught.value.problems] == [
            (str(path), 4, "matrix.adapters[0]"),
            (str(path), 5, "matrix.dtype"),
        ]
        assert store.jobs() == ()

    @pytest.mark.parametrize("suffix", ["jsonl", "csv"])
    def test_every_mistake_of_a_file_is_told_with_its_line(self, service, store, tmp_path, suffix):
        path = tmp_path / f"requests.{suffix}"
        if suffix == "csv":
            path.write_text("id,base,adapter,destination,dtype\none,b,a,/out/x,int8\ntwo,b,a,/etc/y,\n")
        else:
            rows = [
                {"id": "one", "base": "b", "adapter": "a", "destination": "/out/x", "dtype": "int8"},
                {"id": "two", "base": "b", "adapter": "a", "destination": "/etc/y"},
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(RequestFileError) as caught:
            service.submit_file(path, "b")
        first = 2 if suffix == "csv" else 1
        found = [(each.file, each.line, each.field, each.found) for each in caught.value.problems]
        assert found == [
            (str(path), first, "dtype", "'int8'"),
            (str(path), first + 1, "destination", "'/etc/y'"),
        ]
        assert str(path) in str(caught.value)
        assert store.jobs() == ()

    def test_a_file_that_is_not_there(self, service, tmp_path):
        with pytest.raises(RequestFileError, match="expected a readable file, found No such file"):
            service.submit_file(tmp_path / "none.yaml", "b")


class TestAsking:
    def test_jobs_as_the_ledger_has_them(self, service, store):
        service.submit([request_of(name, labels={"team": name}, priority=len(name)) for name in ("a", "bb", "c")], "b")
        service.submit([request_of("d")], "other")
        publish(store, "a")
        store.fail("bb", store.jobs(Selection(ids=["bb"]))[0].token, FailureClass.AUTH, "no é\x07 way", FAILED)
        assert service.jobs() == store.jobs()
        assert service.jobs(order="updated", limit=2) == store.jobs(order="updated", limit=2)
        assert service.jobs(order="priority") == store.jobs(order="priority")
        for selection in (
            Selection(ids=["c", "a", "unknown"]),
            Selection(ids=[]),
            Selection(batch="b"),
            Selection(batch="unknown"),
            Selection(states=[JobState.PUBLISHED, JobState.FAILED]),
            Selection(labels={"team": "c"}),
            Selection(failures=[FailureClass.AUTH]),
            Selection(since=store.now()),
            Selection(since=0.5, batch="b", states=[JobState.LEASED]),
            Selection(unfinished_at=store.now()),
        ):
            assert service.jobs(selection) == store.jobs(selection)
            assert service.counts(selection) == store.counts(selection)
            assert service.work(selection) == store.work(selection)
        assert service.job("a").release == make_release("a") == service.release("a")
        assert service.events("a") == store.events("a")
        assert service.events("a", after=3) == store.events("a")[3:]
        assert service.batches() == store.batches()
        assert service.batch("b") == store.batches()[0]
        assert service.drivers() == store.drivers()
        assert abs(service.now() - store.now()) < 5

    def test_many_ids_are_asked_for_in_one_question(self, service):
        names = [f"job-{number:03}" for number in range(250)]
        service.submit([request_of(name) for name in names], "b")
        assert [job.id for job in service.jobs(Selection(ids=names))] == names
        assert [job.id for job in service.jobs(limit=120)] == names[:120]

    def test_pages_follow_each_other(self, service, store):
        service.submit([request_of(f"job-{number}", priority=number % 3) for number in range(7)], "b")
        for order in ("submitted", "updated", "priority"):
            found, cursor = [], None
            while True:
                page = service.page(Selection(batch="b"), order=order, limit=3, cursor=cursor)
                found += page.jobs
                if (cursor := page.next_cursor) is None:
                    break
            assert tuple(found) == store.jobs(order=order)
        assert len(page.jobs) == 1

    def test_a_page_does_not_shift_when_jobs_are_added(self, service):
        service.submit([request_of(f"job-{number}") for number in range(4)], "b")
        page = service.page(order="priority", limit=2)
        service.submit([request_of("first", priority=1000)], "b")
        rest = service.page(order="priority", limit=9, cursor=page.next_cursor)
        assert [job.id for job in (*page.jobs, *rest.jobs)] == [f"job-{number}" for number in range(4)]

    @pytest.mark.parametrize("cursor", ["x", "WyJ1cGRhdGVkIiwgMSwgMl0=", "WzFd", "bnVsbA==", "e30="])
    def test_a_cursor_that_is_none(self, service, cursor):
        service.submit([request_of("one")], "b")
        with pytest.raises(InvalidValueError, match="expected the next_cursor of a page in the order 'submitted'"):
            service.page(cursor=cursor)

    def test_failures_by_cause(self, service, store):
        service.submit([request_of(name) for name in ("a", "b", "c")], "b")
        tokens = {lease.job_id: lease.token for lease in store.claim("driver", 9, 60)}
        for name, message in (("a", "no room for 'x'"), ("b", "no room for 'y'"), ("c", "other")):
            store.fail(name, tokens[name], FailureClass.NO_CAPACITY, message, FAILED)
        first, second = service.failures()
        assert (first.num_jobs, first.ids, first.message) == (2, ("a", "b"), "no room for 'x'")
        assert (second.failure_class, second.ids) == (FailureClass.NO_CAPACITY, ("c",))
        assert service.failures(Selection(batch="none")) == ()

    @pytest.mark.parametrize("method", ["job", "events", "release", "report", "batch"])
    def test_what_is_unknown_is_said_so(self, service, method):
        service.submit([request_of("one")], "b")
        with pytest.raises(NotFoundError, match=r"no such (job|batch): no/such é"):
            getattr(service, method)("no/such é")

    def test_what_a_job_does_not_have(self, service):
        service.submit([request_of("one")], "b")
        with pytest.raises(NotFoundError, match="job 'one' has no release: it is QUEUED"):
            service.release("one")
        with pytest.raises(NotFoundError, match="job 'one' has no parity report"):
            service.report("one")

    def test_the_policy_of_the_queue(self, service, settings):
        assert service.policy() == settings.failure_policy


class TestReports:
    def test_one_in_its_directory(self, service, store, settings):
        service.submit([request_of("one")], "b")
        directory = settings.reports / "one"
        directory.mkdir(parents=True)
        manifest = make_manifest({})
        (directory / REPORT_NAME).write_bytes(make_report(manifest.merge_key))
        publish(store, "one", directory)
        assert service.report("one").merge_key == manifest.merge_key

    @pytest.mark.parametrize("how", ["elsewhere", "link", "linked directory", "directory", "missing"])
    def test_nothing_outside_of_it_is_read(self, service, store, settings, tmp_path, how):
        service.submit([request_of("one")], "b")
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / REPORT_NAME).write_bytes(make_report("a" * 64))
        directory = settings.reports / "one"
        settings.reports.mkdir()
        if how == "linked directory":
            directory.symlink_to(outside)
        elif how == "link":
            directory.mkdir()
            (directory / REPORT_NAME).symlink_to(outside / REPORT_NAME)
        elif how == "directory":
            (directory / REPORT_NAME).mkdir(parents=True)
        elif how == "elsewhere":
            directory = settings.reports / ".." / "outside"
        publish(store, "one", directory)
        with pytest.raises(NotFoundError, match="job 'one': expected its parity report in"):
            service.report("one")


class TestSteering:
    def test_jobs_are_cancelled_and_retried(self, service, store):
        service.submit([request_of(name) for name in ("a", "b")], "nightly")
        service.submit([request_of("c", labels={"team": "x"})], "other")
        assert service.cancel(Selection(batch="nightly")) == ("a", "b")
        assert service.cancel(Selection(batch="nightly")) == ()
        assert service.retry(Selection(ids=["b"])) == ("b",)
        assert service.retry(Selection(states=[JobState.CANCELLED], batch="other")) == ()
        assert service.cancel(Selection(labels={"team": "x"})) == ("c",)
        fail(store, "b", FailureClass.NOT_FOUND, "gone")
        assert service.retry(Selection(failures=[FailureClass.NOT_FOUND])) == ("b",)

    def test_what_waits_for_a_person_is_approved_or_rejected(self, service, store):
        service.submit([request_of(name, requires_approval=True) for name in ("a", "b", "c")], "nightly")
        for lease in store.claim("driver", 9, 60):
            begin(store, lease.job_id, lease.token)
            advance(store, lease.job_id, lease.token, JobState.VERIFYING)
            if lease.job_id != "c":
                store.await_approval(lease.job_id, lease.token, "e" * 64, None, {})
        assert service.counts()[JobState.AWAITING_APPROVAL] == 2
        assert service.approve(Selection(ids=["a"]), "ann é") == ("a",)
        assert service.reject(Selection(batch="nightly"), "bob", "why not") == ("b",)
        assert service.job("a").approval == Approval(by="ann é", merge_key="e" * 64)
        assert service.events("b")[-1].detail["reason"] == "rejected by bob: why not"
        for refused in (
            lambda: service.approve(Selection(ids=["a"]), " "),
            lambda: service.approve(Selection(), "ann"),
        ):
            with pytest.raises(BadInputError):
                refused()

    @pytest.mark.parametrize("method", ["cancel", "retry"])
    def test_nothing_is_meant_by_saying_nothing(self, service, store, method):
        service.submit([request_of("one")], "b")
        with pytest.raises(BadInputError, match="name the jobs"):
            getattr(service, method)(Selection())
        with pytest.raises(NotFoundError, match="no such job: other"):
            getattr(service, method)(Selection(ids=["one", "other"]))
        with pytest.raises(NotFoundError, match="no such batch: other"):
            getattr(service, method)(Selection(batch="other"))
        assert {job.state for job in store.jobs()} == {JobState.QUEUED}

    def test_a_retry_into_a_place_that_is_taken(self, service):
        service.submit([request_of("one")], "b")
        service.cancel(Selection(ids=["one"]))
        service.submit([request_of("two", destination="/out/one")], "b")
        with pytest.raises(BadInputError, match="which belongs to job 'two'"):
            service.retry(Selection(ids=["one"]))

    def test_what_is_paused_rests(self, service, store):
        service.submit([request_of("one", destination="s3://out/one")], "b")
        assert service.pause(Scope.PLACE, "s3://out/one", "ann", "moving é")
        assert not service.pause(Scope.PLACE, "s3://out", "bob", "again")
        assert service.pauses() == store.pauses()
        (pause,) = service.pauses()
        assert (pause.scope, pause.name, pause.by, pause.reason) == (Scope.PLACE, "s3://out", "ann", "moving é")
        assert store.claim("driver", 9, 60) == ()
        assert service.num_held() == {"place s3://out": 1}
        assert service.resume(Scope.PLACE, "s3://out") == (pause,)
        assert service.resume(Scope.PLACE, "s3://out") == ()
        assert service.pause(Scope.QUEUE, "", "ann", "")
        assert service.resume(Scope.QUEUE, "")[0].scope is Scope.QUEUE

    def test_what_cannot_be_paused(self, service):
        service.submit([request_of("one")], "b")
        with pytest.raises(NotFoundError, match="has no batch other"):
            service.pause(Scope.BATCH, "other", "ann", "")
        with pytest.raises(BadInputError, match="expected no name after queue"):
            service.pause(Scope.QUEUE, "x", "ann", "")
        with pytest.raises(InvalidValueError, match="expected a place: s3://bucket") as caught:
            service.resume(Scope.PLACE, "ftp://x")
        assert "ftp://x" in caught.value.found

    def test_the_leases_of_a_driver_are_released(self, service, store):
        service.submit([request_of("one")], "b")
        store.register_driver("gone", "host", 1, "")
        store.claim("gone", 9, 600)
        assert [driver.owner for driver in service.drivers()] == ["gone"]
        assert service.release_leases("gone") == 1
        with pytest.raises(NotFoundError, match="has no driver nobody"):
            service.release_leases("nobody")


class TestFaults:
    def test_a_ledger_that_is_gone(self, service, settings):
        service.submit([request_of("one")], "b")
        Path(settings.store.removeprefix("sqlite:///")).unlink()
        for ask in (service.batches, lambda: service.submit([request_of("two")], "b"), lambda: service.job("one")):
            with pytest.raises(BadInputError, match="was moved or deleted while it was open"):
                ask()

    @pytest.mark.usefixtures("impatient")
    def test_a_ledger_that_is_locked(self, service, store):
        service.submit([request_of("one")], "b")
        with store._database.write(), pytest.raises(TransientIOError, match="is locked by another process"):
            service.cancel(Selection(ids=["one"]))


class TestClient:
    """What there is over HTTP alone."""

    def test_a_wrong_token(self, settings):
        with serve_front(settings) as server:
            for token in (None, "another-token-0123456789"):
                with contextlib.closing(HttpService(server.url, token)) as service:
                    with pytest.raises(AuthError, match=r"server http.*expected the token of this server") as caught:
                        service.batches()
                    assert token is None or token not in str(caught.value)

    def test_a_server_that_is_not_there(self):
        message = r"server http://127.0.0.1:9 does not answer: .*refused"
        with (
            contextlib.closing(HttpService("http://127.0.0.1:9", TOKEN)) as service,
            pytest.raises(TransientIOError, match=message),
        ):
            service.batches()

    def test_a_server_that_is_another(self, hub_server):
        message = "expected the API of `mergefleet serve`, found status"
        with (
            contextlib.closing(HttpService(hub_server.endpoint, None)) as service,
            pytest.raises(BadInputError, match=message),
        ):
            service.batches()
