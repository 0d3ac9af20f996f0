"""Several workers on one pass: pieces are handed out, what is merged is finished, and helpers are let go of."""

import logging
from collections.abc import Callable, Sequence

from cluster.driving.events import DriverEvent, ShardsStarted
from cluster.driving.holdings import Flight, Held, Holdings
from cluster.driving.ports import Pool
from cluster.driving.scheduler import OpenPass, WorkerView, share_out
from cluster.driving.sharing import SharedPass

logger = logging.getLogger(__name__)

_PATIENCE_SECONDS = 120.0
"""How long a pass waits for a worker of its kind: longer than one takes to start."""


class Helping:
    """Moves the shared passes of a driver on; what workers answer is taken in elsewhere."""

    def __init__(self, holdings: Holdings, pool: Pool, *, owner: str, listener: Callable[[DriverEvent], None]) -> None:
        """Take what it reads and calls.

        Args:
            holdings: the passes, and who is at them.
            pool: told to open passes, to merge pieces and to finish.
            owner: names the driver; its passes are named after it.
            listener: told of pieces that are begun.
        """
        self._holdings = holdings
        self._pool = pool
        self._owner = owner
        self._listener = listener
        self._num_passes = 0

    def open(self, worker: str, flight: Flight, name: str) -> None:
        """Have a pass opened by the worker that will lead it."""
        flight.shared = SharedPass(f"{self._owner}-{self._num_passes}")
        flight.shared.takers.add(worker)
        self._num_passes += 1
        self._pool.open_pass(worker, flight.shared.pass_id, name, flight.requests)

    def step(self, views: Sequence[WorkerView]) -> None:
        """Do what can be done now.

        Args:
            views: the workers that may get pieces; none while the driver stops.
        """
        self._give_pieces(views)
        self._replace_leaders(views)
        self._finish_passes()

    def stranded(self, views: Sequence[WorkerView], now: float) -> list[Held]:
        """Return the jobs of passes for which no worker of their kind has been up for some time.

        Another kind cannot go on with them, since its bits may be others; from the beginning it can.

        Args:
            views: all workers.
            now: seconds that only go forward.
        """
        by_name = {view.name: view for view in views}
        jobs: list[Held] = []
        for leader, flight, shared in self._holdings.shared_passes():
            view = by_name.get(leader)
            kind = {each.name for each in views if view is not None and each.up and each.device == view.device}
            if view is None or kind - shared.barred:
                shared.stranded_since = None
            elif shared.stranded_since is None:
                shared.stranded_since = now
            elif now - shared.stranded_since >= _PATIENCE_SECONDS:
                jobs += flight.held.values()
        return jobs

    def _give_pieces(self, views: Sequence[WorkerView]) -> None:
        """Have idle workers of the leader's kind work on passes that are open: the bits of a GPU may be others."""
        devices = {view.name: view.device for view in views}
        leading = {leader for leader, _, shared in self._holdings.shared_passes() if shared.todo}
        able = [view for view in views if view.name in leading or view.name not in self._holdings.flights]
        open_passes = {
            shared.pass_id: OpenPass(
                pass_id=shared.pass_id,
                pass_key=flight.unit.pass_key,
                leader=leader,
                piece_bytes=tuple(piece.num_bytes for piece in shared.todo),
                at_work=shared.at_work,
                barred=_barred(shared, leader, able),
                device=devices[leader],
            )
            for leader, flight, shared in self._holdings.shared_passes()
            if shared.todo and leader in devices and not (shared.num_losses and shared.at_work)
        }
        if not open_passes:
            return
        for given in share_out(tuple(open_passes.values()), able):
            found = self._holdings.shared(given.pass_id)
            assert found is not None
            _, flight, shared = found
            pieces = shared.give(given.worker, given.num_pieces)
            shards = tuple(shard for piece in pieces for shard in piece.shards)
            name = flight.name("merge", f":{len(shards)} shard{'s' if len(shards) > 1 else ''}")
            self._pool.merge_shards(given.worker, shared.work(name, flight.requests), frozenset(shards))
            job_ids = tuple(flight.held)
            (view,) = [view for view in able if view.name == given.worker]
            logger.info("shards started", extra=view.named | {"unit": name, "job_ids": list(job_ids)})
            self._listener(ShardsStarted(worker=given.worker, name=name, job_ids=job_ids, shards=shards))

    def _replace_leaders(self, views: Sequence[WorkerView]) -> None:
        """Have passes that only wait for their leader led by another, where its place is empty.

        It may stay empty for long, when a machine is gone or a GPU has failed.
        """
        by_name = {view.name: view for view in views}
        for leader, _, shared in list(self._holdings.shared_passes()):
            view = by_name.get(leader)
            if view is None or view.up or not shared.is_merged or shared.finishing:
                continue
            able = [each.name for each in views if each.idle and each.device == view.device]
            if self._holdings.hand_on(leader, able):
                logger.info("pass is led by another", extra={"worker": leader, "pass": shared.pass_id})

    def _finish_passes(self) -> None:
        """Have passes finished of which all pieces are merged."""
        for leader, flight, shared in self._holdings.shared_passes():
            if shared.is_merged and not shared.finishing:
                shared.finishing = True
                work = shared.work(flight.name("verify"), flight.requests)
                self._pool.finish_pass(leader, work, shared.merged(flight.requests))


def _barred(shared: SharedPass, leader: str, able: Sequence[WorkerView]) -> frozenset[str]:
    """Return the workers that get no pieces of a pass: all but one when it has cost a worker."""
    if not shared.num_losses:
        return frozenset(shared.barred)
    idle = sorted((view.name for view in able if view.idle), key=lambda name: (name != leader, name))
    one = next((name for name in idle if name not in shared.barred), None)
    return frozenset(view.name for view in able) - {one}
