"""The verification of merged jobs: both questions of parity, the comparison a request may ask for, and the verdict."""

import functools
from collections.abc import Mapping, Sequence

import torch

from jobs.errors import InternalError, MergefleetError, ParityFailedError
from jobs.parity_report import BehaviourCheck, ParityReport, TensorCheck
from jobs.release import REPORT_NAME
from workers.bases.quantized_cache import QuantizedCache
from workers.files.scratch import OwnedDirectory
from workers.files.shard import HashedFile
from workers.merging.arithmetic import ArithmeticCheck
from workers.merging.base_plan import BasePlan
from workers.merging.evidence import Evidence
from workers.merging.merge import PassResult
from workers.merging.module_checks import ModuleChecks, check_modules
from workers.merging.module_weights import ModuleWeights
from workers.merging.outcomes import WorkerSettings
from workers.merging.plan import MergePlan
from workers.numerics.tiles import single_threads
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.parity.comparison import compare_ways
from workers.parity.verdict import judge, summarize, unfounded, write_report, wrong_headers
from workers.unit.job import Job, own_failure, shared_failures
from workers.unit.progress import Tracker


class Verifier:
    """Verifies the jobs of one unit."""

    def __init__(
        self,
        settings: WorkerSettings,
        tracker: Tracker,
        quantized_cache: QuantizedCache,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self._settings = settings
        self._tracker = tracker
        self._quantized_cache = quantized_cache
        self._device = device
        self._num_threads = num_threads

    def check(
        self,
        check: ArithmeticCheck,
        weights: ModuleWeights | None,
        merged: Sequence[tuple[Job, MergePlan]],
        result: PassResult,
    ) -> None:
        """Compare merged shards with what they should be, as far as that was not done while they were written.

        What is found is kept with the jobs.

        Args:
            check: of the pass.
            weights: the base's weights for PEFT, where a plan leaves any to it.
            merged: running jobs, and plans of all their shards or of some.
            result: of the pass.
        """
        self._tracker.enter("verify", (job.id for job, _ in merged))
        for job, plan in merged:
            with own_failure(job), self._tracker.timed("arithmetic"):
                self._tracker.check(job.id)
                directory = job.staging.directory
                wrong = wrong_headers(plan, directory)
                job.wrong += wrong
                checks = {found.tensor: found for found in result.checks[job.id]}
                if not wrong:  # a shard that is cut short cannot be read
                    checks |= self._check_again(check, job, plan, result.files[job.id])
                    if plan.by_peft:
                        assert weights is not None
                        modules = self._check_modules(job, plan, weights)
                        checks |= modules.tensors
                        job.wrong += modules.wrong
                job.checks |= {
                    name: found.model_copy(update={"quantization_error": check.quantization_errors.get(name)})
                    for name, found in checks.items()
                }

    def _check_again(
        self, check: ArithmeticCheck, job: Job, plan: MergePlan, files: Sequence[HashedFile]
    ) -> dict[str, TensorCheck]:
        """Check what is in files that may have been written to since their bytes were checked."""
        directory = job.staging.directory
        touched = {file.artifact.path for file in files if not file.is_as_it_was(directory)}
        stop = functools.partial(self._tracker.check, job.id)
        return check.files(plan.part(touched), directory, num_threads=self._num_threads, stop=stop)

    def _check_modules(self, job: Job, plan: MergePlan, weights: ModuleWeights) -> ModuleChecks:
        with single_threads(1, "check") as pool:
            return pool.submit(
                check_modules,
                plan,
                job.staging.directory,
                weights,
                evidence=Evidence(job.plan),
                stop=functools.partial(self._tracker.check, job.id),
                on_bytes=self._tracker.advance,
            ).result()

    def conclude(self, base: BasePlan, jobs: Sequence[Job]) -> None:
        """Ask what is left to ask of whole checkpoints; each gets its report, and its parity or its error.

        Args:
            base: the planned base.
            jobs: running, all their shards checked, their sidecars written.
        """
        self._tracker.enter("verify", (job.id for job in jobs))
        asked = [job for job in jobs if job.request.parity.level == "full" and not job.wrong]
        behaviour: dict[str, tuple[BehaviourCheck, ...]] = {}
        with self._tracker.timed("behaviour"), shared_failures(asked):
            behaviour = self._check_behaviour(base, asked)
        reports: dict[str, ParityReport] = {}
        for job in jobs:
            if job.running:
                with own_failure(job):
                    self._tracker.check(job.id)
                    reports[job.id] = self._judge(job, behaviour.get(job.id, ()))
        # What is compared has passed and has its report: a comparison decides nothing about the merge.
        comparing = [job for job in jobs if job.request.compare and job.running]
        with self._tracker.timed("compare"), shared_failures(comparing):
            self._compare(comparing, reports)

    def _check_behaviour(self, base: BasePlan, jobs: Sequence[Job]) -> dict[str, tuple[BehaviourCheck, ...]]:
        check = functools.partial(self._tracker.check_all, [job.id for job in jobs])
        subjects = [
            Subject(
                request=job.request,
                merged=job.staging.directory,
                adapter=job.plan.opened,
                streamed=not (job.plan.by_peft or job.plan.opened.deltas),
            )
            for job in jobs
        ]
        if not subjects:
            return {}
        scratch = OwnedDirectory.make(self._settings.scratch, "behaviour-")
        try:
            found = check_behaviour(base.source.directory, subjects, self._device, scratch.path, cancelled=check)
        finally:
            scratch.leave()
        self._tracker.advance(sum(job.plan.output.total_size for job in jobs))
        checks: dict[str, tuple[BehaviourCheck, ...]] = {}
        for job in jobs:
            answer = found[job.id]
            if isinstance(answer, MergefleetError):
                job.error = answer
            else:
                checks[job.id] = answer
        return checks

    def _compare(self, jobs: Sequence[Job], reports: Mapping[str, ParityReport]) -> None:
        if not jobs:
            return
        self._tracker.enter("compare", (job.id for job in jobs))
        found = compare_ways(
            [job.plan for job in jobs],
            cache=self._quantized_cache,
            scratch=self._settings.scratch,
            device=self._device,
            num_threads=self._num_threads,
            on_bytes=self._tracker.advance,
            cancelled=functools.partial(self._tracker.check_all, [job.id for job in jobs]),
        )
        for job in jobs:
            with own_failure(job):
                alternative = found[job.id]
                if isinstance(alternative, MergefleetError):
                    raise alternative
                assert job.report_path is not None
                report = reports[job.id].model_copy(update={"alternative": alternative})
                write_report(report, job.report_path)

    def _judge(self, job: Job, behaviour: tuple[BehaviourCheck, ...]) -> ParityReport:
        names = [tensor.name for tensor in job.plan.tensors]
        unchecked = [name for name in names if name not in job.checks]
        if unchecked and not job.wrong:
            raise InternalError(f"{len(unchecked)} tensors were not checked, {unchecked[0]} among them")
        tensors = [job.checks[name] for name in names if name in job.checks]
        wrong = [*job.wrong, *unfounded(Evidence(job.plan), job.checks)]
        report = judge(job.plan, wrong, tensors, behaviour)
        path = self._settings.reports / job.id
        write_report(report, path)
        job.report_path = path
        job.notes = report.notes
        if not report.passed:
            more = f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else ""
            raise ParityFailedError(
                f"parity failed: {report.failures[0]}{more}; nothing was published, the report is "
                f"{job.report_path / REPORT_NAME}"
            )
        job.parity = summarize(report)
        return report
