"""A loopback proxy before the S3 server: it refuses, cuts, delays or answers with errors, as the campaign has it."""

import contextlib
import http.client
import random
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from urllib.parse import urlsplit

_CHUNK_BYTES = 1 << 20
_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding", "te", "upgrade", "proxy-connection"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What happens to requests."""

    refused: bool = False
    """Nothing listens."""
    share: float = 0.0
    """Of requests that are answered with one of `statuses`."""
    statuses: tuple[int, ...] = (500, 503)
    cut_share: float = 0.0
    """Of requests whose connection breaks in the middle of the answer."""
    delay_seconds: float = 0.02
    """Before each answer."""


FAIR = Weather()


class Proxy:
    """The proxy, and what the weather is."""

    def __init__(self, upstream: str, seed: int) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        assert parts.port is not None
        self.upstream = parts.hostname, parts.port
        self.weather = FAIR
        self.num_faults = 0
        self._rng = random.Random(seed)
        self._open: set[socket.socket] = set()
        self._server = self._listen(0)
        self.port = self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        """Where clients find it."""
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def turned(self, weather: Weather) -> Iterator[None]:
        """Have a weather while the block lasts."""
        self.weather = weather
        if weather.refused:
            self._close()
        try:
            yield
        finally:
            self.weather = FAIR
            if weather.refused:
                self._server = self._listen(self.port)

    def draw(self) -> float:
        """Return a number from 0 to 1."""
        return self._rng.random()

    def choose(self, statuses: tuple[int, ...]) -> int:
        """Return one of some statuses."""
        return self._rng.choice(statuses)

    def close(self) -> None:
        """End it."""
        self._close()

    def _listen(self, port: int) -> socketserver.ThreadingTCPServer:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        server = _Server(("127.0.0.1", port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that are killed leave in the middle of things."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def setup(self) -> None:
        super().setup()
        self.owner._open.add(self.connection)
        self._upstream = http.client.HTTPConnection(*self.owner.upstream, timeout=60)

    def finish(self) -> None:
        self.owner._open.discard(self.connection)
        self._upstream.close()
        super().finish()

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):
            return self._pass_on
        raise AttributeError(name)

    def _pass_on(self) -> None:
        weather = self.owner.weather
        body = self._body()
        time.sleep(weather.delay_seconds)
        if self.owner.draw() < weather.share:
            self.owner.num_faults += 1
            self._refuse(self.owner.choose(weather.statuses))
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
        self._upstream.request(self.command, self.path, body=body, headers=headers)
        answer = self._upstream.getresponse()
        data = answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP | {"content-length"}:
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.owner.draw() < weather.cut_share:
            # The store has done it, and the client does not know.
            self.owner.num_faults += 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _refuse(self, status: int) -> None:
        code = {403: "AccessDenied", 500: "InternalError", 503: "SlowDown"}[status]
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the campaign</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
