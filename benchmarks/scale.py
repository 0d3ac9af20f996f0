"""A fleet that is not here, by simulation: the real store, scheduler and driver, with workers that spend modelled time.

Usage: python -m benchmarks.scale [--jobs N] [--workers N [N ...]] [--hours-between-deaths H]

Many jobs over 50 bases, the popular ones far more often (Zipf), all submitted at once. For each size of the fleet:
utilization against the least that any schedule could take, the driver's CPU time for each job, the time of a claim,
loads of bases, and whether a base had to wait for longer than the bound says.

The driver's own time counts as simulated time, too: where it is too slow, workers wait for it. Prints a table and
writes .bench/scale/results.json.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.simulation import Clock, Costs, SimulatedFleet, SimulatedMetrics, open_pool
from cluster.driving.driver import Driver
from cluster.driving.events import DriverEvent, JobSettled, ShardsStarted, UnitStarted, WorkerReplaced
from cluster.driving.scheduler import WorkerView
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.request import MergeRequest
from jobs.states import JobState

_SIZES_GB = (1.1, 2.2, 6.4, 14.5, 16.1, 26.0, 54.0)
"""16-bit bases as people have them: 0.5 to 27 billion weights."""
_SUBMITTED_AT_ONCE = 5000
_ZIPF_EXPONENT = 1.1


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the fleet."""

    base_bytes: Mapping[str, float]
    requests: Sequence[MergeRequest]

    @classmethod
    def draw(cls, num_jobs: int, num_bases: int, seed: int) -> "Load":
        """Draw jobs over bases with a Zipf skew."""
        rng = random.Random(seed)  # noqa: S311 - a simulation, no secrets
        base_bytes = {f"/bases/b{n}": 1e9 * rng.choice(_SIZES_GB) for n in range(num_bases)}
        weights = [1 / rank**_ZIPF_EXPONENT for rank in range(1, num_bases + 1)]
        requests = [
            MergeRequest(
                id=f"j{number}",
                base=base,
                adapter=f"/adapters/j{number}",
                destination=f"/releases/j{number}",
            )
            for number, base in enumerate(rng.choices(list(base_bytes), weights, k=num_jobs))
        ]
        return cls(base_bytes, requests)

    def least_seconds(self, num_workers: int, max_jobs_per_pass: int, costs: Costs) -> float:
        """Return what no schedule can go below: every base loaded once, the fewest passes, no worker ever idle."""
        work = 0.0
        for base, count in collections.Counter(str(request.base) for request in self.requests).items():
            size = self.base_bytes[base]
            work += costs.load_seconds(size) + count * costs.job_seconds(size)
            work += -(-count // max_jobs_per_pass) * costs.pass_seconds(size)
        return work / num_workers


class Observer:
    """Listens to a driver: what became of the jobs, and when the last one was published."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.num_published = 0
        self.num_quarantined = 0
        self.ended_at = clock()

    def __call__(self, event: DriverEvent) -> None:
        """Take an event."""
        match event:
            case JobSettled(state=JobState.PUBLISHED):
                self.num_published += 1
                self.ended_at = self._clock()
            case JobSettled(state=JobState.QUARANTINED):
                self.num_quarantined += 1
            case UnitStarted() | ShardsStarted() | WorkerReplaced() | JobSettled():
                pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One run."""

    num_workers: int
    num_jobs: int
    deaths: int
    published: int
    quarantined: int
    makespan_seconds: float
    least_seconds: float
    driver_cpu_ms_per_job: float
    claim_ms: float
    """Median CPU and waiting time of one call of `claim`."""
    loads_per_job: float
    jobs_per_unit: float
    busy_share: float
    """Of the workers' time, at work, also on what a death undid."""
    longest_wait_units: int
    """Most units of other bases that went while a claimed base waited."""
    wait_bound_units: int
    real_seconds: float

    @property
    def of_least(self) -> float:
        """The least time there is, as a share of the time it took."""
        return self.least_seconds / self.makespan_seconds


class WatchedDriver(Driver):
    """A driver whose claims are timed and whose passing over of bases is noted."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.claim_seconds: list[float] = []
        self.longest_wait = 0
        self.num_bases_waiting = 0

    def _claim(self, views: Sequence[WorkerView]) -> None:
        begin = time.perf_counter()
        before = self._holdings.num_claimed
        super()._claim(views)
        if self._holdings.num_claimed > before:
            self.claim_seconds.append(time.perf_counter() - begin)

    def _start_units(self, pool_views: Sequence[WorkerView]) -> None:
        super()._start_units(pool_views)
        self.longest_wait = max([self.longest_wait, *self._passed_over.values()])
        self.num_bases_waiting = max(self.num_bases_waiting, len(self._passed_over))


def simulate(load: Load, num_workers: int, *, hours_between_deaths: float | None, seed: int, store: Path) -> Result:
    """Run all jobs through a driver."""
    real_begin = time.perf_counter()
    costs = Costs()
    clock = Clock()
    settings = Settings(home=store.parent, retry_delay_seconds=0.01, max_retry_delay_seconds=0.01)
    rng = random.Random(seed)  # noqa: S311 - a simulation, no secrets
    with contextlib.closing(JobStore(f"sqlite:///{store}")) as ledger:
        for start in range(0, len(load.requests), _SUBMITTED_AT_ONCE):
            ledger.submit(load.requests[start : start + _SUBMITTED_AT_ONCE])
        fleet = SimulatedFleet(load.base_bytes, costs, clock, hours_between_deaths=hours_between_deaths, rng=rng)
        pool = open_pool(fleet, num_workers, settings, clock)
        observer = Observer(clock)
        driver = WatchedDriver(
            ledger,
            pool,
            settings,
            SimulatedMetrics(),
            owner="simulation",
            listener=observer,
            clock=clock,
            sleep=clock.skip,
            rng=rng,
        )
        begin, cpu_begin = clock(), time.process_time() - fleet.cpu_seconds
        driver.run(drain=True)
        cpu = time.process_time() - cpu_begin - fleet.cpu_seconds
    makespan = observer.ended_at - begin
    return Result(
        num_workers=num_workers,
        num_jobs=len(load.requests),
        deaths=fleet.num_deaths,
        published=observer.num_published,
        quarantined=observer.num_quarantined,
        makespan_seconds=makespan,
        least_seconds=load.least_seconds(num_workers, settings.max_jobs_per_pass, costs),
        driver_cpu_ms_per_job=1000 * cpu / len(load.requests),
        claim_ms=1000 * statistics.median(driver.claim_seconds),
        loads_per_job=fleet.num_loads / len(load.requests),
        jobs_per_unit=len(load.requests) / fleet.num_units,
        busy_share=fleet.busy_seconds / (num_workers * makespan),
        longest_wait_units=driver.longest_wait,
        wait_bound_units=settings.max_units_of_other_bases * num_workers + driver.num_bases_waiting - 1,
        real_seconds=time.perf_counter() - real_begin,
    )


def table_of(results: Sequence[Result]) -> Table:
    """Return the table of some runs."""
    table = Table(title=f"{results[0].num_jobs} jobs")
    columns = ("workers", "deaths", "makespan", "of the least", "busy", "driver CPU a job", "claim", "loads a job")
    for heading in (*columns, "jobs a unit", "longest wait (bound)", "quarantined"):
        table.add_column(heading, justify="right")
    for each in results:
        table.add_row(
            str(each.num_workers),
            str(each.deaths),
            f"{each.makespan_seconds / 3600:.2f} h",
            f"{each.of_least:.1%}",
            f"{each.busy_share:.1%}",
            f"{each.driver_cpu_ms_per_job:.1f} ms",
            f"{each.claim_ms:.1f} ms",
            f"{each.loads_per_job:.3f}",
            f"{each.jobs_per_unit:.1f}",
            f"{each.longest_wait_units} ({each.wait_bound_units})",
            str(each.quarantined),
        )
    return table


def main() -> None:
    """Run the simulations named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--bases", type=int, default=50)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--hours-between-deaths", type=float, default=None, help="mean life of a worker; for ever")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    load = Load.draw(arguments.jobs, arguments.bases, arguments.seed)
    results = []
    directory = Path(".bench", "scale").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    for num_workers in arguments.workers:
        with tempfile.TemporaryDirectory(dir=directory) as home:
            store = Path(home, "jobs.db")
            result = simulate(
                load, num_workers, hours_between_deaths=arguments.hours_between_deaths, seed=arguments.seed, store=store
            )
        results.append(result)
        console.print(f"{num_workers} workers: {result.real_seconds:.0f} s")
    console.print(table_of(results))
    for result in results:
        if result.longest_wait_units > result.wait_bound_units:
            console.print(f"{result.num_workers} workers: a base waited for longer than the bound says.")
    path = directory / "results.json"
    path.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=2) + "\n")
    console.print(f"Every figure: {path}")


if __name__ == "__main__":
    main()
