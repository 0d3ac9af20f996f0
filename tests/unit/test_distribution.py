"""The wheel holds the three rooms, whole, and the command; nothing else of the repository."""

import email
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = ("jobs", "workers", "cluster")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built with the pinned backend of this environment, without a network."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", directory, ROOT], check=True)
    (path,) = directory.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def _metadata_file(wheel, name):
    (path,) = (path for path in wheel.namelist() if path.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_holds_every_file_of_the_rooms_and_nothing_else(wheel):
    expected = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {path for path in wheel.namelist() if ".dist-info/" not in path}
    assert found == expected
    assert "workers/parity/report.html.j2" in found


def test_names_the_command_the_python_and_the_license(wheel):
    assert "mergefleet = cluster.cli:main" in _metadata_file(wheel, "entry_points.txt")
    metadata = email.message_from_string(_metadata_file(wheel, "METADATA"))
    assert metadata["Name"] == "mergefleet"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in _metadata_file(wheel, "licenses/LICENSE")


def test_the_command_runs_from_the_wheel_alone(wheel, tmp_path):
    """With the repository off the path: what the command imports is in the wheel."""
    wheel.extractall(tmp_path)
    program = (
        f"import sys; sys.path = [{str(tmp_path)!r}] + [path for path in sys.path if path != {str(ROOT)!r}]\n"
        "import jobs, workers, cluster.cli\n"
        f"assert all(room.__file__.startswith({str(tmp_path)!r}) for room in (jobs, workers, cluster))\n"
        "cluster.cli.main()"
    )
    command = [sys.executable, "-I", "-c", program, "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "submit" in result.stdout


def test_everything_that_is_installed_for_it_is_pinned():
    """Each requirement of the project and of its checks has an exact version, and so has each of theirs."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and next(iter(pin.specifier)).operator == "==" for pin in pins)
    assert not [pin for pin in pins if next(iter(pin.specifier)).version.count("+")], (
        "a local version ties it to a platform"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    waiting = [
        *project["project"]["dependencies"],
        *project["dependency-groups"]["dev"],
        *project["build-system"]["requires"],
    ]
    needed = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in needed:
            continue
        needed.add(key)
        for line in importlib.metadata.requires(requirement.name) or ():
            marker = Requirement(line).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *requirement.extras)):
                waiting.append(line)
    assert {name for name, _ in needed} - {canonicalize_name(pin.name) for pin in pins} == set()
