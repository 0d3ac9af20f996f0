"""Thousands of tiny merges through one real fleet: jobs a minute, and what grows. `python -m benchmarks.soak`.

What grows is said as a slope over the second half of the jobs: what loads once is loaded by then.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState
from tests.models import build_llama, make_adapter

_MAIN = "from cluster.cli import main; main()"
_NUM_ADAPTERS = 20
_SAMPLE_SECONDS = 2.0
_MB = 10**6


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was there at one moment."""

    num_published: int
    driver_bytes: int
    """Private memory of the driver."""
    worker_bytes: int
    """Of all workers, the mean."""
    num_files: int
    """Open in driver and workers."""
    num_series: int
    """On all metrics endpoints."""


def main() -> None:
    """Run the jobs, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--store", help="URL of the ledger; by default SQLite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak(Path(directory), arguments.jobs, arguments.workers, arguments.store)


def soak(directory: Path, num_jobs: int, num_workers: int, store_url: str | None) -> None:
    """Merge so many tiny adapters, and say what it took."""
    base = build_llama(directory / "base")
    adapters = [make_adapter(base, directory / f"adapter-{n}", seed=n) for n in range(_NUM_ADAPTERS)]
    url = store_url or f"sqlite:///{directory}/home/mergefleet.db"
    with contextlib.closing(JobStore(url)) as store:
        store.submit([tiny_request(number, base, adapters, directory) for number in range(num_jobs)])
        samples: list[Sample] = []
        with driving(directory, url, num_workers) as (process, started):
            first_at = None
            while process.poll() is None:
                time.sleep(_SAMPLE_SECONDS)
                sample = _sample(process, store, started["metrics_urls"])
                if sample is not None and sample.num_published:
                    first_at = first_at or (time.monotonic(), sample.num_published)
                    samples.append(sample)
                    last_at = time.monotonic(), sample.num_published
        assert store.counts()[JobState.PUBLISHED] == num_jobs, store.counts()
    assert first_at is not None
    rate = 60 * (last_at[1] - first_at[1]) / (last_at[0] - first_at[0])
    half = [sample for sample in samples if sample.num_published >= num_jobs / 2]
    print("| | |\n|---|---|")
    print(f"| jobs a minute | {rate:,.0f} |")
    for name, field, unit in (
        ("driver", "driver_bytes", _MB),
        ("each worker", "worker_bytes", _MB),
    ):
        slope = _slope(half, field) / unit
        print(f"| {name}: MB for each 1,000 jobs | {slope:+.2f} (now {getattr(half[-1], field) / unit:.0f}) |")
    for name, field in (("open files", "num_files"), ("metric series", "num_series")):
        values = [getattr(sample, field) for sample in half]
        print(f"| {name} | {min(values)} to {max(values)}, {_slope(half, field):+.1f} for each 1,000 jobs |")


def tiny_request(number: int, base: Path, adapters: Sequence[Path], directory: Path, **fields: object) -> MergeRequest:
    """Return the request of one job, which takes the adapters in turn; parity is arithmetic unless other fields say."""
    return MergeRequest.model_validate(
        {
            "id": f"job-{number}",
            "base": str(base),
            "adapter": str(adapters[number % len(adapters)]),
            "destination": str(directory / "out" / f"{number % 100}" / f"job-{number}"),
            "base_quantization": "none",
            "parity": {"level": "arithmetic"},
            **fields,
        }
    )


@contextlib.contextmanager
def driving(
    directory: Path, url: str, num_workers: int, **settings: str
) -> Iterator[tuple["subprocess.Popen[str]", dict[str, list[str]]]]:
    """Run a driver in a home of its own until the block ends; yield its process and what it said when it began.

    Args:
        directory: of the home.
        url: of the ledger.
        num_workers: of the driver.
        settings: others, by the names of their variables.
    """
    with tempfile.TemporaryDirectory(prefix="mf-", ignore_cleanup_errors=True) as ray_directory:
        environment = {
            **os.environ,
            "HOME": str(directory),
            "MERGEFLEET_HOME": str(directory / "home"),
            "MERGEFLEET_STORE": url,
            "MERGEFLEET_RAY_DIRECTORY": ray_directory,
            "RAY_AUTH_MODE": "token",
            **settings,
        }
        events = directory / "events.jsonl"
        command = [sys.executable, "-c", _MAIN, "run", "--drain", "--json", "--workers", str(num_workers)]
        with events.open("w") as out:
            process = subprocess.Popen(command, stdout=out, text=True, env=environment)
        try:
            while not events.read_text().endswith("\n"):
                time.sleep(0.1)
            yield process, json.loads(events.read_text().splitlines()[0])
        finally:
            process.terminate()
            process.wait()


def _sample(process: "subprocess.Popen[str]", store: JobStore, metrics_urls: list[str]) -> Sample | None:
    with contextlib.suppress(psutil.Error, OSError):
        driver, *children = psutil.Process(process.pid).children(recursive=True) or [None]
        workers = [child for child in children if re.match(r"ray::", " ".join(child.cmdline()))]
        private = [worker.memory_full_info().uss for worker in workers]
        if driver is None or not private:
            return None
        series = 0
        for url in metrics_urls:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - of a local Ray
                series += sum(line[:1] not in (b"#", b"\n") for line in answer)
        return Sample(
            num_published=store.counts()[JobState.PUBLISHED],
            driver_bytes=driver.memory_full_info().uss,
            worker_bytes=int(statistics.mean(private)),
            num_files=sum(each.num_fds() for each in (driver, *workers)),
            num_series=series,
        )
    return None


def _slope(samples: list[Sample], field: str) -> float:
    """Return how much a figure grows for each 1,000 jobs."""
    if len(samples) < 3:
        return 0.0
    numbers = [sample.num_published / 1000 for sample in samples]
    return statistics.linear_regression(numbers, [getattr(sample, field) for sample in samples]).slope


if __name__ == "__main__":
    main()
