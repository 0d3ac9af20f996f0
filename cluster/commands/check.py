"""The `check` command: whether a checkpoint can be loaded where it is to be deployed."""

from pathlib import Path

from cluster.console.findings import findings_document, findings_view
from cluster.console.terminal import Terminal
from jobs.locations import Location
from workers.releases.checks.rules import Engine, Severity, for_engine
from workers.unit.checking import check_release
from workers.unit.vetting import server


def check_and_show(output: Terminal, location: Location, scratch: Path, engine: str | None) -> bool:
    """Check a checkpoint, and show what was found.

    Args:
        output: gets it.
        location: of the checkpoint.
        scratch: directory for what is brought.
        engine: what alone is asked about; None for all.

    Returns:
        Whether nothing is an error.

    Raises:
        As `check_release`.
    """
    server.start()  # before there are threads, while it costs nothing
    found = check_release(location, scratch)
    if engine is not None:
        found = for_engine(found, Engine(engine))
    output.document(findings_document(location, found))
    output.show(findings_view(location, found))
    return not any(each.severity is Severity.ERROR for each in found)
