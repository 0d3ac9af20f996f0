"""How fairly a fleet is shared: the real ledger, scheduler and driver, on workers that spend modelled time.

Usage: python -m benchmarks.fairness [--workers N]. What counts is what each share got while all of them had jobs that
waited.
"""

import argparse
import contextlib
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.scale import Load
from benchmarks.simulation import Clock, Costs, SimulatedFleet, SimulatedMetrics
from cluster.driving.driver import Driver
from cluster.driving.events import DriverEvent, JobSettled
from cluster.fleet.crews import Crew
from cluster.fleet.in_memory import InMemoryActors
from cluster.fleet.pool import WorkerPool
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.states import JobState

_NUM_BASES = 50


def main() -> None:
    """Print how two shares of 3:1, and twenty equal ones, came off."""
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
    clock = Clock()
    served: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as home:
        settings = Settings(home=Path(home), share_label="team", shares=weights)
        with contextlib.closing(JobStore(f"sqlite:///{home}/jobs.db")) as ledger:
            ledger.register_driver("simulation", "here", 1, "team")
            ledger.submit(requests)
            fleet = SimulatedFleet(load.base_bytes, Costs(), clock, hours_between_deaths=None, rng=rng)
            pool = WorkerPool(
                InMemoryActors(fleet.start, fleet.wait),
                [Crew(num_workers=num_workers, device="cpu", num_threads=1)],
                ping_seconds=settings.poll_seconds,
                unresponsive_seconds=settings.unresponsive_seconds,
                clock=clock,
            )
            driver = Driver(
                ledger,
                pool,
                settings,
                SimulatedMetrics(),
                owner="simulation",
                listener=_counting(served, team_of),
                clock=clock,
                sleep=clock.skip,
                rng=rng,
            )
            # So many a driver holds: when all that is left of a share is held, it has no more that wait.
            held = 2 * num_workers * settings.max_jobs_per_pass
            while not any(served[team] + held >= size for team, size in sizes.items()):
                driver.step()
    return served


def _counting(served: Counter[str], team_of: Mapping[str, str]) -> Callable[[DriverEvent], None]:
    def listener(event: DriverEvent) -> None:
        if isinstance(event, JobSettled) and event.state is JobState.PUBLISHED:
            served[team_of[event.job_id]] += 1

    return listener


if __name__ == "__main__":
    main()
