"""The server as its clients meet it: who is let in, bounds, problem documents, streams, the document of the API."""

import contextlib
import http.client
import json
import threading
import time
import urllib.parse
from pathlib import Path

import httpx2
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from cluster.front.door import Door
from cluster.front.openapi import openapi_document
from cluster.front.wire import MAX_IDS, MAX_LABELS
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from tests.api_calls import call_all, serve_filled
from tests.releases import begin, make_report, write_files
from tests.servers.front import TOKEN, serve_front


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve_front(Settings(home=tmp_path_factory.mktemp("front"), poll_seconds=0.05)) as server:
        submit(server.store, "one")
        yield server


@pytest.fixture
def client(server):
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30) as client:
        yield client


def submit(store: JobStore, *names: str, batch: str = "b", **fields: object) -> None:
    values = {"base": "/b", "adapter": "/a", **fields}
    store.submit(
        [MergeRequest.model_validate({"id": each, "destination": f"/o/{each}", **values}) for each in names], batch
    )


def stream_of(url, headers, is_enough):
    """Return the first events of a stream, id and data of each, until there are enough."""
    found = []
    with httpx2.Client(timeout=10) as client, client.stream("GET", url, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        last, deadline = None, time.monotonic() + 60
        for line in response.iter_lines():
            assert time.monotonic() < deadline
            if line.startswith("id: "):
                last = line.removeprefix("id: ")
            if line.startswith("data: "):
                found.append((last, json.loads(line.removeprefix("data: "))))
            if is_enough(found):
                break
    return found


class TestDoor:
    @pytest.mark.parametrize(
        "shown", ["", "Bearer", "Bearer wrong-token-0123456789", f"Basic {TOKEN}", f"Bearer {TOKEN}x"]
    )
    def test_no_one_without_the_token(self, server, shown):
        for method, path in (
            ("GET", "/v1/jobs"),
            ("POST", "/v1/cancel"),
            ("GET", "/v1/events"),
            ("GET", "/openapi.json"),
        ):
            answer = httpx2.request(method, server.url + path, headers={"Authorization": shown} if shown else {})
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.json()["error"] == "AuthError"
            assert TOKEN not in answer.text

    def test_health_is_for_all(self, server):
        assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}

    def test_a_token_in_the_address_is_none(self, server):
        assert httpx2.get(f"{server.url}/v1/jobs?token={TOKEN}").status_code == 401

    def test_without_a_token_only_names_of_this_machine_lead_in(self, tmp_path):
        with serve_front(Settings(home=tmp_path), token=None) as server:
            assert httpx2.get(f"{server.url}/v1/jobs").status_code == 200
            for host in ("evil.example", "127.0.0.1.evil.example:80", "", "10.0.0.1:8420"):
                answer = httpx2.get(f"{server.url}/v1/jobs", headers={"Host": host})
                assert answer.status_code in (400, 403)
            # What a form of another site can send is of no type that is read.
            for media_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                answer = httpx2.post(
                    f"{server.url}/v1/pause", content=b'{"scope": "queue"}', headers={"Content-Type": media_type}
                )
                assert answer.status_code == 415
            assert server.store.pauses() == ()

    def test_a_session_reads_and_changes_nothing(self, server):
        with httpx2.Client(base_url=server.url) as client:
            assert client.post("/login", data={"token": "wrong"}).status_code == 403
            assert client.get("/").status_code == 303
            answer = client.post("/login", data={"token": TOKEN})
            assert answer.status_code == 303
            cookie = answer.headers["set-cookie"]
            assert "HttpOnly" in cookie
            assert "samesite=strict" in cookie.lower()
            assert TOKEN not in cookie
            assert client.get("/").status_code == client.get("/v1/jobs").status_code == 200
            body = {"json": {"scope": "queue"}}
            assert client.post("/v1/pause", **body).status_code == 401

    def test_a_session_ends_and_cannot_be_made(self):
        now = [1000.0]
        door = Door(TOKEN, clock=lambda: now[0])
        session = door.make_session()
        assert door.knows_session(session)
        expires, _, signature = session.partition(".")
        for wrong in ("", ".", expires, f"{int(expires) + 1}.{signature}", f"{expires}.", f"x.{signature}", "é.é"):
            assert not door.knows_session(wrong)
        assert not Door(TOKEN).knows_session(session)
        now[0] += 12 * 3600 + 1
        assert not door.knows_session(session)


class TestBounds:
    def test_a_body_that_is_too_large_is_refused_before_it_is_read(self, server):
        parts = urllib.parse.urlsplit(server.url)
        with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=20)) as connection:
            connection.putrequest("POST", "/v1/batches/b")
            for name, value in (
                ("Authorization", f"Bearer {TOKEN}"),
                ("Content-Type", "text/csv"),
                ("Content-Length", "999999999"),
            ):
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            assert answer.status == 413
            document = json.loads(answer.read())
        assert document["detail"].startswith("body: expected at most 16777216 bytes")

    def test_one_without_a_length_is_refused_where_it_gets_too_large(self, client):
        answer = client.post(
            "/v1/batches/b", content=(b"x" * 2**20 for _ in range(17)), headers={"Content-Type": "text/csv"}
        )
        assert answer.status_code == 413

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({"Content-Type": "text/html"}, 415),
            ({}, 415),
            ({"Content-Type": "text/csv; charset=latin-1"}, 415),
            ({"Content-Type": "text/csv", "Content-Encoding": "gzip"}, 415),
            ({"Content-Type": 'text/csv; charset="utf-8"'}, 400),
        ],
    )
    def test_what_is_not_read(self, client, headers, status):
        answer = client.post("/v1/batches/b", content=b"id\n\xff", headers=headers)
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"

    @pytest.mark.parametrize(
        ("path", "status", "words"),
        [
            ("/v1/jobs?limit=0", 400, "query: limit: expected greater than or equal to 1"),
            ("/v1/jobs?limit=1&limit=2", 400, "query: limit: expected it once"),
            ("/v1/jobs?colour=red", 400, "found 'colour'"),
            ("/v1/jobs?state=ASLEEP&since=nan", 400, "since: expected a finite number"),
            ("/v1/jobs?label=x", 400, "query: label.0"),
            ("/v1/jobs/%00", 400, "path: id"),
            ("/jobs/%00", 400, "path: id"),
            ("/v1/nothing", 404, "there is nothing at /v1/nothing"),
            ("/v1/cancel", 405, "expected POST for /v1/cancel"),
        ],
    )
    def test_what_is_asked_wrongly_is_told(self, client, path, status, words):
        answer = client.get(path)
        assert answer.status_code == status
        assert words in answer.text

    def test_a_path_of_another_machine_has_to_be_absolute(self, client):
        rows = [
            {"id": str(each), "base": base, "adapter": "/a", "destination": f"/o/{each}"}
            for each, base in enumerate(("base", "~/x", "~root"))
        ]
        document = client.post("/v1/batches/b", json={"requests": rows}).json()
        assert [each["field"] for each in document["problems"]] == [f"requests[{each}].base" for each in range(3)]
        assert "/root" not in document["detail"]


class TestStreams:
    def test_a_job_is_followed_from_where_a_client_was(self, server, client):
        headers = {"Authorization": f"Bearer {TOKEN}", "Accept": "text/event-stream"}
        submit(server.store, "followed")
        url = f"{server.url}/v1/jobs/followed/events"
        threading.Timer(0.5, lambda: server.store.cancel(["followed"])).start()
        found = stream_of(url, headers, lambda found: len(found) == 2)
        assert [(id_, event["state"]) for id_, event in found] == [("1", "QUEUED"), ("2", "CANCELLED")]
        [(id_, event)] = stream_of(url, headers | {"Last-Event-ID": "1"}, bool)
        assert (id_, event["state"], event["job_id"]) == ("2", "CANCELLED", "followed")
        assert client.get("/v1/jobs/none/events", headers=headers).status_code == 404
        assert client.get("/v1/jobs/one/events", headers=headers | {"Last-Event-ID": "x"}).status_code == 400
        assert client.get("/v1/jobs/one/events").json()["events"][0]["state"] == "QUEUED"

    def test_all_changes_are_followed_and_none_is_missed_in_between(self, server):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        since = server.store.now()
        names = [f"change-{number}" for number in range(30)]
        stop = threading.Event()

        def work():
            for name in names:
                submit(server.store, name)
                stop.wait(0.01)

        thread = threading.Thread(target=work)
        thread.start()
        seen, last = set(), None

        def is_enough(found):
            return len(found) == 7 or len(seen | {event["job_id"] for _, event in found}) == len(names)

        while len(seen) < len(names):
            more = headers if last is None else headers | {"Last-Event-ID": last}
            some = stream_of(f"{server.url}/v1/events?since={since!r}", more, is_enough)
            seen |= {event["job_id"] for _, event in some}
            last = some[-1][0]
        thread.join()
        assert seen == set(names)

    def test_a_change_that_appears_late_is_sent(self, tmp_path):
        """As on Postgres, where writers do not wait for each other."""
        from cluster.front.streams import ChangeFeed

        store = JobStore(f"sqlite:///{tmp_path}/jobs.db", clock=lambda: now[0])
        store._database.settling_seconds = 60.0
        now = [1000.0]
        feed = ChangeFeed(store, 900.0, resumes=False)
        submit(store, "first")
        assert [event.job_id for _, event in feed()] == ["first"]
        now[0] = 990.0
        submit(store, "late")
        now[0] = 1001.0
        assert [event.job_id for _, event in feed()] == ["late"]
        assert feed() == []
        resumed = ChangeFeed(store, 1000.0, resumes=True)
        assert [event.job_id for _, event in resumed()] == ["late", "first"]
        store.close()

    def test_more_streams_than_may_be_open_are_told_to_come_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr("cluster.front.app._MAX_STREAMS", 1)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with (
            serve_front(Settings(home=tmp_path, poll_seconds=0.05)) as server,
            httpx2.Client(base_url=server.url, headers=headers, timeout=20) as client,
        ):
            with client.stream("GET", "/v1/events") as first:
                lines = first.iter_lines()  # kept: the stream ends with it
                assert next(lines) == "retry: 2000"
                answer = client.get("/v1/events")
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            deadline = time.monotonic() + 20
            while True:
                with client.stream("GET", "/v1/events") as second:
                    if second.status_code == 200:
                        break
                assert time.monotonic() < deadline

    def test_a_stream_ends_with_the_server(self, tmp_path):
        with serve_front(Settings(home=tmp_path, poll_seconds=0.05)) as server:
            submit(server.store, "one")
            headers = {"Authorization": f"Bearer {TOKEN}"}
            client = httpx2.Client(timeout=30)
            context = client.stream("GET", f"{server.url}/v1/events?since=0", headers=headers)
            response = context.__enter__()
            lines = response.iter_lines()
            assert next(lines) == "retry: 2000"
            begin_ = time.monotonic()
        assert time.monotonic() - begin_ < 5
        list(lines)
        context.__exit__(None, None, None)
        client.close()


class TestReports:
    def test_a_page_of_a_worker_runs_nothing(self, server, client):
        submit(server.store, "reported")
        directory = Path(server.store._database.name.removeprefix("sqlite:///")).parent / "reports" / "reported"
        directory.mkdir(parents=True)
        (directory / "parity.json").write_bytes(make_report("a" * 64))
        (directory / "parity.html").write_text("<script>alert(1)</script>")
        from jobs.errors import FailureClass
        from jobs.states import Decision, JobState

        leases = {lease.job_id: lease.token for lease in server.store.claim("driver", 99, 60)}
        begin(server.store, "reported", leases["reported"])
        server.store.fail(
            "reported",
            leases["reported"],
            FailureClass.PARITY_FAILED,
            "x",
            Decision(state=JobState.FAILED),
            report_path=str(directory),
        )
        page = client.get("/v1/jobs/reported/report", headers={"Accept": "text/html,*/*"})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        policy = page.headers["content-security-policy"]
        assert "sandbox" in policy
        assert "script-src" not in policy
        assert "default-src 'none'" in policy
        assert client.get("/v1/jobs/reported/report").json()["level"] == "arithmetic"


class TestDocument:
    def test_it_is_valid(self, client):
        document = client.get("/openapi.json").json()
        OpenAPIV31SpecValidator(document).validate()
        assert document == json.loads(json.dumps(openapi_document(document["info"]["version"])))
        assert {"MergeRequest", "JobRecord", "ProblemDocument", "Event"} <= document["components"]["schemas"].keys()

    def test_answers_are_what_it_says_whatever_is_asked(self, tmp_path):
        with serve_filled(tmp_path) as server:
            found = call_all(server, 80, seed=0)
        assert max(status for _, status in found) < 500
        assert {200, 400, 401, 404} <= {status for _, status in found}


def test_the_longest_question_that_the_document_allows_is_answered(server):
    """In addresses, where a character may take twelve bytes: more than the clients of most libraries send."""
    wide = "\U0001f600"
    longest = [("label", f"{number}={wide * 1000}") for number in range(MAX_LABELS)]
    longest += [("id", wide * 128)] * MAX_IDS
    place = urllib.parse.urlsplit(server.url)
    for more, expected in (([], {200}), ([("label", "one=more")], {400, 422})):
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
        with contextlib.closing(connection):
            address = f"/v1/jobs?{urllib.parse.urlencode([*longest, *more])}"
            connection.request("GET", address, headers={"Authorization": f"Bearer {TOKEN}"})
            answer = connection.getresponse()
            assert answer.status in expected
            assert answer.headers["content-type"].startswith("application/")


@pytest.mark.parametrize("folder", ["there", "nowhere"])
def test_the_server_looks_up_no_patterns(client, tmp_path, folder):
    """What lies on its machine is not for a client to find out: the words are the same whether there is something."""
    write_files(tmp_path / "there" / "checkpoint-1", {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"})
    pattern = f"{tmp_path}/{folder}/checkpoint-*"
    body = {"matrix": {"bases": ["/b"], "adapters": [pattern], "destination": "/o/{step}"}}
    answers = [client.post("/v1/batches/sweep", json=body)]
    headers = {"Content-Type": "application/yaml"}
    text = json.dumps(body)  # which is YAML, too
    answers += [
        client.post("/v1/batches/sweep", content=text, headers=headers, params=where)
        for where in ({}, {"directory": str(tmp_path), "name": "f.yaml"})
    ]
    for answer in answers:
        assert answer.status_code == 400
        (problem,) = answer.json()["problems"]
        assert problem["field"] == "matrix.adapters[0]"
        assert problem["found"] == f"'{pattern}'"
        assert problem["expected"].startswith("a place without '*' and '?': they are looked up by `mergefleet submit`")
