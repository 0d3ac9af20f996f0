"""The end of a release before it is published: the report beside it, all files shipped, the manifest made."""

import shutil

from jobs.release import REPORT_NAME, REPORT_PAGE_NAME, Manifest
from workers.files.local import file_errors
from workers.merging.card import write_card
from workers.merging.job import Job
from workers.merging.made_with import library_versions, made_with
from workers.merging.sidecars import digest_file, write_sidecars


def ship_sidecars(job: Job) -> None:
    """Write what goes beside the shards of a merged job, and ship it."""
    num_changed = sum(check.changed for check in job.checks.values())
    survivals = [check.survival for check in job.checks.values() if check.survival is not None]
    least = min(survivals, default=None)
    card = write_card(job.plan, job.directory, num_changed=num_changed, least_survival=least)
    for artifact in (*write_sidecars(job.plan, job.directory), card):
        job.ship(artifact)


def seal(job: Job) -> None:
    """Ship the report of a job that has passed, wait for all its files, and make its manifest."""
    assert job.parity is not None
    assert job.report is not None
    assert job.report_path is not None
    plan, directory = job.plan, job.directory
    for name in (REPORT_NAME, REPORT_PAGE_NAME):
        with file_errors(f"copying the parity report to {directory}", directory):
            shutil.copyfile(job.report_path / name, directory / name)
        job.ship(digest_file(directory, name))
    artifacts = job.all_put()
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
        quantization_options=job.request.quantization_options if job.request.base_quantization.converts else None,
        dtype=job.request.dtype,
        output=job.request.output if plan.storage else None,
        kept=job.report.kept,
        parity=job.parity,
        notes=job.report.notes,
        files=artifacts,
        versions=library_versions(),
        made_with=made_with(plan.opened.method),
    )
