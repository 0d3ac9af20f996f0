"""One unit of work: requests that share a base, from fetch to staged and ready to be published; whole or in parts.

A job that fails fails alone; what the jobs share (the base) fails them all.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from jobs.errors import CancelledError, MergefleetError
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantized_cache import QuantizedCache
from workers.bases.resident_bases import ResidentBases
from workers.files.local import file_errors
from workers.files.memory import hold_little
from workers.merging.base_plan import BasePlan, PlannedBases
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.context import Context
from workers.merging.failures import own_failure
from workers.merging.job import Job
from workers.merging.leaders import lead, waves
from workers.merging.made_with import origin_of
from workers.merging.merge import run_pass
from workers.merging.module_weights import ModuleWeights, module_weights
from workers.merging.outcomes import MergedShards, Piece, Usage
from workers.merging.pieces import pieces_of
from workers.merging.plan import plan_merge
from workers.merging.settings import WorkerSettings
from workers.merging.storing import numbers_apart
from workers.merging.tracker import Tracker
from workers.numerics.device import resolve_device
from workers.releases.sinks import Ticket
from workers.sources.fetch import fetch_base
from workers.unit.admission import Admission, admit_to_disks, admit_to_uplink
from workers.unit.base_weights import open_weights
from workers.unit.destinations import join_destination, open_destination
from workers.unit.leftovers import make_room, sweep_scratch
from workers.unit.recording import ShardRecorder
from workers.unit.request_adapters import fetch_adapters
from workers.unit.resuming import resume_all
from workers.unit.sealing import seal, ship_sidecars
from workers.unit.storing import store
from workers.unit.uploading import uploading
from workers.unit.verification import Verifier
from workers.unit.vetting import vet_base


class Unit:
    """One unit in work: its stages, in the order they run.

    `run` is all of them. Where several workers share a pass, one of them has opened its jobs, each merges some pieces,
    and one finishes.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        planned: PlannedBases,
        residents: ResidentBases,
        tracker: Tracker,
        jobs: Sequence[Job],
    ) -> None:
        self.jobs = list(jobs)
        self._pass_key = jobs[0].request.pass_key()  # as the scheduler knows it: before the base has settled it
        self.tracker = tracker
        self._settings = settings
        self._planned = planned
        self._residents = residents
        num_threads, device = settings.num_threads or len(os.sched_getaffinity(0)), resolve_device(settings.device)
        self._context = Context(
            device=device,
            num_threads=num_threads,
            scratch=settings.scratch,
            cache=QuantizedCache(settings.cache / "quantized", device, num_threads),
            tracker=tracker,
        )
        self._verifier = Verifier(self._context, settings.reports)
        self._prepared: BasePlan | None = None
        self._bytes_read = 0
        self._bytes_written = 0
        self._told = Usage()

    @property
    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.running]

    @property
    def _merging(self) -> list[Job]:
        """Those of which something is to be merged."""
        return [job for job in self._running if job.in_work.output.shards]

    @property
    def _base(self) -> BasePlan:
        assert self._prepared is not None
        return self._prepared

    @property
    def _admission(self) -> Admission:
        return Admission(self._context, self._base, self._residents, self._pass_key)

    def run(self) -> None:
        """Take all jobs as far as they go."""
        self.open()
        if self._running:
            with uploading(self.jobs):
                self._merge()
                for job in self._running:
                    with own_failure(job):
                        job.take_over(filter(None, [job.resumed]))
                self._conclude()

    def open(self) -> None:
        """Plan the jobs, open their staging, and take over what dead attempts have finished."""
        self._prepare(lambda job: open_destination(job, self._context.scratch))
        resume_all(self._running, self._context)
        lead(self._merging)
        make_room(self._context.scratch, self._running)
        admit_to_disks(self._running, self._base, self._context.scratch)
        admit_to_uplink(self._running, self._settings.uplink_bytes_per_second)

    def join(self, tickets: Mapping[str, Ticket]) -> None:
        """Plan the jobs, and join their staging by its ticket; one that cannot be joined fails with NotFoundError."""
        self._prepare(lambda job: join_destination(job, tickets[job.id], self._context.scratch))

    def pieces(self) -> tuple[Piece, ...]:
        """Return what the pass falls into, as far as it is left."""
        return pieces_of([job.in_work for job in self._running])

    def merge(self, shards: Collection[str], finished: Mapping[str, Collection[str]]) -> Mapping[str, MergedShards]:
        """Merge, check and ship some shards of all jobs: those of whole pieces.

        Args:
            shards: of the pieces.
            finished: those that are there already, by job.

        Returns:
            What came of it, by job; the others have failed.
        """
        for job in self._running:
            job.part = job.plan.part(set(shards).difference(finished.get(job.id, ())))
            with own_failure(job), file_errors(f"clearing {job.directory}", job.directory):
                for shard in job.part.output.shards:
                    # A worker that died in the middle of it may have left a part.
                    (job.directory / shard.name).unlink(missing_ok=True)
        merged = {}
        with uploading(self.jobs):
            self._merge()
            with self.tracker.timed("upload"):
                for job in self._running:
                    with own_failure(job):
                        merged[job.id] = job.hand_over()
        return merged

    def finish(self, merged: Mapping[str, Sequence[MergedShards]]) -> None:
        """Take over what all workers have merged, and take the jobs as far as they go.

        Args:
            merged: all shards of every job.
        """
        for job in self._running:
            with own_failure(job):
                job.take_over(merged[job.id])
        with uploading(self.jobs):
            self._conclude()

    def usage(self) -> Usage:
        """Return what the unit took since it was last asked."""
        usage = Usage(
            bytes_read=self._bytes_read,
            bytes_written=self._bytes_written,
            bytes_uploaded=sum(sum(job.bytes_put) for job in self.jobs),
            seconds=dict(self.tracker.seconds),
        )
        told, self._told = self._told, usage
        return usage.since(told)

    def _prepare(self, enter: Callable[[Job], None]) -> None:
        """Fetch the base, plan every job on it, and enter its destination."""
        sweep_scratch(self._context.scratch)
        # Several workers share the cores of a machine; threads of theirs that wait for each other would stand still.
        torch.set_num_threads(self._context.num_threads)
        hold_little()
        for job in self.jobs:
            with own_failure(job):
                self._settings.allowance.check(job.request)
        if not self._running:
            return
        first = self.jobs[0].request
        with self.tracker.timed("fetch"):
            source = fetch_base(first.base, self._settings.cache)
        self.tracker.enter("plan", (job.id for job in self.jobs))
        with self.tracker.timed("plan"):
            vet_base(source, first)
            self._prepared = base = self._planned.get(source, first)
            for job in self._running:
                with own_failure(job):
                    self.tracker.check(job.id)
                    inert = self._settings.inert_adapter_fields
                    job.request = job.request.settled(base.usual)
                    adapter = fetch_adapters(job.request, source, self._settings.cache, inert)
                    job.planned = plan_merge(base, job.request, adapter, inert)
                    enter(job)
        self._admission.admit(self._running)
        for job in self._running:
            num_stages = 2 if job.request.parity.level == "arithmetic" else 3
            num_stages += 2 if job.request.compare else 0
            self.tracker.expect(num_stages * job.plan.output.total_size)

    def _merge(self) -> None:
        """Merge and check all jobs, or the part of them that is in work; where that is nothing, nothing is read."""
        if not self._merging:
            return
        jobs = self._merging
        lead(jobs)
        self.tracker.enter("merge", (job.id for job in jobs))
        with self._reading(), numbers_apart(jobs, self._context.scratch) as in_form:
            quantized = self._open_quantized()
            with self._module_weights(quantized) as weights:
                check = ArithmeticCheck(self._base, quantized, self._context.device)
                for wave in waves(jobs):
                    self._write(quantized, weights, wave, check)
                    self._verifier.check(check, weights, [job for job in wave if job.running])
            self._count(*store(self._base, in_form, self._context, check))

    def _open_quantized(self) -> QuantizedBase | None:
        room = self._admission.make_room(self._merging)  # others may have been here since this pass was admitted
        quantized = open_weights(
            self._base,
            self._pass_key,
            self._merging,
            self._residents,
            self._context,
            on_read=functools.partial(self._count, num_written=0),
        )
        if quantized is not None:
            quantized.hold(whole=self._admission.fits(self._merging, room))
        return quantized

    @contextlib.contextmanager
    def _module_weights(self, quantized: QuantizedBase | None) -> Iterator[ModuleWeights | None]:
        ids, plans = [job.id for job in self._merging], [job.in_work for job in self._merging]

        def on_bytes(_: int) -> None:
            self.tracker.check_all(ids)

        with contextlib.ExitStack() as stack:
            with self.tracker.timed("merge"):
                weights = stack.enter_context(
                    module_weights(self._base, quantized, plans, self._context.scratch, on_bytes)
                )
            yield weights

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Use nothing that was read inside, and believe no failure, if the digests stand for other bytes by now."""
        jobs = self._running
        try:
            yield
        except MergefleetError:
            self._base.source.check_unchanged()
            raise
        for job in jobs:
            if not isinstance(job.error, CancelledError):
                with own_failure(job):
                    job.plan.base.source.check_unchanged()
                    job.plan.adapter.check_unchanged()

    def _write(
        self,
        quantized: QuantizedBase | None,
        weights: ModuleWeights | None,
        jobs: Sequence[Job],
        check: ArithmeticCheck,
    ) -> None:
        for job in jobs:
            recorder = ShardRecorder(job, origin_of(job.plan, self._context.device), check.quantization_errors)
            job.witness = None if job.merges_apart else recorder  # nothing of the release is made yet
        with self.tracker.timed("merge"):
            took = run_pass(self._base, quantized, weights, jobs, self._context, check=check)
        self._count(took.of_base + took.of_adapters, took.written)
        # Threads check what they have made. What they compare in the loop that merges counts as the merge's time.
        self.tracker.shift("merge", "arithmetic", check.seconds / self._context.num_threads)

    def _count(self, num_read: int, num_written: int) -> None:
        self._bytes_read += num_read
        self._bytes_written += num_written

    def _conclude(self) -> None:
        with self._reading():
            for job in self._running:
                with own_failure(job):
                    ship_sidecars(job)
            self._verifier.conclude(self._base, self._running)
        with self.tracker.timed("upload"):
            for job in self._running:
                with own_failure(job):
                    seal(job)
