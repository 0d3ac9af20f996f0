"""Which faults there are, how often each comes, and in which order: drawn from a seed."""

import functools
import random
from collections.abc import Callable

from tests.chaos.campaign import kills, surroundings
from tests.chaos.campaign.proxy import Weather

Inject = Callable[..., str | None]
"""Injects a fault; returns why it could not."""

_KILLS_OF_DRIVERS = frozenset({"driver killed", "supervisor killed", "driver and supervisor killed"})
_STAGES = ("PLANNING", "MERGING", "VERIFYING", "PUBLISHING")


def _plan(*, is_sqlite: bool) -> list[tuple[str, int, Inject]]:
    """Return every kind of fault, with how many of a hundred it is."""
    p = functools.partial
    kinds: list[tuple[str, int, Inject]] = [
        *((f"worker killed, {state}", 4, p(kills.kill_worker, state=state)) for state in _STAGES),
        ("driver killed", 15, p(kills.kill_driver)),
        ("supervisor killed", 5, p(kills.kill_driver, driver=False, supervisor=True)),
        ("driver and supervisor killed", 6, p(kills.kill_driver, supervisor=True)),
        ("worker frozen", 2, kills.freeze_worker),
        ("driver frozen", 3, kills.freeze_driver),
        ("gcs_server killed", 2, p(kills.kill_part, part="gcs_server")),
        ("raylet killed", 2, p(kills.kill_part, part="raylet")),
        ("memory exhausted", 1, kills.exhaust_memory),
        (
            "S3 away 120 s",
            1,
            p(surroundings.bad_weather, name="S3 away 120 s", weather=Weather(refused=True), seconds=120),
        ),
        ("S3 away 8 s", 3, p(surroundings.bad_weather, name="S3 away 8 s", weather=Weather(refused=True), seconds=8)),
        (
            "S3 20 % faulty",
            2,
            p(surroundings.bad_weather, name="S3 20 % faulty", weather=Weather(share=0.2), seconds=20),
        ),
        (
            "S3 50 % faulty",
            2,
            p(surroundings.bad_weather, name="S3 50 % faulty", weather=Weather(share=0.5), seconds=15),
        ),
        (
            "S3 cuts answers",
            2,
            p(surroundings.bad_weather, name="S3 cuts answers", weather=Weather(cut_share=0.3), seconds=12),
        ),
        ("S3 slow", 2, p(surroundings.bad_weather, name="S3 slow", weather=Weather(delay_seconds=1.0), seconds=10)),
        ("S3 denies (403)", 2, surroundings.refuse_credentials),
        ("destination full", 2, p(surroundings.fill_disk, name="destination full", directory="releases", seconds=10)),
        ("scratch full", 2, p(surroundings.fill_disk, name="scratch full", directory="scratch", seconds=10)),
        ("home read-only", 1, surroundings.make_home_read_only),
        ("ledger locked", 2, surroundings.lock_ledger),
        ("clock forward 1 h", 2, p(surroundings.step_clock, seconds=3600.0)),
        ("clock back 1 h", 2, p(surroundings.step_clock, seconds=-3600.0)),
        ("submitted again", 5, surroundings.submit_again),
        *((f"cancel, {state}", 2, p(surroundings.cancel_and_retry, state=state)) for state in _STAGES),
        ("cancelled for good", 2, p(surroundings.cancel_and_retry, state="MERGING", again=False)),
        ("queue paused", 2, p(surroundings.pause_and_resume, what="queue")),
        ("place paused", 2, p(surroundings.pause_and_resume, what="place")),
    ]
    if is_sqlite:
        kinds += [
            ("second driver", 2, kills.start_second_driver),
            (
                "ledger's disk full",
                1,
                p(surroundings.fill_disk, name="ledger's disk full", directory="ledger", seconds=8),
            ),
        ]
    else:
        kinds += [("Postgres stopped", 3, p(surroundings.stop_postgres, seconds=20))]
    return kinds


def draw_faults(num_faults: int, rng: random.Random, *, is_sqlite: bool) -> list[tuple[str, Inject]]:
    """Draw so many faults: every kind in its share, in random order, those of the bucket's denial not first."""
    kinds = _plan(is_sqlite=is_sqlite)
    total = sum(weight for _, weight, _ in kinds)
    counts = [weight * num_faults / total for _, weight, _ in kinds]
    whole = [int(count) for count in counts]
    by_rest = sorted(range(len(kinds)), key=lambda index: whole[index] - counts[index])
    for index in by_rest[: num_faults - sum(whole)]:
        whole[index] += 1
    faults = [(name, inject) for (name, _, inject), count in zip(kinds, whole, strict=True) for _ in range(count)]
    rng.shuffle(faults)
    return _in_pairs(faults, rng)


def _in_pairs(faults: list[tuple[str, Inject]], rng: random.Random) -> list[tuple[str, Inject]]:
    """Have each second kill of a driver follow the one before it: the fleet is hit again while it comes up."""
    kills_of_drivers = [fault for fault in faults if fault[0] in _KILLS_OF_DRIVERS]
    others: list[list[tuple[str, Inject]]] = [[fault] for fault in faults if fault[0] not in _KILLS_OF_DRIVERS]
    for index in range(0, len(kills_of_drivers), 2):
        pair = [
            (name, functools.partial(inject, at_work=number == 0))
            for number, (name, inject) in enumerate(kills_of_drivers[index : index + 2])
        ]
        others.insert(rng.randrange(len(others) + 1), pair)
    return [fault for group in others for fault in group]
