"""Faults of what jobs depend on: the bucket, disks, the ledger, its clock; and what people do meanwhile."""

import subprocess
import time

from tests.chaos.campaign.proxy import Weather
from tests.chaos.campaign.world import LATER, UP_SECONDS, World, filled

_MIN_FAULTS = 5
_MAX_LONGER = 45.0
"""Requests that must have met a fault of the bucket, and how many seconds longer it lasts for that at most."""


def bad_weather(world: World, name: str, weather: Weather, seconds: float) -> str | None:
    """Have the bucket at fault for a while, and until requests have met it."""
    if any(other.startswith("S3") for other in world.lasting):
        return f"{LATER}the bucket is at fault"
    if not world.is_up(UP_SECONDS):
        return f"{LATER}no worker is up"
    world.feed(3, "bucket")
    before = world.proxy.num_faults
    is_told = weather.share > 0 or weather.cut_share > 0

    def last() -> None:
        end = time.monotonic() + seconds
        with world.proxy.turned(weather):
            while time.monotonic() < end or (
                is_told and world.proxy.num_faults - before < _MIN_FAULTS and time.monotonic() < end + _MAX_LONGER
            ):
                time.sleep(0.2)

    world.beside(name, last)
    return None


def refuse_credentials(world: World) -> str | None:
    """Have the bucket deny everything, once something was published there."""
    if not any(row.state == "PUBLISHED" and row.destination.startswith("s3://") for row in world.sight.jobs()):
        return f"{LATER}nothing was published in the bucket before"
    return bad_weather(world, "S3 denies (403)", Weather(share=1.0, statuses=(403,)), 10)


def fill_disk(world: World, name: str, directory: str, seconds: float) -> str | None:
    """Have a disk full for a while."""
    if why := world.mounts.get(directory):
        return why
    if name in world.lasting:
        return f"{LATER}it is full"
    world.feed(2, "wide" if directory == "releases" else "bucket")

    def last() -> None:
        with filled(world.directory / directory):
            time.sleep(seconds)

    world.beside(name, last)
    return None


def make_home_read_only(world: World, seconds: float = 20.0) -> str | None:
    """Have the home read-only for a while; what is kept open for writing, ledger and logs, lies elsewhere."""
    if why := world.mounts.get("home"):
        return why
    home = str(world.directory / "home")
    for _ in range(100):
        done = subprocess.run(["mount", "-o", "remount,ro", home], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        time.sleep(0.1)
    else:
        return f"it could not be remounted: {done.stderr.strip()}"
    world.feed(2, "nf4")

    def last() -> None:
        time.sleep(seconds)
        subprocess.run(["mount", "-o", "remount,rw", home], check=True)

    world.beside("home read-only", last)
    return None


def lock_ledger(world: World, seconds: float = 15.0) -> str | None:
    """Have another process lock the ledger for longer than a driver waits."""
    if "ledger locked" in world.lasting or "Postgres stopped" in world.lasting:
        return f"{LATER}the ledger is at fault"
    world.feed(2)
    world.catch(None, 10)

    def last() -> None:
        with world.sight.locked():
            time.sleep(seconds)

    world.beside("ledger locked", last)
    return None


def stop_postgres(world: World, seconds: float) -> str | None:
    """Stop the database server, and start it again."""
    postgres = world.postgres
    if postgres is None:
        return "the ledger is a file"
    if "ledger locked" in world.lasting or "Postgres stopped" in world.lasting:
        return f"{LATER}the ledger is at fault"
    world.feed(2)

    def last() -> None:
        with postgres.stopped():
            time.sleep(seconds)

    world.beside("Postgres stopped", last)
    return None


def step_clock(world: World, seconds: float) -> str | None:
    """Step the clock, as the ledger sees it: times that it holds move the other way."""
    world.feed(2)
    world.catch(None, 10)
    world.sight.step_clock(-seconds)
    world.publishing_again(f"clock {'forward' if seconds > 0 else 'back'} 1 h")
    return None


def submit_again(world: World) -> str | None:
    """Submit a file again that was submitted before."""
    world.feed(1)
    count = len(world.sight.jobs())
    was_calm = not world.lasting
    code, said = world.fleet.command("submit", str(world.directory / "requests.yaml"), "--json")
    if code and was_calm and not world.lasting:
        world.problems.append(f"the file could not be submitted again: {said[-300:]}")
    if len(world.sight.jobs()) < count:
        world.problems.append("a submission took jobs away")
    return None


def cancel_and_retry(world: World, state: str, *, again: bool = True) -> str | None:
    """Cancel a job at a stage, see how long it takes, and have it tried again."""
    if not world.is_up(UP_SECONDS):
        return f"{LATER}no worker is up"
    world.feed(2, {"MERGING": "wide", "VERIFYING": "full", "PUBLISHING": "bucket"}.get(state))
    row = world.catch(state, 15)
    if row is None:
        return f"{LATER}no job could be caught there"
    if row.id not in world.insist(lambda: world.store.cancel([row.id])):
        return "it had ended"
    world.cancelled.add(row.id)
    since = time.monotonic()
    was_calm = not world.lasting
    end = since + 60
    while time.monotonic() < end:
        events = [each.state for each in world.sight.events_of(row.id, row.num_events)]
        if {"CANCELLED", "PUBLISHED"} & set(events):
            tally = world.tally(f"cancel, {state}")
            took = time.monotonic() - since
            tally.recovered += 1
            tally.all_seconds.append(took)
            if was_calm and not world.lasting:
                tally.seconds.append(took)
            break
        time.sleep(0.05)
    else:
        world.problems.append(f"job '{row.id}' was asked to stop in {state} and was not CANCELLED within 60 s")
    if again:
        world.insist(lambda: world.store.retry([row.id]))
    return None


def pause_and_resume(world: World, what: str, seconds: float = 4.0) -> str | None:
    """Pause the queue or a place by hand, and resume it."""
    name = {"queue": "", "place": f"s3://{world.s3.bucket}"}[what]
    arguments = [what, *([name] if name else [])]
    world.feed(1)

    def last() -> None:
        from jobs.ledger.pauses import Scope

        scope = Scope(what)
        world.insist(lambda: world.store.pause(scope, name, "campaign", "to see"))
        time.sleep(seconds)
        world.insist(lambda: world.store.resume(scope, name))

    world.beside(f"{arguments[0]} paused", last)
    return None
