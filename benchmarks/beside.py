"""What a second driver costs the jobs of the first, on one machine: `python -m benchmarks.beside`.

Both work on one ledger in Postgres, each with a worker of its own. A job's time is that of its attempt, from begin to
publish, parity at level full: models are asked, by threads that all want the same cores.
"""

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path

from benchmarks.soak import driving, tiny_request
from jobs.ledger.store import JobStore
from jobs.states import JobState
from tests.models import build_llama, make_adapter
from tests.servers.postgres import serve_postgres

_NUM_ADAPTERS = 4


def main() -> None:
    """Print how long jobs take with one driver, and with two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=30, help="of each driver")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="beside-") as name, serve_postgres() as server:
        directory = Path(name)
        base = build_llama(directory / "base")
        adapters = [make_adapter(base, directory / f"adapter-{n}", seed=n) for n in range(_NUM_ADAPTERS)]
        medians = []
        for num_drivers in (1, 2):
            with server.database() as url, contextlib.closing(JobStore(url)) as store:
                place = directory / str(num_drivers)
                fields = {"parity": {"level": "full"}}
                numbers = range(num_drivers * arguments.jobs)
                requests = [tiny_request(n, base, adapters, place, **fields) for n in numbers]
                store.submit(requests)
                with contextlib.ExitStack() as stack:
                    homes = [place / f"driver-{n}" for n in range(num_drivers)]
                    for home in homes:
                        home.mkdir(parents=True)
                    settings = {"MERGEFLEET_MAX_JOBS_PER_PASS": "1"}
                    started = [stack.enter_context(driving(home, url, 1, **settings)) for home in homes]
                    for process, _ in started:
                        process.wait()
                times = [_attempt_seconds(store, request.id) for request in requests]
                medians.append(statistics.median(times))
                spread = f"{min(times):.2f} to {max(times):.2f}"
                print(f"{num_drivers} driver(s): {medians[-1]:.2f} s a job ({spread}; {len(times)} jobs)", flush=True)
    print(f"beside another driver each job takes {medians[1] / medians[0]:.2f} times as long")


def _attempt_seconds(store: JobStore, job_id: str) -> float:
    at = {event.state: event.at for event in store.events(job_id)}
    return at[JobState.PUBLISHED] - at[JobState.PLANNING]


if __name__ == "__main__":
    main()
