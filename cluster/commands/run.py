"""The `run` command: Ray, workers and a driver from start to end, and what is seen of them."""

import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.live import Live

from cluster import exit_codes
from cluster.commands.watch import LiveBoard
from cluster.console.display import event_line, summary_line
from cluster.console.documents import plain
from cluster.console.terminal import Terminal
from cluster.driving.driver import Driver
from cluster.driving.events import DriverEvent, event_name
from cluster.driving.settlement import STORE_FAULTS
from cluster.driving.signals import stop_on_signals
from cluster.fleet.crews import Crew, plan_crews
from cluster.fleet.pool import WorkerPool
from cluster.log_files import driver_log, written_log
from cluster.logs import LogFormat
from cluster.ray_fleet.actors import RayActors
from cluster.ray_fleet.losses import SessionLostError, lost_sessions
from cluster.ray_fleet.metrics import FleetMetrics
from cluster.ray_fleet.session import Session, close_session, open_session
from cluster.settings import Settings, load_settings, worker_settings
from jobs.errors import BadInputError
from jobs.ledger.store import JobStore
from workers.files.collector import loading
from workers.merging.settings import WorkerSettings

logger = logging.getLogger(__name__)


def drive(
    output: Terminal,
    *,
    drain: bool,
    num_workers: int | None,
    address: str | None,
    log_format: LogFormat,
    predecessor: str | None,
    tell_name: Callable[[str], None],
) -> int:
    """Run a driver until it is drained or stopped.

    Args:
        output: gets a line or a JSON document for every event; at a terminal also a live board.
        drain: end when nothing is left that could still become claimable.
        num_workers: worker processes; None for what the settings say.
        address: of a Ray cluster to join; None starts a local one.
        log_format: how the workers write their logs.
        predecessor: name of a driver that has ended without a word; its jobs are free at once.
        tell_name: told the name of this driver.

    Returns:
        The exit code: what became of the jobs that this driver ended, or that some are left.

    Raises:
        MergefleetError: settings, Ray or the store are not usable.
        SessionLostError: Ray's own services are gone.
    """
    settings = load_settings() if num_workers is None else load_settings(workers=num_workers)
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        store = _enter(stack, settings, owner, predecessor)
        stack.enter_context(_logging(settings, owner, predecessor))
        traced = _tracing(settings, store, owner)
        tell_name(owner)
        with _insisted(predecessor):
            session = open_session(settings, namespace=f"mergefleet-{owner}", address=address, log_format=log_format)
        stack.callback(close_session)
        _introduce(output, session, settings)
        driver = Driver(
            store,
            stack.enter_context(_open_pool(session, settings, owner)),
            settings,
            FleetMetrics(),
            owner=owner,
            listener=_each(stack.enter_context(_listening(output, store)), stack.enter_context(traced)),
        )
        began = time.monotonic()
        with stop_on_signals(driver), lost_sessions():
            summary = driver.run(drain=drain)
        seconds = time.monotonic() - began
        store.see_driver(owner, ended=True)
        logger.info("driver done", extra={**plain(summary), "seconds": round(seconds, 3)})
    _tell(output, [summary_line(summary, seconds)], {"event": "summary", **plain(summary), "seconds": seconds})
    return exit_codes.of_jobs(summary.failures) or (exit_codes.WORK_LEFT if summary.left else exit_codes.DONE)


def _enter(stack: contextlib.ExitStack, settings: Settings, owner: str, predecessor: str | None) -> JobStore:
    """Open the store as its driver; a driver that follows another waits until the store answers.

    Its first one says at once what is wrong, to the person who starts it; later no one may be there to start it again.
    """
    while True:
        with contextlib.ExitStack() as opened:
            try:
                store = opened.enter_context(contextlib.closing(JobStore(settings.store)))
                opened.enter_context(store.one_driver(owner))
                if predecessor is not None:
                    store.release_leases(predecessor)
                store.register_driver(owner, socket.gethostname(), os.getpid(), settings.share_label)
            except STORE_FAULTS as error:
                if predecessor is None:
                    raise
                logger.warning("store does not answer; tried again", extra={"reason": str(error)})
            else:
                stack.push(opened.pop_all())
                return store
        time.sleep(settings.poll_seconds)


@contextlib.contextmanager
def _insisted(predecessor: str | None) -> Iterator[None]:
    """Have the supervisor start another driver where Ray cannot start now, and did before.

    Raises:
        SessionLostError: a full or read-only disk, say; it may be over in a moment.
    """
    try:
        yield
    except STORE_FAULTS as error:
        if predecessor is None:
            raise
        raise SessionLostError(str(error)) from error


@contextlib.contextmanager
def _logging(settings: Settings, owner: str, predecessor: str | None) -> Iterator[None]:
    """Keep a log of this driver: from whom it takes over, and how it ends."""
    with written_log(settings.logs, driver_log(owner)):
        said = {"driver": owner}
        logger.info("driver begun", extra=said if predecessor is None else said | {"follows": predecessor})
        try:
            yield
        except BaseException as error:
            # For the file: a person is told in one clear message, elsewhere.
            told = f"{type(error).__name__}: {error}"
            logger.info("driver ended by a fault", extra={"reason": told}, exc_info=True)
            raise


@contextlib.contextmanager
def _open_pool(session: Session, settings: Settings, owner: str) -> Iterator[WorkerPool]:
    with loading():  # it takes seconds to load, and wrong settings are told before
        from cluster.ray_fleet.worker import MergeWorker  # noqa: PLC0415

    crews = plan_crews(
        num_cpus=session.num_cpus,
        num_gpus=session.num_gpus,
        num_cpus_without_gpus=session.num_cpus_without_gpus,
        device=settings.device,
        num_workers=settings.workers,
        num_threads=settings.num_threads,
    )

    def arguments(crew: Crew) -> tuple[Path, str, WorkerSettings]:
        return settings.logs, owner, worker_settings(settings, device=crew.device, num_threads=crew.num_threads)

    pool = WorkerPool(
        RayActors(MergeWorker, arguments),
        crews,
        ping_seconds=settings.poll_seconds,
        unresponsive_seconds=settings.unresponsive_seconds,
        num_spares=settings.spare_workers,
    )
    with contextlib.closing(pool):
        yield pool


def _introduce(output: Terminal, session: Session, settings: Settings) -> None:
    """Say where to look."""
    token = "" if session.token_path is None else f"  (token: {session.token_path})"
    lines = [
        f"dashboard  {session.dashboard_url or 'off'}{token}",
        *(f"metrics    {url}" for url in session.metrics_urls),
        f"reports    {settings.reports}",
        f"logs       {settings.logs}",
    ]
    places = {"reports": str(settings.reports), "logs": str(settings.logs)}
    _tell(output, lines, {"event": "started", **plain(session), **places})


def _tell(output: Terminal, lines: Iterable[RenderableType], document: dict[str, Any]) -> None:
    """Show lines to a person, or write a JSON document; a reader that is gone ends no batch."""
    try:
        for line in lines:
            output.show(line)
        output.document(document)
    except OSError as error:
        logger.warning("the output cannot be written to any more; the batch goes on", extra={"reason": str(error)})
        output.leave()


@contextlib.contextmanager
def _listening(output: Terminal, store: JobStore) -> Iterator[Callable[[DriverEvent], None]]:
    """Yield what the driver tells its events; at a terminal a board is kept below them."""
    live = None
    if output.out.is_terminal and not output.as_json:
        live = Live(LiveBoard(store), console=output.out, refresh_per_second=1, transient=True)

    def listener(event: DriverEvent) -> None:
        _tell(output, [event_line(event)], {"event": event_name(event), **plain(event)})

    # A board that cannot be drawn, at its begin or at its end, is no reason to merge nothing or to tell of nothing.
    with _only_shown():
        if live is not None:
            live.start()
    try:
        yield listener
    finally:
        with _only_shown():
            if live is not None:
                live.stop()


def _tracing(
    settings: Settings, store: JobStore, owner: str
) -> contextlib.AbstractContextManager[Callable[[DriverEvent], None]]:
    """Yield what the driver tells its events, for traces.

    Raises:
        BadInputError: traces are asked for, and what sends them is not installed.
    """
    if settings.traces is None:
        return contextlib.nullcontext(lambda _: None)
    try:
        from cluster.traces import tracing  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise BadInputError(
            f"traces: {error}; install what sends them, pip install 'mergefleet[traces]', or do not set it"
        ) from error
    return tracing(store, settings.traces, owner)


def _each(*listeners: Callable[[DriverEvent], None]) -> Callable[[DriverEvent], None]:
    def listener(event: DriverEvent) -> None:
        for each in listeners:
            each(event)

    return listener


@contextlib.contextmanager
def _only_shown() -> Iterator[None]:
    """Log what goes wrong inside, and go on."""
    try:
        yield
    except Exception:
        logger.exception("the board could not be shown")
