"""The pages in a real browser: a person logs in, reads, and sees changes; text from outside acts on nothing."""

import asyncio
import os
from pathlib import Path

import httpx2
import pytest

from cluster.settings import Settings
from jobs.errors import FailureClass
from jobs.ledger.pauses import Scope
from jobs.locations import parse_location
from jobs.release import Release
from jobs.request import MergeRequest
from jobs.states import Decision, JobState
from tests.releases import advance, begin, make_manifest, settle
from tests.servers.browser import CHROMIUM, Browser, browse
from tests.servers.front import TOKEN, FrontServer, serve_front

EVIL = "<img src=x onerror=alert(1)>\u202e<script>document.title='owned'</script>'\"&"
PICTURES = os.environ.get("MF_TEST_PICTURES")
"""Directory that pictures of the pages are written to, when they are wanted: `docs/`. They show harmless text."""
SAID = "search" if PICTURES else EVIL


def fill(server: FrontServer) -> None:
    """Make a queue with something of everything."""
    store = server.store
    for batch, count in (("nightly", 12), ("tuesday", 5)):
        store.submit(
            [
                MergeRequest.model_validate(
                    {
                        "id": f"{batch}-{number:02}",
                        "base": "hf://org/llama-3-8b@4f2a1c",
                        "adapter": f"/adapters/support-{number}",
                        "destination": f"s3://releases/{batch}/support-{number}",
                        "labels": {"team": SAID},
                    }
                )
                for number in range(count)
            ],
            batch,
        )
    store.register_driver("driver-0", "machine-1", 4711, "")
    tokens = {lease.job_id: lease.token for lease in store.claim("driver-0", 8, 3600)}
    for number, (job_id, token) in enumerate(tokens.items()):
        begin(store, job_id, token, worker=f"merge-worker-{number % 2}", node="machine-2")
        if number < 4:
            advance(store, job_id, token, JobState.PUBLISHING)
            release = Release(
                location=parse_location(f"s3://releases/nightly/support-{number}"),
                manifest=make_manifest({"config.json": b"{}", "model.safetensors": b"x" * 4096}),
                manifest_sha256="d" * 64,
                created=True,
            )
            settle(store, job_id, token, release)
        elif number < 6:
            message = f"adapter '{number}': expected a rank, found none {SAID}"
            store.fail(job_id, token, FailureClass.BAD_INPUT, message, Decision(state=JobState.FAILED))
    store.pause(Scope.PLACE, "s3://other", "ann", f"moving to another region {SAID}")


@pytest.fixture
def server(tmp_path):
    with serve_front(Settings(home=tmp_path / "home", poll_seconds=0.05)) as server:
        fill(server)
        yield server


def test_every_page_is_escaped_and_has_a_policy(server):
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        for path in ("/", "/batches/nightly", "/jobs/nightly-00", "/jobs/nightly-05", "/jobs/nightly-00/release"):
            page = client.get(path)
            assert page.status_code == 200
            assert "<img" not in page.text
            assert "<script>" not in page.text
            assert "\u202e" not in page.text
            policy = page.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'nonce-")
            assert "unsafe" not in policy
            assert "http" not in policy
        assert client.get("/jobs/none").status_code == client.get("/batches/none").status_code == 404
        assert client.get("/?colour=red").status_code == 400
        assert "no such job: none" in client.get("/jobs/none").text


def test_pages_of_a_batch_follow_each_other(server):
    store = server.store
    fields = {"base": "/b", "adapter": "/a"}
    names = [f"many-{number:03}" for number in range(60)]
    store.submit(
        [MergeRequest.model_validate({"id": each, "destination": f"/o/{each}", **fields}) for each in names], "many"
    )
    with httpx2.Client(base_url=server.url, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        first = client.get("/batches/many").text
        link = first.split('href="?')[1].split('"')[0].replace("&amp;", "&")
        second = client.get(f"/batches/many?{link}").text
    assert [name for name in names if f"/jobs/{name}" in first] == names[:50]
    assert [name for name in names if f"/jobs/{name}" in second] == names[50:]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_person_logs_in_reads_and_sees_changes(server, tmp_path):
    async def picture(browser: Browser, name: str) -> None:
        if PICTURES:
            await browser.picture(Path(PICTURES) / name)

    async def look() -> list[str]:
        async with browse(tmp_path / "browser") as browser:
            await browser.open(f"{server.url}/")
            await browser.wait_for("location.pathname == '/login'")
            await browser.run(f"document.querySelector('#token').value = {TOKEN!r}; document.forms[0].submit()")
            await browser.wait_for("location.pathname == '/' && document.readyState == 'complete'")
            text = await browser.run("document.body.innerText")
            assert "paused: place s3://other" in text
            assert PICTURES or "<img src=x onerror=alert(1)>\\u202e<script>" in text
            await picture(browser, "page-queue.png")

            server.store.cancel(["tuesday-04"])
            await browser.wait_for("document.querySelector('li.CANCELLED b')?.innerText == '1'")

            await browser.run("document.querySelector('a[href=\"/batches/nightly\"]').click()")
            await browser.wait_for("location.pathname == '/batches/nightly' && document.readyState == 'complete'")
            assert "4 published, 2 failed" in await browser.run("document.body.innerText")
            await picture(browser, "page-batch.png")

            await browser.open(f"{server.url}/jobs/nightly-07")
            await browser.wait_for("document.querySelector('h1')?.innerText == 'job nightly-07'")
            assert "merge-worker-1" in await browser.run("document.body.innerText")
            server.store.cancel(["nightly-07"])
            await browser.wait_for("document.querySelector('main').innerText.includes('CANCELLING')")

            await browser.open(f"{server.url}/jobs/nightly-00")
            await browser.wait_for("document.querySelector('h1')?.innerText == 'job nightly-00'")
            await picture(browser, "page-job.png")
            await browser.run("[...document.links].find(link => link.innerText == 'release').click()")
            await browser.wait_for(
                "location.pathname == '/jobs/nightly-00/release' && document.readyState == 'complete'"
            )
            assert "model.safetensors" in await browser.run("document.body.innerText")
            assert await browser.run("document.title") == "release of nightly-00 - mergefleet"
            assert TOKEN not in await browser.run(
                "document.cookie + location.href + document.documentElement.outerHTML"
            )
            return browser.complaints

    complaints = asyncio.run(look())
    assert [each for each in complaints if "favicon" not in each] == []
