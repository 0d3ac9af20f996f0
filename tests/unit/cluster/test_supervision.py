"""A driver that ends unasked is started anew; one that ends in order, or is stopped, is not."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from cluster.commands.supervision import Supervisor

# A process of its own: it forks, and takes signals.
SCRIPT = """
import os, signal, sys, time
from cluster.commands.supervision import Supervisor

directory, mode, pause = sys.argv[1:]

def drive(predecessor, tell_name):
    number = len(os.listdir(directory))
    open(os.path.join(directory, str(number)), "w").write(f"{os.getpid()} {predecessor}")
    tell_name(f"driver-{number}")
    if mode == "dies" or (mode == "dies twice" and number < 2):
        os._exit(7)
    if mode == "raises" and number < 1:
        raise RuntimeError("out of order")
    if mode == "waits":
        stopped = []
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
        signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
        open(os.path.join(directory, "ready"), "w").close()
        while not stopped:
            time.sleep(0.01)
        time.sleep(0.2)
        return 40 + len(stopped)
    return 3

print(Supervisor(drive, float(pause)).run())
"""


def start(directory, mode, pause="0.01"):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(directory), mode, pause],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def drivers(directory):
    """The process and the predecessor of each driver that was started."""
    return [path.read_text().split() for path in sorted(directory.iterdir()) if path.name != "ready"]


@pytest.mark.parametrize(
    ("mode", "code", "predecessors"),
    [
        ("ends", 3, ["None"]),
        ("dies twice", 3, ["None", "driver-0", "driver-1"]),
        ("raises", 3, ["None", "driver-0"]),
        ("dies", 7, ["None", "driver-0", "driver-1", "driver-2", "driver-3"]),
    ],
)
def test_a_driver_is_started_anew_until_it_ends_in_order_or_too_often(tmp_path, mode, code, predecessors):
    with start(tmp_path, mode) as process:
        output, errors = process.communicate(timeout=60)
    assert output == f"{code}\n", errors
    found = drivers(tmp_path)
    assert [predecessor for _, predecessor in found] == predecessors
    assert len({pid for pid, _ in found}) == len(predecessors)
    assert ("given up" in errors) == (mode == "dies")


def wait_for(path):
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("to_group", [False, True])
def test_a_stop_reaches_the_driver_once_and_ends_both(tmp_path, number, to_group):
    """A terminal sends Ctrl-C to the whole process group: it must not count twice."""
    with start(tmp_path, "waits") as process:
        wait_for(tmp_path / "ready")
        (os.killpg if to_group else os.kill)(process.pid, number)
        output, _ = process.communicate(timeout=60)
    assert output == "41\n"
    assert len(drivers(tmp_path)) == 1


def test_a_stop_ends_the_pause_before_the_next_driver(tmp_path):
    with start(tmp_path, "dies", "600") as process:
        [line] = [next(process.stderr)]
        assert "starts anew" in line
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert len(drivers(tmp_path)) == 1


def test_a_driver_ends_with_its_supervisor(tmp_path):
    with start(tmp_path, "waits") as process:
        wait_for(tmp_path / "ready")
        [(pid, _)] = drivers(tmp_path)
        driver = psutil.Process(int(pid))
        process.kill()
        process.wait()
        psutil.wait_procs([driver], timeout=10)
    assert not driver.is_running() or driver.status() == psutil.STATUS_ZOMBIE


def test_handlers_of_signals_are_put_back():
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signals belong to the main thread")
    before = signal.getsignal(signal.SIGTERM)
    supervisor = Supervisor(lambda *_: 0)
    supervisor._run = lambda: 5
    assert supervisor.run() == 5
    assert signal.getsignal(signal.SIGTERM) is before
