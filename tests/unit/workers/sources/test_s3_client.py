"""What is made of a store's answers, where the answer is not whole."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from jobs.errors import TransientIOError
from jobs.locations import S3Prefix
from workers.sources.s3_client import S3Store

MISSING = b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code><Message>there is none</Message></Error>'


@pytest.fixture
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """A client of a store that answers everything with status 404 and these bytes."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(request.param)))
            self.end_headers()
            self.wfile.write(request.param)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        yield S3Store(S3Prefix("bucket", "releases/one"))
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("client", [MISSING], indirect=True)
def test_what_a_store_says_is_missing_is_missing(client: S3Store) -> None:
    assert client.content("manifest.json", 1000) is None


@pytest.mark.parametrize("client", [b"", MISSING[:50], b"<html>not found</html>"], indirect=True)
def test_of_an_answer_that_is_cut_short_or_no_stores_nothing_follows(client: S3Store) -> None:
    with pytest.raises(TransientIOError, match="GetObject answered 404 without a reason") as caught:
        client.content("manifest.json", 1000)
    assert caught.value.place == "s3://bucket"
