"""The workers of one driver: start, calls, health and replacement.

A worker's death is an event the driver decides on. Where workers run, `Actors` knows: on Ray, or in memory.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cluster.driving.replies import CallFailed, PoolEvent, WorkerLost, WorkerUnfit
from cluster.driving.scheduler import WorkerView
from cluster.fleet.actors import POLLS, ActorGoneError, Actors, Answer, CallRaisedError
from cluster.fleet.calls import Call, event_of
from cluster.fleet.crews import Crew
from cluster.fleet.members import Member, device_fault, may_load, one_line, tell_slow_start
from jobs.errors import DeviceLostError, WorkerLostError
from jobs.request import MergeRequest
from workers.merging.outcomes import MergedShards, PassWork, Readiness, ShardsOutcome, UnitOutcome

logger = logging.getLogger(__name__)

_MAX_PINGS_PER_SECOND = 10.0
"""Of the whole fleet: what a driver does about each answer must leave it time for its work."""
_SPARE_SECONDS = 5.0
"""After which a spare is started: what there is to do begins before."""
_MAX_FAILED_STARTS = 3
"""In a row, of every place of the fleet: then there is no fleet."""
_CLOSE_SECONDS = 10.0


class WorkerPool:
    """The workers of one driver. Not thread-safe: one thread calls it."""

    def __init__(
        self,
        actors: Actors,
        crews: Sequence[Crew],
        *,
        ping_seconds: float,
        unresponsive_seconds: float = 120.0,
        num_spares: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the workers; returns at once, they come up as they are ready.

        Args:
            actors: where they run.
            crews: how many, on what.
            ping_seconds: how often each worker is asked how it is doing; in a large fleet less often.
            unresponsive_seconds: a worker that has not answered for so long is killed and replaced.
            num_spares: further workers on the CPU, that have loaded everything and stand by until another is lost.
            clock: seconds that only go forward.
        """
        self._actors = actors
        places = [crew for crew in crews for _ in range(crew.num_workers)]
        self._num_places = len(places)
        # One on a GPU would take it from a worker.
        places += [crew for crew in crews if crew.num_gpus_each == 0 for _ in range(num_spares)]
        self._ping_seconds = max(ping_seconds, len(places) / _MAX_PINGS_PER_SECOND)
        self._unresponsive_seconds = unresponsive_seconds
        self._clock = clock
        self._pinged_at = clock()
        self._members = {f"merge-worker-{n}": Member(f"merge-worker-{n}", crew) for n, crew in enumerate(places)}
        self._node_rests: dict[str, float] = {}
        """Until when nodes where a worker did not start come after others."""
        for member in self._spares:
            member.rests_until = clock() + _SPARE_SECONDS
        self._fill_places()

    def views(self) -> tuple[WorkerView, ...]:
        """Return what the scheduler needs to know. Who stands by counts as not up."""
        return tuple(member.view for member in self._members.values())

    def run_unit(self, worker: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Start a unit on an idle worker; `UnitFinished` follows. The dashboard shows the call under `name`."""
        self._call(worker, "run_unit", name, requests, task_name=name)

    def open_pass(self, worker: str, pass_id: str, name: str, requests: tuple[MergeRequest, ...]) -> None:
        """Have a pass planned that several workers will work on; `PassBegun` follows."""
        self._call(worker, "open_pass", pass_id, name, requests, task_name=name, pass_id=pass_id)

    def merge_shards(self, worker: str, work: PassWork, shards: frozenset[str]) -> None:
        """Have some pieces of a pass merged; `ShardsMerged` or `TurnedDown` follows."""
        self._call(worker, "merge_shards", work, shards, task_name=work.name, pass_id=work.pass_id)

    def finish_pass(self, worker: str, work: PassWork, merged: Mapping[str, tuple[MergedShards, ...]]) -> None:
        """Have a pass finished that is merged; `UnitFinished` or `TurnedDown` follows."""
        self._call(worker, "finish_pass", work, merged, task_name=work.name, pass_id=work.pass_id)

    def publish(self, worker: str, job_id: str, approved_by: str | None) -> None:
        """Have a staged job published, with the name of who approved it; `PublishFinished` follows."""
        # No name of a task holds that of a job: Ray keeps a series of metrics for each.
        self._call(worker, "publish", job_id, approved_by, job_id=job_id, task_name="publish")

    def leave(self, worker: str, job_id: str) -> None:
        """Have a staged job let go of, and its finished shards left to the attempt that will publish it."""
        self._call(worker, "leave", job_id, job_id=job_id, task_name="leave")

    def discard(self, worker: str, job_id: str) -> None:
        """Have what a job left dropped."""
        self._call(worker, "discard", job_id, job_id=job_id, task_name="discard")

    def cancel(self, worker: str, job_ids: Iterable[str]) -> None:
        """Ask a worker to stop some of the jobs of the unit it is at; their outcomes say so."""
        if any(call.method == "cancel" for call in self._members[worker].calls.values()):
            return  # one at a time: a worker that does not answer is not asked more and more
        self._call(worker, "cancel", frozenset(job_ids), task_name="cancel")

    def poll(self, timeout_seconds: float) -> tuple[PoolEvent, ...]:
        """Wait until something happens, at most `timeout_seconds`, and return what did.

        Raises:
            WorkerLostError: no worker of the fleet starts, tried again and again; the message has a reason.
        """
        self._fill_places()
        self._ping()
        awaited = {answer: member for member in self._members.values() for answer in member.calls}
        there = self._actors.wait(list(awaited), timeout_seconds)
        events = [event for answer in there for event in self._collect(awaited[answer], answer)]
        events.extend(self._kill_unresponsive())
        return tuple(events)

    def close(self) -> None:
        """Let the workers finish what they were told and sweep what they left, then end them.

        One that takes too long is ended all the same; what it leaves, the next run sweeps.
        """
        members = self._members.values()
        work = {answer: member for member in members for answer, call in member.calls.items() if call.is_work}
        for answer in self._actors.wait(list(work), _CLOSE_SECONDS, for_all=True) if work else ():
            work[answer].calls.pop(answer)
        closing = [
            member.actor.call("close", task_name="close")
            for member in members
            if member.actor is not None and member.ready and not member.at_work
        ]
        if closing:
            self._actors.wait(closing, _CLOSE_SECONDS, for_all=True)
        for member in members:
            if member.actor is not None:
                member.actor.kill()
            member.leave()

    @property
    def _places(self) -> list[Member]:
        """All but the spares."""
        return list(self._members.values())[: self._num_places]

    @property
    def _spares(self) -> list[Member]:
        return list(self._members.values())[self._num_places :]

    def _call_up(self, crew: Crew) -> None:
        """Have as many of a crew on duty as it is to have, as far as they are there; the others stand by.

        Who is on duty stays: it may be in the middle of a pass though it is at nothing just now.
        """
        ready = [member for member in self._members.values() if member.crew == crew and member.ready]
        num_wanted = crew.num_workers - sum(member.on_duty for member in ready)
        for member in [member for member in ready if not member.on_duty][: max(0, num_wanted)]:
            member.on_duty = True

    def _fill_places(self) -> None:
        """Put an actor into every empty place; into that of a spare once all others have started."""
        now = self._clock()
        spares = self._spares
        avoid = frozenset(node for node, until in self._node_rests.items() if now < until)
        for member in self._members.values():
            if member.actor is not None or now < member.rests_until:
                continue
            if member in spares and not all(each.ready for each in self._places):
                continue
            if not may_load(member.crew, self._members.values(), now):
                continue
            actor = self._actors.start(member.name, member.crew, avoid)
            if actor is not None:
                member.take(actor, now)
                self._call(member.name, "ready", task_name="ready")

    def _call(
        self,
        worker: str,
        method: str,
        *arguments: Any,
        task_name: str,
        job_id: str | None = None,
        pass_id: str | None = None,
    ) -> None:
        member = self._members[worker]
        if member.actor is None:
            return  # it died in this very step, and WorkerLost says what that means for its jobs
        answer = member.actor.call(method, *arguments, task_name=task_name)
        member.calls[answer] = Call(
            worker=worker, method=method, job_id=job_id, pass_id=pass_id, started_at=self._clock()
        )

    def _ping(self) -> None:
        """Ask every worker how it is doing: a busy one for its progress, an idle one for the bases it holds."""
        now = self._clock()
        if now - self._pinged_at < self._ping_seconds:
            return
        # All at the same time, so that what they answer is written down at once.
        self._pinged_at = now
        for member in self._members.values():
            if not member.ready or any(call.method in POLLS for call in member.calls.values()):
                continue
            if member.at_work:
                self._call(member.name, "progress", task_name="progress")
            else:
                self._call(member.name, "residents", task_name="residents")

    def _collect(self, member: Member, answer: Answer) -> Iterable[PoolEvent]:
        call = member.calls.pop(answer, None)
        if call is None:
            return  # its worker was lost while this batch of answers was read
        try:
            value = self._actors.take(answer)
        except ActorGoneError as error:
            yield from self._lose(member, one_line(error), out_of_memory=error.out_of_memory)
            return
        except CallRaisedError as error:
            cause = error.__cause__ or error
            if call.method == "ready" or isinstance(cause, DeviceLostError):
                yield from self._lose(member, one_line(cause), device_failed=isinstance(cause, DeviceLostError))
                return
            said, job_id, pass_id = one_line(cause), call.job_id, call.pass_id
            yield CallFailed(worker=member.name, call=call.method, job_id=job_id, pass_id=pass_id, message=said)
            return
        fault = device_fault(value)
        if fault is not None:
            member.device_faults += 1
            self._rest(member)
            yield from self._lose(member, fault, device_failed=True)
            return
        if isinstance(value, UnitOutcome | ShardsOutcome):
            member.residents = frozenset(value.residents)
            member.device_faults = 0
        if isinstance(value, Readiness):
            yield from self._welcome(member, value)
        elif call.method == "residents":
            member.residents = frozenset(value)
        elif (event := event_of(call, value)) is not None:
            yield event

    def _welcome(self, member: Member, said: Readiness) -> Iterable[PoolEvent]:
        """Count a worker that has started among those that can work, or do without it."""
        if said.fault is not None:
            yield from self._lose(member, f"{said.host}: {said.fault}")
            return
        member.ready = True
        self._call_up(member.crew)
        member.host, member.log = said.host, said.log
        member.failed_starts = 0
        if member.awaited:
            logger.warning("worker has started after all", extra={"worker": member.name})

    def _lose(
        self, member: Member, reason: str, *, device_failed: bool = False, out_of_memory: bool = False
    ) -> Iterable[PoolEvent]:
        """Empty the place of a worker that is dead or cannot work, and say so; of one that never could, once."""
        # It may be alive and only out of reach, and must not go on beside its replacement.
        assert member.actor is not None
        member.actor.kill()
        was_ready, node = member.ready, member.actor.node
        member.leave()
        self._call_up(member.crew)
        if was_ready:
            logger.warning("worker lost", extra={"worker": member.name, "reason": reason})
            yield WorkerLost(
                worker=member.name, reason=reason, device_failed=device_failed, out_of_memory=out_of_memory
            )
            return
        member.failed_starts += 1
        self._rest(member)
        if node is not None:
            self._node_rests[node] = member.rests_until
        logger.warning("worker does not start", extra={"worker": member.name, "reason": reason})
        if all(not each.ready and each.failed_starts >= _MAX_FAILED_STARTS for each in self._places):
            raise WorkerLostError(
                f"none of {self._num_places} workers started in {_MAX_FAILED_STARTS} attempts; {member.name}: {reason}"
            )
        if member.failed_starts == 1:
            yield WorkerUnfit(worker=member.name, reason=reason)

    def _rest(self, member: Member) -> None:
        """Leave a place empty for a while, the longer the more often its workers could not work."""
        member.rests_until = self._clock() + member.pause_seconds

    def _kill_unresponsive(self) -> Iterable[PoolEvent]:
        now = self._clock()
        for member in self._members.values():
            if not member.ready:
                if member.actor is not None:
                    tell_slow_start(member, now)
                continue
            pings = [call.started_at for call in member.calls.values() if not call.is_work]
            if pings and now - min(pings) > self._unresponsive_seconds:
                yield from self._lose(member, f"no answer for {self._unresponsive_seconds:.0f} s")
