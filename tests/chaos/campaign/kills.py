"""Faults of processes: workers, drivers, supervisors and Ray's own are killed or frozen."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import psutil

from jobs.states import ACTIVE_STATES
from tests.chaos.campaign.fleet import LEASE_SECONDS, UNRESPONSIVE_SECONDS, Slot
from tests.chaos.campaign.world import AT_WORK, LATER, UP_SECONDS, World

_KIND_FOR = {"PLANNING": None, "MERGING": "wide", "VERIFYING": "full", "PUBLISHING": "bucket"}
_HOG = "import sys, time; held = bytearray({0}); held[::4096] = b'x' * len(held[::4096]); time.sleep(20)"
_MEMORY_MARGIN = 3 << 30


def kill_worker(world: World, state: str) -> str | None:
    """Kill the worker of a job that is at a stage."""
    if not world.is_up(UP_SECONDS):
        return f"{LATER}no worker is up"
    end = time.monotonic() + 25
    world.feed(2, _KIND_FOR[state])
    while time.monotonic() < end:
        row = world.catch(state, 5)
        if row is None:
            continue
        if (victim := _worker_of(world, row)) is not None:
            before = world.active()
            with contextlib.suppress(psutil.Error):
                victim.kill()
            world.watch(f"worker killed, {state}", _lost_and_again(world, before))
            return None
        time.sleep(0.02)
    return f"{LATER}no worker could be caught there"


def _worker_of(world: World, row: Any) -> psutil.Process | None:
    """Return the worker that is at a job: by the base in its title, where Ray's title tells it.

    None while a job is at work that has cost a worker: it is documented that the second one is held against it.
    """
    if any(each.worker_losses for each in world.sight.jobs(*AT_WORK)):
        return None
    busy = world.fleet.workers(world.slot_of(row))
    base = row.base.rpartition("/")[2]
    named = [each for each in busy if f":{base}:" in _words(each)]
    return world.rng.choice(named or busy) if busy else None


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def _lost_and_again(world: World, before: list[tuple[str, int]]) -> Any:
    """Return what tells whether a job that lost its worker is at work again."""

    def is_back() -> bool:
        unharmed = 0
        for job_id, last in before:
            states = []
            was_lost = False
            for each in world.sight.events_of(job_id, last):
                if was_lost and each.state in ("PLANNING", "PUBLISHED"):
                    return True
                states.append(each.state)
                was_lost |= each.detail.get("failure") == "worker_lost"
            unharmed += "PUBLISHED" in states and not was_lost
        return unharmed == len(before)

    return is_back


def _driver_of(world: World, slot: Slot) -> psutil.Process | None:
    """Return the driver of a slot, as soon as there is one."""
    end = time.monotonic() + 20
    while (process := world.fleet.driver(slot)) is None and time.monotonic() < end:
        time.sleep(0.1)
    return process


def _jobs_of(world: World, driver: psutil.Process) -> list[tuple[str, int]]:
    """Return the jobs that a driver holds, each with its last event."""
    rows = [each for each in world.sight.jobs(*map(str, ACTIVE_STATES)) if f"-{driver.pid}-" in each.owner]
    world.num_hit += any(each.state in AT_WORK for each in rows)
    return [(each.id, each.num_events) for each in rows]


def kill_driver(world: World, *, at_work: bool, driver: bool = True, supervisor: bool = False) -> str | None:
    """Kill a driver, its supervisor or both: while something is at work, or at whatever it does when it has started."""
    world.feed(1)
    row = world.catch(None, 20) if at_work and world.is_up(UP_SECONDS) else None
    slot = world.slot_of(row)
    if (process := _driver_of(world, slot)) is None or slot.process is None:
        return "no driver was up"
    if row is None:
        time.sleep(world.rng.uniform(0, 6))
    lost = _jobs_of(world, process)
    if supervisor:
        slot.process.kill()
    if driver:
        with contextlib.suppress(psutil.Error):
            process.kill()
    name = " and ".join(["driver"] * driver + ["supervisor"] * supervisor) + " killed"
    world.at_work_again(name, lost)
    psutil.wait_procs([process], timeout=20)
    return None


def freeze_worker(world: World) -> str | None:
    """Stop a worker for longer than it may answer nothing, then let it go on."""
    if not world.is_up(UP_SECONDS):
        return f"{LATER}no worker is up"
    end = time.monotonic() + 60
    victim = None
    while victim is None and time.monotonic() < end:
        world.feed(2, "wide")
        row = world.catch("MERGING", 5)
        victim = None if row is None else _worker_of(world, row)
    if victim is None:
        return "no worker could be caught at work"

    def last() -> None:
        with contextlib.suppress(psutil.Error):
            victim.suspend()
            time.sleep(UNRESPONSIVE_SECONDS + 3)
            victim.resume()

    world.beside("worker frozen", last)
    return None


def freeze_driver(world: World) -> str | None:
    """Stop a driver until its leases have run out, then let it go on."""
    if not world.is_up(UP_SECONDS):
        return f"{LATER}no worker is up"
    world.feed(3)
    row = world.catch(None)
    process = world.fleet.driver(world.slot_of(row))
    if row is None or process is None:
        return f"{LATER}no driver was at work"

    def last() -> None:
        with contextlib.suppress(psutil.Error):
            process.suspend()
            time.sleep(LEASE_SECONDS + 4)
            process.resume()

    world.beside("driver frozen", last)
    return None


def kill_part(world: World, part: str) -> str | None:
    """Kill one of Ray's own services."""
    world.feed(2)
    slot = world.slot_of(world.catch(None, 20) if world.is_up(UP_SECONDS) else None)
    end = time.monotonic() + 15
    while (process := world.fleet.part(slot, part)) is None and time.monotonic() < end:
        time.sleep(0.2)
    if process is None:
        return f"{LATER}no {part} was up"
    driver = world.fleet.driver(slot)
    lost = [] if driver is None else _jobs_of(world, driver)
    with contextlib.suppress(psutil.Error):
        process.kill()
    world.at_work_again(f"{part} killed", lost)
    if driver is not None:
        psutil.wait_procs([driver], timeout=20)
    return None


def exhaust_memory(world: World) -> str | None:
    """Start a driver whose Ray minds memory a little above what is used now, and use more for a moment."""
    slot = world.rng.choice(world.fleet.slots)
    process = _driver_of(world, slot)
    if process is None or slot.process is None:
        return "no driver was up"
    memory = psutil.virtual_memory()
    used = memory.total - memory.available
    threshold = (used + _MEMORY_MARGIN) / memory.total
    if threshold > 0.8:
        return f"the machine uses {used >> 30} GiB of {memory.total >> 30} already"
    slot.extra = {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}
    slot.process.kill()
    with contextlib.suppress(psutil.Error):
        process.kill()
    world.feed(3, "wide")
    if not _is_up(world, slot):
        return "the driver that minds memory did not come up"
    before = world.sight.count("PLANNING")
    world.feed(3, "wide")
    end = time.monotonic() + 60
    while world.sight.count("PLANNING") == before and time.monotonic() < end:
        time.sleep(0.1)
    world.beside("memory exhausted", lambda: _use_memory(threshold, memory.total))
    return None


def _is_up(world: World, slot: Slot) -> bool:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if world.fleet.workers(slot, busy=False):
            return True
        time.sleep(0.2)
    return False


def _use_memory(threshold: float, total: int) -> None:
    now = psutil.virtual_memory()
    size = int(threshold * total) - (now.total - now.available) + (1 << 30)
    hog = subprocess.Popen([sys.executable, "-c", _HOG.format(max(size, 1 << 30))])
    try:
        hog.wait(6)
    except subprocess.TimeoutExpired:
        os.kill(hog.pid, signal.SIGKILL)
        hog.wait()


def start_second_driver(world: World) -> str | None:
    """Start another driver on a ledger in SQLite, which takes one."""
    if not world.sight.is_sqlite:
        return "Postgres takes several: two work through the whole campaign"
    done = threading.Event()

    def last() -> None:
        if world.fleet.driver(world.fleet.slots[0]) is None:
            return
        code, said = world.fleet.command("run", "--json", "--workers", "1", "--drain")
        if code != 2 or "has a driver already" not in said:
            world.problems.append(f"a second driver on SQLite ended with {code}, not 2: {said[-300:]}")
        done.set()

    world.beside("second driver", last)
    return None
