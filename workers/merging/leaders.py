"""Forms of one merge: of jobs that want the same numbers, one merges them for all.

A request with `outputs` makes such jobs. They stay jobs of their own, each with its release and its fate; where the one
that merges fails, the others do not.
"""

from collections.abc import Collection, Iterator, Sequence

from jobs.output_form import OutputForm
from workers.merging.job import Job
from workers.merging.plan import MergePlan


def lead(jobs: Sequence[Job]) -> None:
    """Give jobs that want the same numbers one leader among them.

    Args:
        jobs: of one pass, planned.
    """
    leaders: list[Job] = []
    # Who writes numbers first: others may want to read them.
    for job in sorted(jobs, key=lambda job: (job.in_work.storage is not None, job.quantizes_tiles)):
        job.leader, job.leads = None, False
        # The shards of a release of plain numbers are its numbers: no one else can write them.
        if job.in_work.storage is not None:
            job.leader = next((each for each in leaders if _are_same(each, job)), None)
        if job.leader is None:
            leaders.append(job)
        elif not job.quantizes_tiles:
            job.leader.leads = True


def groups_of(jobs: Sequence[Job]) -> list[tuple[Job, list[Job]]]:
    """Return jobs of one pass by what they make: a leader, and those of its group, itself first if it is there.

    Args:
        jobs: led.
    """
    groups: dict[str, tuple[Job, list[Job]]] = {}
    for job in sorted(jobs, key=lambda job: job.leader is not None):
        leader = job.leader or job
        groups.setdefault(leader.id, (leader, []))[1].append(job)
    return list(groups.values())


def waves(jobs: Collection[Job]) -> Iterator[list[Job]]:
    """Yield the jobs that are made in the walk, then those whose leader has failed before they could read its numbers.

    Args:
        jobs: led.
    """
    while jobs:
        yield [job for job in jobs if job.leader is None or job.quantizes_tiles]
        left = []
        for job in jobs:
            if job.leader is None or job.quantizes_tiles or not job.running:
                continue
            if job.leader.running:
                job.checks = dict(job.leader.checks)
                job.wrong += job.leader.wrong
            else:
                job.leader = None
                left.append(job)
        lead(left)
        jobs = left


def _are_same(one: Job, other: Job) -> bool:
    return one.in_work.merged == other.in_work.merged and _numbers_key(one.plan) == _numbers_key(other.plan)


def _numbers_key(plan: MergePlan) -> str:
    """Return the digest of what decides merged numbers, before they are rounded and laid out in files."""
    as_usual = plan.request.model_copy(
        update={"output": OutputForm.PLAIN, "dtype": None, "keep": None, "max_shard_size": None}
    )
    return as_usual.merge_key(plan.base.source.digest, plan.adapter.digest)
