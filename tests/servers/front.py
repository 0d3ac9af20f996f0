"""A real server of the API for the tests, in a thread of this process."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.front.ledger import LedgerService
from cluster.front.server import listening, make_server
from cluster.settings import Settings
from jobs.ledger.store import JobStore

TOKEN = "a-token-of-the-tests-0123456789"


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontServer:
    """A running server."""

    url: str
    token: str | None
    store: JobStore


@contextlib.contextmanager
def serve_front(settings: Settings, token: str | None = TOKEN) -> Iterator[FrontServer]:
    """Run a server over the ledger of the settings until the block ends."""
    with contextlib.closing(LedgerService(settings)) as service, listening("127.0.0.1", 0) as listener:
        store = service.open(create=True)
        server = make_server(settings, service, token)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert thread.is_alive()
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield FrontServer(url=f"http://127.0.0.1:{listener.getsockname()[1]}", token=token, store=store)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
