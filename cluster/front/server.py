"""The server as a process: it listens, answers, sends messages, and ends in order."""

import contextlib
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn

from cluster.front.app import Front
from cluster.front.door import Door, check_listening
from cluster.front.ledger import LedgerService
from cluster.front.pages import Pages
from cluster.front.sender import Sender
from cluster.front.wire import MAX_ADDRESS_BYTES
from cluster.settings import Settings
from jobs.errors import BadInputError

_STOP_SECONDS = 5
"""How long answers that are on their way may take when the server is told to stop."""
_BACKLOG = 128


def serve(settings: Settings, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Answer until a signal says stop (SIGINT, SIGTERM).

    Args:
        settings: of the queue.
        host: address to listen on.
        port: 0 for a free one.
        tell: gets the address, once it answers there.

    Raises:
        BadInputError: the address is taken or none of this machine, others reach it and there is no token, or the
            ledger cannot be opened.
    """
    token = settings.read_token()
    check_listening(host, token)
    with contextlib.closing(LedgerService(settings)) as service, listening(host, port) as listener:
        service.open(create=True)
        server = make_server(settings, service, token)
        sender = Sender(service.open(), settings.webhooks)
        sender.start()
        try:
            with _stopped_by_signals(server):
                # Only now: what ends after someone knows the address is told to the webhooks.
                shown = f"[{host}]" if ":" in host else host
                tell(f"http://{shown}:{listener.getsockname()[1]}")
                server.run(sockets=[listener])
        finally:
            sender.stop()


def make_server(settings: Settings, service: LedgerService, token: str | None) -> uvicorn.Server:
    """Return a server that does not run yet.

    Args:
        settings: of the queue.
        service: the queue, its ledger open.
        token: that is asked for; None for none.
    """
    server: uvicorn.Server | None = None
    door = Door(token)
    front = Front(
        service,
        door,
        poll_seconds=settings.poll_seconds,
        is_stopping=lambda: server is not None and server.should_exit,
    )
    config = uvicorn.Config(
        front.app(Pages(front, service, door).routes()),
        log_config=None,  # logging is the command line's
        access_log=False,
        lifespan="off",
        server_header=False,
        http="h11",
        h11_max_incomplete_event_size=MAX_ADDRESS_BYTES,  # of more, uvicorn itself says 400, in plain text
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    return server


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Let a signal stop the server before it runs, too, and do no more when uvicorn raises it again at its end."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Listen on an address until the block ends.

    Raises:
        BadInputError: it is taken, or none of this machine.
    """
    with contextlib.ExitStack() as stack:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise BadInputError(
                f"serve: cannot listen on {host} port {port}: {error.strerror or error}; --host and --port choose "
                "another"
            ) from error
        yield listener
