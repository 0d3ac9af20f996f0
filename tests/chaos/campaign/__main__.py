"""A seeded campaign of faults against a real fleet: what it promises is checked when all faults are over.

Usage: python -m tests.chaos.campaign --store sqlite|postgres [--jobs N] [--faults N] [--seed N]

Jobs go to a real S3 server and to directories, through real `mergefleet run` processes on real Ray, while faults are
injected that a seed has drawn. Prints a table of them, with how long the fleet took to recover, and exits with 1 when a
promise was not kept. When it is interrupted, all that it has started ends.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from jobs.ledger.store import JobStore
from tests.chaos.campaign import checker
from tests.chaos.campaign.fleet import Fleet
from tests.chaos.campaign.ledger import LedgerSight
from tests.chaos.campaign.proxy import Proxy
from tests.chaos.campaign.schedule import Inject, draw_faults
from tests.chaos.campaign.workload import build_models
from tests.chaos.campaign.world import LATER, World, tmpfs
from tests.servers.postgres import serve_postgres
from tests.servers.s3 import serve_s3
from workers.releases.trails import TRAILS

_MOUNTS = {"home": 400, "scratch": 700, "releases": 3000, "ledger": 48}
_MAX_RECOVERY_SECONDS = 600.0
_MAX_CLEARING_SECONDS = 60.0
_MAX_TOLD = 40
_MAX_TRIES = 12
"""How often a fault that others are in the way of is put off."""
_BOUNDS = {"worker killed": 10.0, "raylet killed": 30.0, "gcs_server killed": 30.0, "cancel, ": 5.0}
"""Seconds that recovery is to take at most on a machine of its own."""


def main() -> int:
    """Run one campaign; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign")
    parser.add_argument("--store", choices=["sqlite", "postgres"], required=True)
    parser.add_argument("--jobs", type=int, default=160)
    parser.add_argument("--faults", type=int, default=105)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="of all drivers; Postgres has two drivers")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between two faults beside what is drawn")
    parser.add_argument("--only", help="only faults whose name matches this expression")
    parser.add_argument("--keep", action="store_true", help="keep the directory of the campaign")
    arguments = parser.parse_args()
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has programs in its background ignore the first
        signal.signal(number, signal.default_int_handler)

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} {text}", flush=True)

    directory = Path(tempfile.mkdtemp(prefix="mfc-"))
    say(f"store {arguments.store}, seed {arguments.seed}, in {directory}")
    try:
        return _run(arguments, directory, say)
    finally:
        if not arguments.keep:
            shutil.rmtree(directory, ignore_errors=True)


def _run(arguments: argparse.Namespace, directory: Path, say: Callable[[str], None]) -> int:
    rng = random.Random(arguments.seed)
    with contextlib.ExitStack() as stack:
        mounts = {name: stack.enter_context(tmpfs(directory / name, size)) for name, size in _MOUNTS.items()}
        for name in ("logs", "numba", "s3", "releases/out"):
            (directory / name).mkdir(exist_ok=True)
        s3 = stack.enter_context(serve_s3(directory / "s3"))
        proxy = Proxy(s3.endpoint, arguments.seed)
        stack.callback(proxy.close)
        postgres = None
        url = f"sqlite:///{directory}/ledger/mergefleet.db"
        slots = {"a": arguments.workers}
        if arguments.store == "postgres":
            postgres = stack.enter_context(serve_postgres())
            url = stack.enter_context(postgres.database())
            slots = {"a": (arguments.workers + 1) // 2, "b": max(1, arguments.workers // 2)}
        models = build_models(directory, s3)
        store = stack.enter_context(contextlib.closing(JobStore(url)))
        sight = stack.enter_context(contextlib.closing(LedgerSight(url)))
        os.environ |= s3.environment()
        fleet = Fleet(directory, url, s3.environment() | {"AWS_ENDPOINT_URL_S3": proxy.endpoint}, slots=slots)
        world = World(
            directory=directory, store=store, sight=sight, fleet=fleet, proxy=proxy, s3=s3, models=models,
            postgres=postgres, rng=rng, num_jobs=arguments.jobs, mounts=mounts, say=say,
        )  # fmt: skip
        faults = draw_faults(arguments.faults, rng, is_sqlite=postgres is None)
        faults = [fault for fault in faults if arguments.only is None or re.search(arguments.only, fault[0])]
        try:
            world.feed(6)
            fleet.start()
            _inject(world, faults, arguments.pace)
            _recover(world)
        finally:
            world.settle_spans()
            codes = fleet.stop()
            fleet.clean()
        say(f"exit codes of runs: {codes}")
        problems = [
            *world.problems,
            *checker.check_events(sight, {each["id"] for each in world.requests}, world.cancelled),
            *checker.check_releases(sight, world.releases, directory / "verify", s3),
            *checker.check_leftovers(directory / "scratch"),
            *checker.check_ledger(sight),
        ]
        _print_table(world, problems, arguments)
        return 1 if problems else 0


def _inject(world: World, faults: list[tuple[str, Inject]], pace: float) -> None:
    """Inject faults, one after the other; one that another fault is in the way of comes again later."""
    waiting = deque((name, inject, 0) for name, inject in faults)
    number = 0
    while waiting:
        name, inject, tries = waiting.popleft()
        due = round(6 + (world.num_jobs - 6) * number / len(faults))
        world.feed(max(0, due - len(world.requests)))
        why = inject(world)
        if why is not None and why.startswith(LATER) and tries < _MAX_TRIES:
            waiting.insert(min(len(waiting), 8), (name, inject, tries + 1))
            time.sleep(1)
            continue
        number += 1
        tally = world.tally(name)
        if why is None:
            tally.injected += 1
        else:
            tally.skipped += 1
            tally.why = why
        to_do = sum(row.state not in ("PUBLISHED", "CANCELLED") for row in world.sight.jobs())
        world.say(f"{number}/{len(faults)} {name}{'' if why is None else f': skipped, {why}'}; {to_do} jobs to do")
        time.sleep(pace + world.rng.uniform(0.5, 3.0))


def _recover(world: World) -> None:
    """Wait until all faults are over and nothing is left to be done."""
    world.feed(max(0, world.num_jobs - len(world.requests)))
    world.settle_spans()
    world.say("all faults are over")
    end = time.monotonic() + _MAX_RECOVERY_SECONDS
    final = {"PUBLISHED", "CANCELLED", "FAILED", "QUARANTINED"}
    while time.monotonic() < end:
        left = [row for row in world.sight.jobs() if row.state not in final]
        if not left:
            world.say("nothing is left to be done")
            _wait_for_clearing(world)
            return
        time.sleep(1)
    world.problems.append(f"{len(left)} jobs were not done {_MAX_RECOVERY_SECONDS:.0f} s after the last fault")


def _wait_for_clearing(world: World) -> None:
    """Let the workers that live follow the trails of those that died last."""
    end = time.monotonic() + _MAX_CLEARING_SECONDS
    while any((world.directory / "scratch" / TRAILS).glob("*")):
        if time.monotonic() > end:
            return
        time.sleep(1)
    world.say("nothing is left of those that died")


def _print_table(world: World, problems: list[str], arguments: argparse.Namespace) -> None:
    print(f"\nstore {arguments.store}, seed {arguments.seed}, {len(world.requests)} jobs")
    print(f"{'fault':30} {'done':>5} {'skip':>5} {'back':>5} {'median s':>9} {'max s':>8}  bound")
    for name, tally in sorted(world.tallies.items()):
        seconds = tally.seconds or tally.all_seconds
        times = f"{statistics.median(seconds):9.1f} {max(seconds):8.1f}" if seconds else f"{'':18}"
        calm = "" if tally.seconds or not seconds else " (amid others)"
        bound = next((value for begin, value in _BOUNDS.items() if name.startswith(begin)), None)
        within = (
            "" if bound is None else f"  {sum(each <= bound for each in seconds)}/{len(seconds)} within {bound:g} s"
        )
        why = f"  skipped: {tally.why}" if tally.skipped else ""
        print(f"{name:30} {tally.injected:5} {tally.skipped:5} {tally.recovered:5} {times}{within}{calm}{why}")
    print(f"{'in all':30} {sum(each.injected for each in world.tallies.values()):5}")
    print(f"kills of drivers and of Ray's services that found jobs at work: {world.num_hit}")
    print(f"requests to S3 that were failed: {world.proxy.num_faults}")
    charged = [row for row in world.sight.jobs() if row.worker_losses]
    print(f"attempts charged for workers that were lost alone with a job: {len(charged)}")
    print(f"contradictions: {len(problems)}")
    for problem in problems[:_MAX_TOLD]:
        print(f"  {problem}")


if __name__ == "__main__":
    sys.exit(main())
