"""One job on its way through a unit: the one record of it, from planning to outcome."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from jobs.errors import MergefleetError, TransientIOError
from jobs.kept import KeptWeight
from jobs.parity_report import BehaviourCheck, ParityReport, ParitySummary, TensorCheck
from jobs.release import Artifact, Manifest, Release
from jobs.request import MergeRequest
from workers.files.layout import CheckpointLayout
from workers.files.local import FileState
from workers.files.scratch import OwnedDirectory
from workers.files.shard import WrittenFile
from workers.merging.outcomes import Failure, JobOutcome, MergedShards
from workers.merging.plan import MergePlan
from workers.merging.wider import keeping
from workers.releases.sinks import Receipt, Staging
from workers.releases.trails import Trail

logger = logging.getLogger(__name__)


class Witness(Protocol):
    """Is told what becomes of a job's files and tensors in a pass, by the threads that do it."""

    def put(self, artifact: Artifact) -> None:
        """Take in that a file was put."""
        ...

    def checked(self, check: TensorCheck) -> None:
        """Take in what the check of a tensor on its way into a file found."""
        ...

    def settle(self) -> None:
        """Take in what was found after the pass."""
        ...


@dataclass
class Job:
    """A job on its way through a unit."""

    request: MergeRequest
    planned: MergePlan | None = None
    part: MergePlan | None = None
    """What of the plan is merged here, where several workers share it or some of it is there; None for all of it."""
    resumed: MergedShards | None = None
    """What a dead attempt at its release has finished."""
    trail: Trail | None = None
    """Leads to its staging, should this process die or leave something."""
    opened: Staging | None = None
    compared_in: Path | None = None
    """Directory of a merge that is made to be compared: it has no staging, and ships nowhere."""
    apart: OwnedDirectory | None = None
    """Where merged numbers wait until they are stored in a form."""
    leader: "Job | None" = None
    """Who merges the same numbers for it."""
    leads: bool = False
    """Whether others read the numbers that it writes."""
    carriers: ThreadPoolExecutor | None = None
    """What ships its files, while there is something to ship."""
    witness: Witness | None = None
    """Of the pass it is in."""
    files: tuple[WrittenFile, ...] = ()
    """What the last pass wrote."""
    uploads: list[Future[Receipt]] = field(default_factory=list)
    """Of its finished files; several threads append."""
    recordings: list[Future[None]] = field(default_factory=list)
    """Of its finished files; several threads append."""
    bytes_put: list[int] = field(default_factory=list)
    """Of each file that has been put; several threads append."""
    receipts: list[Receipt] = field(default_factory=list)
    """Of files that were put by others, or before."""
    checks: dict[str, TensorCheck] = field(default_factory=dict)
    """The arithmetic check, by tensor."""
    wrong: list[str] = field(default_factory=list)
    """What is wrong about its shards as files, or about what was read of its adapter, a sentence each."""
    store_failed: bool = False
    """Whether the place it is shipped to did not answer, or failed."""
    error: MergefleetError | None = None
    release: Release | None = None
    behaviour: tuple[BehaviourCheck, ...] = ()
    """The behavioural check, where it was asked for: the one that gates, then the one for information."""
    report: ParityReport | None = None
    report_path: Path | None = None
    """Directory of the report."""
    parity: ParitySummary | None = None
    """What the report comes to, once it has passed."""
    manifest: Manifest | None = None

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def plan(self) -> MergePlan:
        """The plan; every running job has one once the unit is prepared."""
        assert self.planned is not None
        return self.planned

    @property
    def staging(self) -> Staging:
        """Where its release is on its way; every running job has one once the unit is prepared."""
        assert self.opened is not None
        return self.opened

    @property
    def in_work(self) -> MergePlan:
        """What the pass merges: the plan, or a part of it."""
        return self.part or self.plan

    @property
    def directory(self) -> Path:
        """Where the shards of its release are written."""
        return self.compared_in or self.staging.directory

    @property
    def merged_in(self) -> Path:
        """Where merged numbers are written: among the shards of the release, or apart; or where its leader's are."""
        if self.leader is not None and not self.quantizes_tiles:
            return self.leader.merged_in
        return self.apart.path if self.apart is not None else self.directory

    @property
    def quantizes_tiles(self) -> bool:
        """Whether its weights are quantized as they are merged, tile by tile."""
        return self.apart is None and self.in_work.can_quantize_tiles

    @property
    def merges_apart(self) -> bool:
        """Whether a pass writes numbers of it that do not ship: they are stored in a form once all are there."""
        return self.in_work.storage is not None and not self.quantizes_tiles

    @property
    def written(self) -> CheckpointLayout:
        """What a pass writes of it."""
        return self.in_work.merged if self.merges_apart else self.in_work.output

    @property
    def direct(self) -> bool:
        """Whether its shards go past the page cache, since they are not read again here."""
        if self.opened is None or not self.opened.in_place or self.leads or self.merges_apart:
            return False
        return not (self.in_work.by_peft or self.is_run)  # what PEFT merged is read again to be checked

    @property
    def is_run(self) -> bool:
        """Whether the whole merged checkpoint is run, to be asked or compared."""
        return self.request.parity.level == "full" or self.request.compare

    @property
    def running(self) -> bool:
        """Whether it has neither failed nor found its release there already."""
        return self.error is None and self.release is None

    def ship(self, file: WrittenFile | Artifact) -> None:
        """Have a finished file sent on its way, beside what goes on here."""
        if self.compared_in is not None:
            return
        assert self.carriers is not None
        artifact, state = (file.artifact, file.state) if isinstance(file, WrittenFile) else (file, None)
        self.uploads.append(self.carriers.submit(self._put, artifact, state))

    def _put(self, artifact: Artifact, state: FileState | None) -> Receipt:
        with self.shipping():
            receipt = self.staging.put(artifact, state)
        self.bytes_put.append(artifact.num_bytes)
        if self.witness is not None:
            self.witness.put(artifact)
        return receipt

    def publish(self, approved_by: str | None) -> None:
        """Make its release visible.

        Args:
            approved_by: the person who let it be, where one was asked for.
        """
        assert self.manifest is not None
        if approved_by is not None:
            self.manifest = self.manifest.model_copy(update={"approved_by": approved_by})
        with self.shipping():
            self.release = self.staging.publish(self.manifest)

    @contextlib.contextmanager
    def shipping(self) -> Iterator[None]:
        """Note that what goes wrong inside for a while is the sink's."""
        try:
            yield
        except TransientIOError:
            self.store_failed = True
            raise

    def cancel_uploads(self) -> None:
        """Give up those that have not begun."""
        for upload in self.uploads:
            upload.cancel()

    def all_put(self) -> tuple[Artifact, ...]:
        """Wait for all uploads; return the files of the release, by path."""
        self._wait_for_records()
        artifacts = [receipt.artifact for receipt in (*self.receipts, *(upload.result() for upload in self.uploads))]
        return tuple(sorted(artifacts, key=lambda artifact: artifact.path))

    def hand_over(self) -> MergedShards:
        """Wait for all uploads, and let go of what was merged: it belongs to the worker that takes it over."""
        merged = MergedShards(
            receipts=tuple(upload.result() for upload in self.uploads),
            checks=tuple(self.checks.values()),
            wrong=tuple(self.wrong),
            kept=self.in_work.kept_weights,
        )
        self._wait_for_records()
        self.uploads.clear()
        self.checks.clear()
        self.wrong.clear()
        return merged

    def _wait_for_records(self) -> None:
        for recording in self.recordings:
            recording.result()
        self.recordings.clear()

    def take_over(self, merged: Iterable[MergedShards]) -> None:
        """Go on with what was handed over, here or elsewhere."""
        for shards in merged:
            for receipt in shards.receipts:
                self.staging.take(receipt)
            self.receipts += shards.receipts
            self.checks |= {check.tensor: check for check in shards.checks}
            self.wrong += shards.wrong
            self.keep(shards.kept)

    def keep(self, weights: Sequence[KeptWeight]) -> None:
        """Go on with a release that keeps some weights in more bits than its form has."""
        self.part = self.part and keeping(self.part, weights)
        self.planned = keeping(self.plan, weights)

    def drop(self, *, keep: bool = False) -> None:
        """Remove what it staged. A failure to do so is logged: what is left is invisible.

        Args:
            keep: leave finished shards to the next attempt, as is done where a remote store has failed for a while
                (decision 24).
        """
        left = True  # by an attempt that died on its way to a staging, or cannot be removed
        if self.opened is not None:
            is_passing = self.store_failed and isinstance(self.error, TransientIOError)
            try:
                left = self.opened.discard(keep=keep or (is_passing and not self.opened.in_place))
            except MergefleetError:
                # The next attempt at this destination clears it away, or who follows the trail.
                logger.warning("a staged release could not be removed", extra={"job_id": self.id}, exc_info=True)
        if self.trail is not None:
            self.trail.end(left=left)

    def outcome(self) -> JobOutcome:
        """Return what became of it."""
        return JobOutcome(
            job_id=self.id,
            merge_key=self.planned.merge_key if self.planned else None,
            failure=Failure.of(self.error) if self.error else None,
            release=self.release,
            parity=self.parity,
            report_path=self.report_path,
        )
