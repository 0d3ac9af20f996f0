"""A receiver of webhooks on this machine, that checks what it gets, and can be away for a while."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import standardwebhooks

SECRET = "whsec_" + "c2VjcmV0IG9mIHRoZSB0ZXN0cywgMzIgYnl0ZXMgbG9uZw=="


class Receiver:
    """Keeps what it is told.

    Args:
        port: to listen on; 0 for a free one.
        answer: called with the number of a request, from 1; returns the status.
    """

    def __init__(self, port: int = 0, answer: Callable[[int], int] = lambda _: 204) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        """Id and body of what was taken, in order; what came again, too."""
        self.num_requests = 0
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                standardwebhooks.Webhook(SECRET).verify(body, dict(self.headers))
                receiver.num_requests += 1
                status = answer(receiver.num_requests)
                if status < 300:
                    receiver.messages.append((self.headers["webhook-id"], json.loads(body)))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def receive(port: int = 0, answer: Callable[[int], int] = lambda _: 204) -> Iterator[Receiver]:
    """Run a receiver until the block ends."""
    receiver = Receiver(port, answer)
    try:
        yield receiver
    finally:
        receiver.close()
