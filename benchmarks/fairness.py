"""What jobs cost each other: the real ledger, scheduler and driver, on workers that spend modelled time.

Usage: python -m benchmarks.fairness [--workers N]. Shares: what counts is what each got while all of them had jobs that
waited. A job that kills every worker that merges it: how much later the others are published than without it.
"""

import argparse
import contextlib
import dataclasses
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.scale import Load
from benchmarks.simulation import Clock, Costs, SimulatedFleet, SimulatedMetrics, open_pool
from cluster.driving.driver import Driver
from cluster.driving.events import DriverEvent, JobSettled
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.states import JobState

_NUM_BASES = 50
_NUM_BESIDE = 1000
"""Jobs, one of which kills."""


def main() -> None:
    """Print how two shares of 3:1, and twenty equal ones, came off, and jobs beside one that kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    weights = {"search": 3.0, "ads": 1.0}
    served = share_fleet({"ads": 2000, "search": 2000}, weights, arguments.workers, arguments.seed)
    print(f"2 shares, 3:1: {served['search']} and {served['ads']} jobs, {served['search'] / served['ads']:.2f}:1")
    rng = random.Random(arguments.seed)  # noqa: S311 - a simulation, no secrets
    sizes = {f"team-{number:02}": rng.randrange(400, 1000) for number in range(20)}
    served = share_fleet(sizes, {}, arguments.workers, arguments.seed)
    counts = [served[team] for team in sizes]
    spread = f"{min(counts)} to {max(counts)} served each"
    print(
        f"20 shares of {min(sizes.values())} to {max(sizes.values())} jobs: {spread}, Jain's index {jain(counts):.4f}"
    )
    load = Load.draw(_NUM_BESIDE, _NUM_BASES, arguments.seed)
    poison = load.requests[_NUM_BESIDE // 3].id
    alone, beside = (
        publish_all(load, poison, poisonous, arguments.workers, arguments.seed) for poisonous in (False, True)
    )
    later = [beside.published_at[name] / at - 1 for name, at in alone.published_at.items() if name != poison]
    print(
        f"{len(later)} jobs beside one that kills {beside.num_deaths} workers and is then quarantined: the last is "
        f"published {beside.ended_at / alone.ended_at - 1:+.1%} later, the mean one {statistics.mean(later):+.1%}"
    )


def jain(counts: Sequence[float]) -> float:
    """Return Jain's index: 1 when all got the same, 1/n when one got everything (Jain, Chiu, Hawe 1984)."""
    return sum(counts) ** 2 / (len(counts) * sum(count * count for count in counts))


def share_fleet(sizes: Mapping[str, int], weights: Mapping[str, float], num_workers: int, seed: int) -> Counter[str]:
    """Run jobs of several shares until one of them has no more that wait; return what each was served.

    Args:
        sizes: how many jobs each share submits, one share after the other, with priorities of their own.
        weights: of the shares; 1 for those that are not named.
        num_workers: of the fleet.
        seed: of bases and priorities.
    """
    rng = random.Random(seed)  # noqa: S311 - a simulation, no secrets
    load = Load.draw(sum(sizes.values()), _NUM_BASES, seed)
    teams = [team for team, size in sizes.items() for _ in range(size)]
    requests = [
        request.model_copy(update={"labels": {"team": team}, "priority": rng.randrange(3)})
        for request, team in zip(load.requests, teams, strict=True)
    ]
    team_of = {request.id: request.labels["team"] for request in requests}
    load = dataclasses.replace(load, requests=requests)
    served: Counter[str] = Counter()
    listener = _counting(served, team_of)
    rules: dict[str, Any] = {"share_label": "team", "shares": weights}
    with _simulated(load, Clock(), num_workers, seed, listener, **rules) as (driver, _):
        # So many a driver holds: when all that is left of a share is held, it has no more that wait.
        held = 2 * num_workers * Settings.model_fields["max_jobs_per_pass"].default
        while not any(served[team] + held >= size for team, size in sizes.items()):
            driver.step()
    return served


@dataclass(slots=True)
class Course:
    """What became of jobs."""

    published_at: dict[str, float] = field(default_factory=dict)
    """Seconds from the begin, by job."""
    ended_at: float = 0.0
    num_deaths: int = 0


def publish_all(load: Load, poison: str, poisonous: bool, num_workers: int, seed: int) -> Course:
    """Run jobs until all are final.

    Args:
        load: the jobs.
        poison: one of them.
        poisonous: whether that one kills every worker that merges it.
        num_workers: of the fleet.
        seed: of the jitter between attempts.
    """
    course, clock = Course(), Clock()

    def listener(event: DriverEvent) -> None:
        if isinstance(event, JobSettled) and event.state is JobState.PUBLISHED:
            course.published_at[event.job_id] = course.ended_at = clock()
        elif isinstance(event, JobSettled) and event.state is JobState.QUARANTINED:
            assert event.job_id == poison

    with _simulated(load, clock, num_workers, seed, listener, poisonous={poison} if poisonous else set()) as (
        it,
        fleet,
    ):
        it.run(drain=True)
    assert len(course.published_at) == len(load.requests) - poisonous
    course.num_deaths = fleet.num_deaths
    return course


@contextlib.contextmanager
def _simulated(
    load: Load,
    clock: Clock,
    num_workers: int,
    seed: int,
    listener: Callable[[DriverEvent], None],
    *,
    poisonous: Collection[str] = (),
    **fields: Any,
) -> Iterator[tuple[Driver, SimulatedFleet]]:
    """Yield a driver of a simulated fleet, with all jobs queued; other arguments are settings."""
    rng, costs = random.Random(seed), Costs()  # noqa: S311 - a simulation, no secrets
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), **fields)
        with contextlib.closing(JobStore(f"sqlite:///{home}/jobs.db")) as ledger:
            ledger.register_driver("simulation", "here", 1, settings.share_label)
            ledger.submit(load.requests)
            fleet = SimulatedFleet(
                load.base_bytes, costs, clock, hours_between_deaths=None, rng=rng, poisonous=poisonous
            )
            pool = open_pool(fleet, num_workers, settings, clock)
            yield (
                Driver(
                    ledger,
                    pool,
                    settings,
                    SimulatedMetrics(),
                    owner="simulation",
                    listener=listener,
                    clock=clock,
                    sleep=clock.skip,
                    rng=rng,
                ),
                fleet,
            )


def _counting(served: Counter[str], team_of: Mapping[str, str]) -> Callable[[DriverEvent], None]:
    def listener(event: DriverEvent) -> None:
        if isinstance(event, JobSettled) and event.state is JobState.PUBLISHED:
            served[team_of[event.job_id]] += 1

    return listener


if __name__ == "__main__":
    main()
