"""Records of finished shards, made as a pass goes on: after a shard is shipped, and all of it is checked and right."""

import logging
import os
import threading
from collections.abc import Mapping

from jobs.errors import MergefleetError
from jobs.parity_report import TensorCheck
from jobs.release import Artifact
from workers.files.local import file_errors
from workers.merging.checks.judgement import failures
from workers.merging.job import Job
from workers.releases.records import ShardRecord

logger = logging.getLogger(__name__)


class ShardRecorder:
    """What is put and checked of one job's shards in one pass. Threads that merge and threads that ship tell it."""

    def __init__(self, job: Job, origin: str, quantization_errors: Mapping[str, float]) -> None:
        """Start with nothing put.

        Args:
            job: in work.
            origin: as `workers.merging.made_with.origin_of` tells it.
            quantization_errors: what 4 bits changed of W, by tensor.
        """
        self._job = job
        self._origin = origin
        self._errors = quantization_errors
        self._layouts = {shard.name: shard for shard in job.in_work.output.shards}
        self._unchecked = {name: {spec.name for spec in shard.tensors} for name, shard in self._layouts.items()}
        self._checks: dict[str, dict[str, TensorCheck]] = {name: {} for name in self._unchecked}
        self._put: dict[str, Artifact] = {}
        self._lock = threading.Lock()

    def put(self, artifact: Artifact) -> None:
        """Take in that a file was put; called by a thread that ships."""
        with self._lock:
            if artifact.path not in self._unchecked:
                return
            self._put[artifact.path] = artifact
            is_due = not self._unchecked[artifact.path]
        if is_due:
            self._record(artifact)

    def checked(self, check: TensorCheck) -> None:
        """Take in what the check of a tensor found; called by a thread that has other work to do."""
        shard, _ = self._job.in_work.output.tensors[check.tensor]
        with self._lock:
            if check.tensor not in self._unchecked[shard.name]:
                return
            self._unchecked[shard.name].remove(check.tensor)
            self._checks[shard.name][check.tensor] = check
            is_due = not self._unchecked[shard.name] and shard.name in self._put
        if is_due:
            assert self._job.carriers is not None
            self._job.recordings.append(self._job.carriers.submit(self._record, self._put[shard.name]))

    def settle(self) -> None:
        """Take in what was found after the pass, of what PEFT merged."""
        if not self._job.wrong:
            for check in self._job.checks.values():
                self.checked(check)

    def _has_header(self, name: str) -> bool:
        """Whether a file has the header and the size that were planned; its tensors are checked elsewhere."""
        path, layout = self._job.directory / name, self._layouts[name]
        with file_errors(f"reading {path}", path), path.open("rb", buffering=0) as file:
            header = file.read(len(layout.header))
            return header == layout.header and os.fstat(file.fileno()).st_size == layout.num_bytes

    def _record(self, artifact: Artifact) -> None:
        """Leave a record; without one the shard is merged anew, should this attempt die."""
        job, plan = self._job, self._job.plan
        checks = tuple(
            check.model_copy(update={"quantization_error": self._errors.get(name, check.quantization_error)})
            for name, check in self._checks[artifact.path].items()
        )
        if not job.running or failures(checks, job.request.parity.thresholds.max_rounding_excess):
            return
        try:
            if not self._has_header(artifact.path):
                return
            # The digests in the merge key describe the bytes that were merged only if no file was written to since.
            plan.base.source.check_unchanged()
            plan.adapter.check_unchanged()
            record = ShardRecord(
                merge_key=plan.merge_key,
                origin=self._origin,
                artifact=artifact,
                checks=checks,
                kept=tuple(each for each in plan.kept_weights if plan.shard_of(each.weight) == artifact.path),
            )
            job.staging.records.keep(record)
        except MergefleetError:
            logger.warning(
                "a finished shard has no record", extra={"job": job.id, "shard": artifact.path}, exc_info=True
            )
