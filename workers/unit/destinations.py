"""Where the releases of a unit go: looked at, opened, or joined by a worker that takes part."""

import os
from collections.abc import Iterable
from pathlib import Path

from jobs.errors import DestinationOccupiedError, NotFoundError
from jobs.locations import LocalPath, Location
from workers.merging.job import Job
from workers.releases.released import encode_manifest
from workers.releases.sinks import Ticket, open_sink
from workers.releases.trails import Trail
from workers.sources.fetch import Source
from workers.unit.vetting import vet_planned_prompts


def open_destination(job: Job, scratch: Path) -> None:
    """Start the release of a planned job, or settle it where it is there already.

    Raises:
        DestinationOccupiedError: the place holds something else, or lies in what is merged.
        BadInputError: what it asks cannot be asked in bounded time.
    """
    plan, request = job.plan, job.request
    _check_outside(request.destination, (plan.base.source, plan.adapter, *plan.adapter.parts))
    sink = open_sink(request.destination, scratch)
    existing = sink.existing()
    if existing is not None:
        job.release = encode_manifest(existing).settle(request.destination, plan.merge_key)
        return
    if job.is_run:
        vet_planned_prompts(plan, scratch)
    job.trail = Trail.begin(scratch, request.destination)
    job.opened = sink.open(plan.merge_key)
    job.trail.name(job.opened.ticket.attempt)


def join_destination(job: Job, ticket: Ticket, scratch: Path) -> None:
    """Join a release that another worker has started.

    Raises:
        NotFoundError: it cannot be joined from here.
    """
    if job.plan.merge_key != ticket.merge_key:
        raise NotFoundError(f"{job.request.base} or {job.request.adapter} is another one here")
    job.trail = Trail.begin(scratch, job.request.destination)
    job.opened = open_sink(job.request.destination, scratch).join(ticket)
    job.trail.name(ticket.attempt)
    # Behaviour is that of a whole checkpoint: the worker that asks must see all files.
    if job.opened is None or (job.is_run and job.opened.directory != ticket.directory):
        raise NotFoundError(f"{ticket.directory}, which the merge is written to, is not to be seen from here")


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
