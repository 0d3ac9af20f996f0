"""The systemd unit, as systemd reads it."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import exit_codes
from jobs.errors import FailureClass
from jobs.policy import failure_policy
from workers.sources.confinement import ALLOWED

UNIT = Path(__file__).parents[4] / "cluster" / "deploy" / "mergefleet.service"
ANALYZE = shutil.which("systemd-analyze")
needs_systemd = pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not on this machine")


@pytest.fixture(scope="module")
def service():
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser["Service"]


def analyze(*arguments):
    return subprocess.run([ANALYZE, *arguments], capture_output=True, text=True, check=False)


@needs_systemd
def test_systemd_takes_every_line_of_it(tmp_path, service):
    """The program itself is not where the unit will find it: another one stands in for it."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(service["ExecStart"].split()[0], sys.executable))
    result = analyze("verify", "--man=no", str(copy))
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


@needs_systemd
def test_systemd_would_tell_a_wrong_line(tmp_path):
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace("KillMode=mixed", "KillMode=gently"))
    assert "gently" in analyze("verify", "--man=no", str(copy)).stderr


@needs_systemd
def test_little_is_left_to_it():
    """By systemd's own figure, where 100 is a service without any of it; GPUs and compiled kernels cost the rest."""
    result = analyze("security", "--offline=true", "--no-pager", "--threshold=25", str(UNIT))
    assert result.returncode == 0, result.stdout[-300:]


@needs_systemd
def test_pickled_adapters_can_still_be_read(service):
    """The process that reads them closes itself in, and then uses these system calls."""
    allowed = set()
    waiting = service["SystemCallFilter"].split()
    while waiting:
        name = waiting.pop()
        if not name.startswith("@"):
            allowed.add(name)
            continue
        lines = analyze("syscall-filter", name).stdout.splitlines()[1:]
        waiting += [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    assert {"seccomp", "prctl"} <= allowed
    assert ALLOWED.keys() - allowed == set()


def test_exit_codes_that_no_restart_cures(service):
    """What may go away by itself is restarted; wrong settings and failed parity are not."""
    prevented = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert service["Restart"] == "on-failure"
    assert prevented == {exit_codes.BAD_INPUT, exit_codes.PARITY_FAILED}
    policy = failure_policy()
    assert not prevented & {exit_codes.EXIT_CODES[each] for each in FailureClass if policy[each].attempts > 1}


def test_the_driver_alone_is_asked_to_stop(service):
    """Sent to all of the group, the signal would end its workers in the middle of their units, and Ray with them."""
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")
    assert service["SuccessExitStatus"].split() == [str(exit_codes.WORK_LEFT), str(128 + 15)]


def test_kernels_can_be_compiled_and_gpus_be_seen(service):
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "DeviceAllow", "DevicePolicy", "ProcSubset"} & set(service)
