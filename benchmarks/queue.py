"""How long the ledger takes with a long queue, on both kinds of stores: `python -m benchmarks.queue`.

The commands are whole processes, as a person waits for them; claims are transactions in this one.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from tests.servers.postgres import serve_postgres

_MAIN = "from cluster.cli import main; main()"
_NUM_CLAIMS = 300
_JOBS_PER_CLAIM = 16
_AT_ONCE = 10_000


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000, help="jobs in the queue")
    num_jobs = parser.parse_args().jobs
    print(f"| {num_jobs:,} jobs queued | SQLite | Postgres |\n|---|---|---|")
    with (
        tempfile.TemporaryDirectory() as directory,
        serve_postgres() as server,
        server.database() as url,
    ):
        columns = [
            measure(f"sqlite:///{directory}/jobs.db", num_jobs, Path(directory)),
            measure(url, num_jobs, Path(directory)),
        ]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def measure(url: str, num_jobs: int, directory: Path) -> dict[str, str]:
    """Return what each step took, in words."""
    took = {}
    file = directory / "ten-thousand.jsonl"
    file.write_text("".join(json.dumps(_request(n)) + "\n" for n in range(_AT_ONCE)))
    took["`submit` of a file of 10,000 lines"] = _seconds(_command(url, "submit", str(file)))
    with contextlib.closing(JobStore(url)) as store:
        for start in range(_AT_ONCE, num_jobs, _AT_ONCE):
            store.submit(
                [MergeRequest.model_validate(_request(n)) for n in range(start, min(start + _AT_ONCE, num_jobs))]
            )
        claims = sorted(_claims(store))
        took[f"claim of {_JOBS_PER_CLAIM}, median of {_NUM_CLAIMS}"] = f"{1000 * statistics.median(claims):.1f} ms"
        took["claim, 99th of 100"] = f"{1000 * claims[int(0.99 * len(claims))]:.1f} ms"
    took["`status`"] = _seconds(_command(url, "status"))
    took["`status --batch`"] = _seconds(_command(url, "status", "--batch", "default"))
    took["`watch`, until its first line"] = _seconds(_first_line(url, "watch"))
    took["`cancel` of one"] = _seconds(_command(url, "cancel", "job-99"))
    took["`pause` of a batch"] = _seconds(_command(url, "pause", "batch", "default"))
    took["`resume` of it"] = _seconds(_command(url, "resume", "batch", "default"))
    took["`cancel` of a batch"] = _seconds(_command(url, "cancel", "--batch", "default"))
    took["`retry` of it"] = _seconds(_command(url, "retry", "--batch", "default"))
    return took


def _request(number: int) -> dict[str, object]:
    return {
        "id": f"job-{number}",
        "base": f"/bases/base-{number % 7}",
        "adapter": f"/adapters/adapter-{number}",
        "destination": f"s3://releases/{number % 100}/job-{number}",
        "labels": {"team": f"team-{number % 20}"},
        "priority": number % 3,
    }


def _claims(store: JobStore) -> Iterator[float]:
    for _ in range(_NUM_CLAIMS):
        begin = time.perf_counter()
        leases = store.claim("driver", _JOBS_PER_CLAIM, 600.0)
        yield time.perf_counter() - begin
        assert len(leases) == _JOBS_PER_CLAIM


def _environment(url: str) -> dict[str, str]:
    return {**os.environ, "MERGEFLEET_STORE": url}


def _command(url: str, *arguments: str) -> float:
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", _MAIN, *arguments, "--json"],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_environment(url),
    )
    return time.perf_counter() - begin


def _first_line(url: str, *arguments: str) -> float:
    begin = time.perf_counter()
    command = [sys.executable, "-c", _MAIN, *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=_environment(url)) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        took = time.perf_counter() - begin
        process.kill()
    return took


def _seconds(took: float) -> str:
    return f"{took:.2f} s"


if __name__ == "__main__":
    main()
