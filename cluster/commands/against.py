"""The `verify --against` command: what an external tool made of a release, beside that release."""

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.console.against import against_document, against_view
from cluster.console.terminal import Terminal
from cluster.settings import Settings, worker_settings
from workers.against.gate import verify_against
from workers.against.question import Question
from workers.unit.vetting import server

_COLUMNS = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}", markup=False))


class _Bar:
    """Tells a person how far the gate is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=None)

    def step(self, words: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=words)

    def expect(self, num_bytes: int) -> None:
        """Say how much is to be looked at."""
        self._progress.update(self._task, total=num_bytes)

    def advance(self, num_bytes: int) -> None:
        """Say that so much more was."""
        self._progress.advance(self._task, num_bytes)


def verify_against_and_show(output: Terminal, settings: Settings, question: Question) -> bool:
    """Compare a checkpoint with the release that it was made of, and show what was found.

    Args:
        output: gets it.
        settings: of this machine.
        question: what is compared.

    Returns:
        Whether it passes.

    Raises:
        As `verify_against`.
    """
    server.start()  # before there are threads, while it costs nothing
    of_worker = worker_settings(settings, device=settings.device, num_threads=settings.num_threads)
    with Progress(*_COLUMNS, console=output.out, transient=True, disable=output.as_json) as bar:
        found = verify_against(question, of_worker, _Bar(bar))
    output.document(against_document(found))
    output.show(against_view(found))
    return found.passed
