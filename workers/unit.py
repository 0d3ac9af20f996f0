"""One unit of work: requests that share a base, from fetch to staged and ready to be published.

A job that fails fails alone; what the jobs share (the base) fails them all.
"""

import contextlib
import functools
import importlib.metadata
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from jobs.errors import InternalError
from jobs.release import (
    REPORT_NAME,
    REPORT_PAGE_NAME,
    Manifest,
)
from jobs.request import BaseQuantization
from workers.adapters import fetch_adapters
from workers.files import file_errors
from workers.job import Job, own_failure
from workers.memory import give_back_large_blocks
from workers.merge import run_pass
from workers.module_weights import ModuleWeights, module_weights
from workers.outcomes import Usage, WorkerSettings
from workers.passes import PassJob
from workers.plan import BasePlan, plan_base, plan_merge
from workers.progress import Tracker
from workers.quantized_base import QuantizedBase, QuantizedCache, ResidentBases
from workers.released import encode_manifest
from workers.scratch import sweep
from workers.sidecars import digest_file, write_sidecars
from workers.sinks import open_sink
from workers.sources import fetch_base
from workers.verification import Verifier

logger = logging.getLogger(__name__)

_NUM_UPLOADS = 2
"""Files shipped at the same time by one worker."""


class Unit:
    """One unit in work: its stages, in the order they run."""

    def __init__(
        self, settings: WorkerSettings, residents: ResidentBases, tracker: Tracker, jobs: Sequence[Job]
    ) -> None:
        self._settings = settings
        self._residents = residents
        self._tracker = tracker
        self._jobs = jobs
        self._num_threads = settings.num_threads or len(os.sched_getaffinity(0))
        self._device = resolve_device(settings.device)
        self._quantized_cache = QuantizedCache(settings.cache / "quantized", self._device, self._num_threads)
        self._verifier = Verifier(settings, tracker, self._quantized_cache, self._device, self._num_threads)
        self._bytes_read = 0
        self._bytes_written = 0

    @property
    def _running(self) -> list[Job]:
        return [job for job in self._jobs if job.running]

    def run(self) -> None:
        """Take all jobs as far as they go."""
        sweep(self._settings.scratch)
        # Several workers share the cores of a machine; threads of theirs that wait for each other would stand still.
        torch.set_num_threads(self._num_threads)
        give_back_large_blocks()
        base = self._prepare()
        if not self._running:
            return
        quantized = self._open_quantized(base)
        with ThreadPoolExecutor(_NUM_UPLOADS, thread_name_prefix="upload") as uploads:
            try:
                with self._module_weights(base, quantized) as weights:
                    self._merge(base, quantized, weights, uploads)
                    self._verifier.verify(base, quantized, weights, self._running)
                with self._tracker.timed("upload"):
                    for job in self._running:
                        with own_failure(job):
                            self._seal(job, uploads)
            finally:
                # What is not sealed is dropped: nobody waits for its uploads.
                for job in self._jobs:
                    if job.manifest is None:
                        for _, upload in job.shipped:
                            upload.cancel()

    def usage(self) -> Usage:
        """Return what the unit took."""
        uploaded = sum(
            artifact.num_bytes
            for job in self._jobs
            for artifact, upload in job.shipped
            if upload.done() and not upload.cancelled() and upload.exception() is None
        )
        return Usage(
            bytes_read=self._bytes_read,
            bytes_written=self._bytes_written,
            bytes_uploaded=uploaded,
            seconds=self._tracker.seconds,
        )

    def _prepare(self) -> BasePlan:
        first = self._jobs[0].request
        with self._tracker.timed("fetch"):
            source = fetch_base(first.base, self._settings.cache)
        self._tracker.enter("plan", (job.id for job in self._jobs))
        with self._tracker.timed("plan"):
            base = plan_base(source, first)
            for job in self._jobs:
                with own_failure(job):
                    self._tracker.check(job.id)
                    adapter = fetch_adapters(job.request, source, self._settings.cache)
                    job.planned = plan_merge(base, job.request, adapter)
                    self._open_sink(job)
        for job in self._running:
            num_stages = 2 if job.request.parity.level == "arithmetic" else 3
            num_stages += 2 if job.request.compare else 0
            self._tracker.expect(num_stages * job.plan.output.total_size)
        return base

    def _open_sink(self, job: Job) -> None:
        sink = open_sink(job.request.destination, self._settings.scratch)
        existing = sink.existing()
        if existing is not None:
            job.release = encode_manifest(existing).settle(job.request.destination, job.plan.merge_key)
        else:
            job.opened = sink.open(job.plan.merge_key)

    def _open_quantized(self, base: BasePlan) -> QuantizedBase | None:
        if base.stored_in_4bit:
            return QuantizedBase(base.source.directory, base.layout, self._device, base.transposed)
        task = base.quantization
        if task is None:
            return None
        ids = [job.id for job in self._running]
        self._tracker.enter("quantize", ids)
        lock = threading.Lock()

        def on_bytes(num_bytes: int) -> None:
            self._tracker.check_all(ids)
            with lock:
                self._bytes_read += num_bytes

        with self._tracker.timed("quantize"):
            key = self._jobs[0].request.pass_key()
            load = functools.partial(self._quantized_cache.open, task, on_bytes)
            return self._residents.get(key, task.key(self._device), load)

    @contextlib.contextmanager
    def _module_weights(self, base: BasePlan, quantized: QuantizedBase | None) -> Iterator[ModuleWeights | None]:
        ids = [job.id for job in self._running]
        plans = [job.plan for job in self._running]

        def on_bytes(_: int) -> None:
            self._tracker.check_all(ids)

        with contextlib.ExitStack() as stack:
            with self._tracker.timed("merge"):
                weights = stack.enter_context(module_weights(base, quantized, plans, self._settings.scratch, on_bytes))
            yield weights

    def _merge(
        self,
        base: BasePlan,
        quantized: QuantizedBase | None,
        weights: ModuleWeights | None,
        uploads: ThreadPoolExecutor,
    ) -> None:
        self._tracker.enter("merge", (job.id for job in self._running))
        pass_jobs = [
            PassJob(
                plan=job.plan,
                directory=job.staging.directory,
                on_file=functools.partial(job.ship, uploads),
                check=functools.partial(self._tracker.check, job.id),
            )
            for job in self._running
        ]
        with self._tracker.timed("merge"):
            result = run_pass(
                base,
                quantized,
                weights,
                pass_jobs,
                device=self._device,
                num_threads=self._num_threads,
                on_bytes=self._tracker.advance,
            )
        self._bytes_read += result.num_base_bytes_read + result.num_adapter_bytes_read
        self._bytes_written += result.num_bytes_written
        for job in self._running:
            job.error = result.errors.get(job.id)
            with own_failure(job):
                if job.error is None:
                    for artifact in write_sidecars(job.plan, job.staging.directory):
                        job.ship(uploads, artifact)

    def _seal(self, job: Job, uploads: ThreadPoolExecutor) -> None:
        assert job.parity is not None
        assert job.report_path is not None
        plan, directory = job.plan, job.staging.directory
        for name in (REPORT_NAME, REPORT_PAGE_NAME):
            with file_errors(f"copying the parity report to {directory}"):
                shutil.copyfile(job.report_path / name, directory / name)
            job.ship(uploads, digest_file(directory, name))
        for _, upload in job.shipped:
            upload.result()
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
            files=tuple(sorted((artifact for artifact, _ in job.shipped), key=lambda artifact: artifact.path)),
            versions=library_versions(),
        )


def resolve_device(name: str) -> torch.device:
    """Return the device for `cpu`, `cuda` or `auto`.

    Raises:
        InternalError: CUDA was asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InternalError("device is 'cuda', but this process sees no CUDA device; set device to 'cpu' or 'auto'")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bytes of a merge."""
    names = ("mergefleet", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "numba")
    return {name: importlib.metadata.version(name) for name in names}
