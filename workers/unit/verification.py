"""The verification of merged jobs: both questions of parity, the comparison a request may ask for, and the verdict."""

import functools
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import InternalError, MergefleetError, ParityFailedError
from jobs.parity_report import TensorCheck
from jobs.release import REPORT_NAME
from workers.files.scratch import OwnedDirectory
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.module_checks import check_modules
from workers.merging.checks.tally import TensorChecks
from workers.merging.context import Context
from workers.merging.failures import own_failure, shared_failures
from workers.merging.job import Job
from workers.merging.module_weights import ModuleWeights
from workers.merging.plain_base import write_plain_base
from workers.numerics.tiles import single_threads
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.parity.comparison import compare_ways
from workers.parity.references import dequantized_here
from workers.parity.verdict import judge, summarize, unfounded, write_report, wrong_headers
from workers.unit.checking import check_merged


class Verifier:
    """Verifies the jobs of one unit."""

    def __init__(self, context: Context, reports: Path) -> None:
        self._context = context
        self._tracker = context.tracker
        self._reports = reports

    def check(self, check: ArithmeticCheck, weights: ModuleWeights | None, jobs: Sequence[Job]) -> None:
        """Compare merged shards with what they should be, as far as that was not done while they were written.

        What is found is kept with the jobs.

        Args:
            check: of the pass.
            weights: the base's weights for PEFT, where a plan leaves any to it.
            jobs: running, just merged.
        """
        self._tracker.enter("verify", (job.id for job in jobs))
        errors = check.quantization_errors
        for job in jobs:
            with own_failure(job), self._tracker.timed("arithmetic"):
                self._tracker.check(job.id)
                wrong = wrong_headers(job.written, job.merged_in)
                job.wrong += wrong
                if not wrong:  # a shard that is cut short cannot be read
                    job.checks |= self._check_again(check, job)
                    if job.in_work.by_peft:
                        assert weights is not None
                        modules = self._check_modules(job, weights)
                        job.checks |= modules.tensors
                        job.wrong += modules.wrong
                job.checks = {
                    name: found.model_copy(update={"quantization_error": errors.get(name, found.quantization_error)})
                    for name, found in job.checks.items()
                }
                if job.witness is not None:
                    job.witness.settle()

    def _check_again(self, check: ArithmeticCheck, job: Job) -> dict[str, TensorCheck]:
        """Check what is in files that do not hold the bytes that were checked."""
        touched = {file.name for file in job.files if not file.is_as_it_was(job.merged_in)}
        if job.quantizes_tiles:  # the numbers are gone
            job.wrong += [f"shard {name}: it was written to after it was made" for name in sorted(touched)]
            return {}
        stop = functools.partial(self._tracker.check, job.id)
        num_threads = self._context.num_threads
        return check.files(job.in_work.part(touched), job.merged_in, num_threads=num_threads, stop=stop)

    def _check_modules(self, job: Job, weights: ModuleWeights) -> TensorChecks:
        with single_threads(1, "check") as pool:
            return pool.submit(
                check_modules,
                job.in_work,
                job.merged_in,
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
        with self._tracker.timed("behaviour"), shared_failures(asked):
            self._check_behaviour(base, asked)
        for job in jobs:
            if job.running:
                with own_failure(job):
                    self._tracker.check(job.id)
                    self._judge(job)
        # What is compared has passed and has its report: a comparison decides nothing about the merge.
        comparing = [job for job in jobs if job.request.compare and job.running]
        with self._tracker.timed("compare"), shared_failures(comparing):
            self._compare(comparing)

    def _check_behaviour(self, base: BasePlan, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        scratch = OwnedDirectory.make(self._context.scratch, "behaviour-")
        cancelled = functools.partial(self._tracker.check_all, [job.id for job in jobs])
        directory, beside = base.source.directory, None
        try:
            if base.misread is not None:
                assert base.form is not None
                directory, beside = scratch.path / "base", (dequantized_here(base.form.words),)
                directory.mkdir()
                write_plain_base(base, directory, self._context.device, cancelled)
            found = check_behaviour(
                directory,
                [Subject.of(job, self._context.device) for job in jobs],
                self._context.device,
                scratch.path,
                cancelled=cancelled,
                beside=beside,
            )
        finally:
            scratch.leave()
        self._tracker.advance(sum(job.plan.output.total_size for job in jobs))
        for job in jobs:
            answer = found[job.id]
            if isinstance(answer, MergefleetError):
                job.error = answer
            else:
                job.behaviour = answer

    def _compare(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        self._tracker.enter("compare", (job.id for job in jobs))
        for job, alternative in zip(jobs, compare_ways(jobs, self._context), strict=True):
            with own_failure(job):
                if isinstance(alternative, MergefleetError):
                    raise alternative
                assert job.report is not None
                assert job.report_path is not None
                job.report = job.report.model_copy(update={"alternative": alternative})
                write_report(job.report, job.report_path)

    def _judge(self, job: Job) -> None:
        names = job.plan.checked
        unchecked = [name for name in names if name not in job.checks]
        if unchecked and not job.wrong:
            raise InternalError(f"{len(unchecked)} tensors were not checked, {unchecked[0]} among them")
        tensors = [job.checks[name] for name in names if name in job.checks]
        unloadable, notes = check_merged(job.directory, job.plan.output)
        wrong = [*job.wrong, *unfounded(Evidence(job.plan), job.plan.by_weight(job.checks)), *unloadable]
        job.report = report = judge(job.plan, wrong, tensors, job.behaviour, notes)
        path = self._reports / job.id
        write_report(report, path)
        job.report_path = path
        if not report.passed:
            more = f" (and {len(report.failures) - 1} more)" if len(report.failures) > 1 else ""
            raise ParityFailedError(
                f"parity failed: {report.failures[0]}{more}; nothing was published, the report is "
                f"{job.report_path / REPORT_NAME}"
            )
        job.parity = summarize(report)
