"""One unit of work: requests that share a base, from fetch to staged and ready to be published; whole or in parts.

A job that fails fails alone; what the jobs share (the base) fails them all.
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from jobs.errors import (
    CancelledError,
    DestinationOccupiedError,
    DeviceLostError,
    MergefleetError,
    NotFoundError,
    OutOfMemoryError,
)
from jobs.locations import LocalPath, Location
from jobs.release import REPORT_NAME, REPORT_PAGE_NAME, Manifest
from jobs.request import BaseQuantization
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantized_cache import QuantizedCache
from workers.bases.resident_bases import ResidentBases
from workers.files.local import file_errors
from workers.files.memory import available_device_bytes, available_host_bytes, give_back, hold_little
from workers.files.scratch import sweep
from workers.merging.arithmetic import ArithmeticCheck
from workers.merging.base_plan import BasePlan, PlannedBases
from workers.merging.card import write_card
from workers.merging.made_with import made_with
from workers.merging.merge import PassResult, run_pass
from workers.merging.module_weights import ModuleWeights, module_weights
from workers.merging.outcomes import MergedShards, Piece, Usage, WorkerSettings
from workers.merging.passes import PassJob
from workers.merging.pieces import pieces_of
from workers.merging.plan import MergePlan, plan_merge
from workers.merging.sidecars import digest_file, write_sidecars
from workers.releases.released import encode_manifest
from workers.releases.sinks import Ticket, open_sink
from workers.sources.fetch import Source, fetch_base
from workers.unit.footprint import device_bytes, pass_bytes, passing_bytes, resident_bytes
from workers.unit.job import Job, own_failure
from workers.unit.progress import Tracker
from workers.unit.request_adapters import fetch_adapters
from workers.unit.verification import Verifier
from workers.unit.vetting import vet_base, vet_planned_prompts

logger = logging.getLogger(__name__)

_NUM_UPLOADS = 2
"""Files shipped at the same time by one worker."""


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
        self.tracker = tracker
        self._settings = settings
        self._planned = planned
        self._residents = residents
        self._num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        self._device = resolve_device(settings.device)
        self._quantized_cache = QuantizedCache(settings.cache / "quantized", self._device, self._num_threads)
        self._verifier = Verifier(settings, tracker, self._quantized_cache, self._device, self._num_threads)
        self._prepared: BasePlan | None = None
        self._bytes_read = 0
        self._bytes_written = 0
        self._told = Usage()

    @property
    def _running(self) -> list[Job]:
        return [job for job in self.jobs if job.running]

    @property
    def _base(self) -> BasePlan:
        assert self._prepared is not None
        return self._prepared

    def run(self) -> None:
        """Take all jobs as far as they go."""
        self.open()
        if not self._running:
            return
        with self._uploading() as uploads:
            self._merge({job.id: job.plan for job in self._running}, uploads)
            self._conclude(uploads)

    def open(self) -> None:
        """Plan the jobs, and open their staging."""
        self._prepare(self._open_sink)

    def join(self, tickets: Mapping[str, Ticket]) -> None:
        """Plan the jobs, and join their staging.

        Args:
            tickets: by job.

        A job whose staging cannot be joined from here fails with NotFoundError.
        """
        self._prepare(lambda job: self._join_sink(job, tickets[job.id]))

    def pieces(self) -> tuple[Piece, ...]:
        """Return what the pass falls into."""
        return pieces_of([job.plan for job in self._running])

    def merge(self, shards: Collection[str]) -> Mapping[str, MergedShards]:
        """Merge, check and ship some shards of all jobs: those of whole pieces.

        Returns:
            What came of it, by job; the others have failed.
        """
        parts = {job.id: job.plan.part(shards) for job in self._running}
        for job in self._running:
            with own_failure(job), file_errors(f"clearing {job.staging.directory}"):
                for shard in parts[job.id].output.shards:
                    # A worker that died in the middle of it may have left a part.
                    (job.staging.directory / shard.name).unlink(missing_ok=True)
        merged = {}
        with self._uploading() as uploads:
            self._merge(parts, uploads)
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
        with self._uploading() as uploads:
            self._conclude(uploads)

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

    @contextlib.contextmanager
    def _uploading(self) -> Iterator[ThreadPoolExecutor]:
        with ThreadPoolExecutor(_NUM_UPLOADS, thread_name_prefix="upload") as uploads:
            try:
                yield uploads
            except BaseException:
                for job in self.jobs:
                    job.cancel_uploads()
                raise
            # Nobody waits for the uploads of a job that failed.
            for job in self.jobs:
                if not job.running:
                    job.cancel_uploads()

    def _prepare(self, enter: Callable[[Job], None]) -> None:
        sweep(self._settings.scratch)
        # Several workers share the cores of a machine; threads of theirs that wait for each other would stand still.
        torch.set_num_threads(self._num_threads)
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
                    adapter = fetch_adapters(job.request, source, self._settings.cache, inert)
                    job.planned = plan_merge(base, job.request, adapter, inert)
                    enter(job)
        self._admit()
        for job in self._running:
            num_stages = 2 if job.request.parity.level == "arithmetic" else 3
            num_stages += 2 if job.request.compare else 0
            self.tracker.expect(num_stages * job.plan.output.total_size)

    def _admit(self) -> None:
        """Refuse jobs, the last ones first, until the pass fits into the memory that is free."""
        free = available_host_bytes()
        free_on_device = self._make_room_on_device()
        on_device = resident_bytes(self._base)
        if self._running and not self._fits(self._running[:1], free_on_device):
            on_device = passing_bytes(self._base, self._num_threads)
        admitted: list[MergePlan] = []
        for job in self._running:
            with own_failure(job):
                plans = [*admitted, job.plan]
                takes = {"memory": (pass_bytes(plans, self._num_threads, self._device.type), free)}
                if free_on_device is not None:
                    needed = on_device + device_bytes(plans, self._num_threads)
                    takes["GPU memory"] = needed, free_on_device
                for what, (needed, available) in takes.items():
                    if needed > available:
                        beside = f" beside {len(admitted)} others" if admitted else ""
                        raise OutOfMemoryError(
                            f"merging {job.request.adapter}{beside} takes {needed / 1e6:.0f} MB of {what}, and "
                            f"{available / 1e6:.0f} MB are free; lower max_jobs_per_pass or num_threads, run fewer "
                            "workers on this machine, or wait until others have ended"
                        )
                admitted.append(job.plan)

    def _fits(self, jobs: Sequence[Job], room: int | None) -> bool:
        """Whether the GPU has room for the whole base in 4-bit beside some jobs; what it has not comes tile by tile."""
        if room is None:
            return True
        return resident_bytes(self._base) + device_bytes([job.plan for job in jobs], self._num_threads) <= room

    def _make_room_on_device(self) -> int | None:
        """Let go of bases that other passes left on the GPU, if they have to.

        They stay where this pass's own would not fit beside it even without them.

        Returns:
            Bytes of the GPU that this pass may take, the base it holds included; None on the CPU.
        """
        if self._device.type == "cpu" or not self._running:
            return None
        key = self.jobs[0].request.pass_key()
        held = self._residents.num_device_bytes(key)
        free = available_device_bytes(self._device) + held
        beside = self._residents.num_device_bytes_beside(key)
        base = self._base
        on_device = resident_bytes(base)
        if not self._fits(self._running[:1], free + beside):
            on_device = passing_bytes(base, self._num_threads)
        wanted = on_device + device_bytes([job.plan for job in self._running], self._num_threads)
        self._residents.make_room(key, wanted - free)
        return available_device_bytes(self._device) + held

    def _open_sink(self, job: Job) -> None:
        _check_outside(job.request.destination, (self._base.source, job.plan.adapter, *job.plan.adapter.parts))
        sink = open_sink(job.request.destination, self._settings.scratch)
        existing = sink.existing()
        if existing is not None:
            job.release = encode_manifest(existing).settle(job.request.destination, job.plan.merge_key)
        else:
            if job.request.parity.level == "full" or job.request.compare:
                vet_planned_prompts(job.plan, self._settings.scratch)
            job.opened = sink.open(job.plan.merge_key)

    def _join_sink(self, job: Job, ticket: Ticket) -> None:
        if job.plan.merge_key != ticket.merge_key:
            raise NotFoundError(f"{job.request.base} or {job.request.adapter} is another one here")
        job.opened = open_sink(job.request.destination, self._settings.scratch).join(ticket)
        # Behaviour is that of a whole checkpoint: the worker that asks must see all files.
        whole = job.request.parity.level == "full" or job.request.compare
        if job.opened is None or (whole and job.opened.directory != ticket.directory):
            raise NotFoundError(f"{ticket.directory}, which the merge is written to, is not to be seen from here")

    def _open_quantized(self, plans: Collection[MergePlan]) -> QuantizedBase | None:
        # Other passes may have been here since this one was admitted.
        room = self._make_room_on_device()
        quantized = self._open_mapped(plans)
        if quantized is not None:
            quantized.hold(whole=self._fits(self._running, room))
        return quantized

    def _open_mapped(self, plans: Collection[MergePlan]) -> QuantizedBase | None:
        base = self._base
        if base.stored_in_4bit:
            return QuantizedBase.stored(base.source.directory, base.layout, self._device, base.transposed)
        task = base.quantization
        if task is None:
            return None
        ids = [job.id for job in self._running]
        self.tracker.enter("quantize", ids)
        lock = threading.Lock()

        def on_bytes(num_bytes: int) -> None:
            self.tracker.check_all(ids)
            with lock:
                self._bytes_read += num_bytes

        with self.tracker.timed("quantize"):
            key = self.jobs[0].request.pass_key()
            load = functools.partial(self._quantized_cache.empty, task)
            quantized = self._residents.get(key, task.key(self._device), load)
            wanted = frozenset[str]().union(*(plan.base_names for plan in plans))
            self._quantized_cache.prepare(quantized, task, wanted, on_bytes)
            give_back()
            return quantized

    @contextlib.contextmanager
    def _module_weights(
        self, quantized: QuantizedBase | None, plans: Collection[MergePlan]
    ) -> Iterator[ModuleWeights | None]:
        ids = [job.id for job in self._running]

        def on_bytes(_: int) -> None:
            self.tracker.check_all(ids)

        with contextlib.ExitStack() as stack:
            with self.tracker.timed("merge"):
                weights = stack.enter_context(
                    module_weights(self._base, quantized, plans, self._settings.scratch, on_bytes)
                )
            yield weights

    def _merge(self, plans: Mapping[str, MergePlan], uploads: ThreadPoolExecutor) -> None:
        """Merge and check what some plans say: those of the jobs, or parts of them."""
        with self._reading():
            quantized = self._open_quantized(plans.values())
            with self._module_weights(quantized, plans.values()) as weights:
                check = ArithmeticCheck(self._base, quantized, self._device)
                result = self._write(plans, quantized, weights, check, uploads)
                self._verifier.check(check, weights, [(job, plans[job.id]) for job in self._running], result)

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
        plans: Mapping[str, MergePlan],
        quantized: QuantizedBase | None,
        weights: ModuleWeights | None,
        check: ArithmeticCheck,
        uploads: ThreadPoolExecutor,
    ) -> PassResult:
        self.tracker.enter("merge", (job.id for job in self._running))
        pass_jobs = [
            PassJob(
                plan=plans[job.id],
                directory=job.staging.directory,
                on_file=functools.partial(job.ship, uploads),
                direct=job.staging.in_place and not _reads_again(plans[job.id]),
                check=functools.partial(self.tracker.check, job.id),
            )
            for job in self._running
        ]
        with self.tracker.timed("merge"):
            result = run_pass(
                self._base,
                quantized,
                weights,
                pass_jobs,
                check=check,
                device=self._device,
                num_threads=self._num_threads,
                on_bytes=self.tracker.advance,
            )
        self._bytes_read += result.num_base_bytes_read + result.num_adapter_bytes_read
        self._bytes_written += result.num_bytes_written
        for job in self._running:
            job.error = result.errors.get(job.id)
        # Threads check what they have made. What they compare in the loop that merges counts as the merge's time.
        self.tracker.shift("merge", "arithmetic", check.seconds / self._num_threads)
        return result

    def _conclude(self, uploads: ThreadPoolExecutor) -> None:
        with self._reading():
            for job in self._running:
                with own_failure(job):
                    num_changed = sum(check.changed for check in job.checks.values())
                    card = write_card(job.plan, job.staging.directory, num_changed=num_changed)
                    for artifact in (*write_sidecars(job.plan, job.staging.directory), card):
                        job.ship(uploads, artifact)
            self._verifier.conclude(self._base, self._running)
        with self.tracker.timed("upload"):
            for job in self._running:
                with own_failure(job):
                    self._seal(job, uploads)

    def _seal(self, job: Job, uploads: ThreadPoolExecutor) -> None:
        assert job.parity is not None
        assert job.report_path is not None
        plan, directory = job.plan, job.staging.directory
        for name in (REPORT_NAME, REPORT_PAGE_NAME):
            with file_errors(f"copying the parity report to {directory}"):
                shutil.copyfile(job.report_path / name, directory / name)
            job.ship(uploads, digest_file(directory, name))
        artifacts = job.all_put()
        quantized = job.request.base_quantization is not BaseQuantization.NONE
        job.manifest = Manifest(
            merge_key=plan.merge_key,
            request_id=job.id,
            base=plan.base.source.location,
            base_digest=plan.base.source.digest,
            adapter=None if plan.combined else plan.adapter.location,
            adapters=plan.combined,
            combination=job.request.combination,
            adapter_digest=plan.adapter.digest,
            base_quantization=job.request.base_quantization,
            quantization_options=job.request.quantization_options if quantized else None,
            dtype=job.request.dtype,
            parity=job.parity,
            notes=job.notes,
            files=artifacts,
            versions=library_versions(),
            made_with=made_with(plan.opened.method),
        )


def _check_outside(destination: Location, sources: Iterable[Source]) -> None:
    """Check that a directory lies outside of what is merged, wherever links lead to.

    Raises:
        DestinationOccupiedError: names the place that it lies in.
    """
    if not isinstance(destination, LocalPath):
        return
    real = os.path.realpath(destination.path)
    for source in sources:
        places = {source.directory} | ({source.location.path} if isinstance(source.location, LocalPath) else set())
        for place in places:
            if LocalPath(Path(real)).is_inside(LocalPath(Path(os.path.realpath(place)))):
                raise DestinationOccupiedError(
                    f"{destination} lies, through links, inside of {source.location}, which is merged here and never "
                    "written to; choose another destination"
                )


def _reads_again(plan: MergePlan) -> bool:
    """Whether a check reads the merged files: that of what PEFT merged, and those that run them."""
    return bool(plan.by_peft) or plan.request.parity.level == "full" or plan.request.compare


def resolve_device(name: str) -> torch.device:
    """Return the device for `cpu`, `cuda` or `auto`.

    Raises:
        DeviceLostError: CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise DeviceLostError("device is 'cuda', but this process sees no CUDA device; set device to 'cpu' or 'auto'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes of a merge."""
    names = ("mergefleet", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numba")
    return {name: importlib.metadata.version(name) for name in names}
