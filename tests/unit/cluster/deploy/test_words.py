"""What the files for operators name exists here: settings, commands, versions, exit codes, times to stop."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer.main
import yaml

from cluster.cli import app
from cluster.settings import Settings

ROOT = Path(__file__).parents[4]
DEPLOY = ROOT / "cluster" / "deploy"
TEXTS = {path.name: path.read_text() for path in sorted(DEPLOY.iterdir())}
GROUP = typer.main.get_command(app)
COMMANDS = [
    (name, line.strip())
    for name, text in TEXTS.items()
    for line in re.findall(rf"mergefleet ((?:{'|'.join(GROUP.commands)})\b[^`\n]* --[^`\n\"]*)", text)
]
STOPPING = {
    "mergefleet.service": r"^TimeoutStopSec=(\d+)$",
    "submit-job.sh": r'"RAY_JOB_STOP_WAIT_TIME_S": "(\d+)"',
    "ray-cluster.yaml": r"--stop-timeout=(\d+)",
    "raycluster.yaml": r'RAY_JOB_STOP_WAIT_TIME_S .*\n +value: "(\d+)"',
    "rayjob.yaml": r'RAY_JOB_STOP_WAIT_TIME_S .*\n +value: "(\d+)"',
}


@pytest.mark.parametrize("name", TEXTS)
def test_variables_are_settings(name):
    """A variable that is none would stop every command: unknown names are refused."""
    variables = {each.lower() for each in re.findall(r"MERGEFLEET_([A-Z_]+)", TEXTS[name])}
    ours_alone = {"head_svc_port"}  # named to say what Kubernetes would set
    assert variables - Settings.model_fields.keys() - ours_alone == set()


def test_a_cluster_is_told_no_setting_of_a_local_ray():
    """Such a setting ends a driver that joins one."""
    local = {"dashboard", "dashboard_host", "dashboard_port", "metrics_port", "ray_directory"}
    assert local <= Settings.model_fields.keys()
    for name in ("raycluster.yaml", "rayjob.yaml", "ray-cluster.yaml", "submit-job.sh", "Dockerfile", "mergefleet.env"):
        assert not local & {each.lower() for each in re.findall(r"MERGEFLEET_([A-Z_]+)", TEXTS[name])}, name


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_the_settings_of_a_config_map_are_taken(name, monkeypatch, tmp_path):
    config_map = next(each for each in yaml.safe_load_all(TEXTS[name]) if each["kind"] == "ConfigMap")
    monkeypatch.chdir(tmp_path)
    for variable, value in config_map["data"].items():
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.allowance.sources is not None
    assert settings.allowance.destinations is not None


def test_the_settings_of_the_environment_file_are_taken(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = [line.lstrip("#") for line in TEXTS["mergefleet.env"].splitlines() if re.match("#?[A-Z_]+=", line)]
    assert not [line for line in lines if re.search(r"['\"]", line)], "Docker takes quotes for a part of the value"
    for variable, _, value in (line.partition("=") for line in lines):
        monkeypatch.setenv(variable, value)
    settings = Settings()
    assert settings.store.startswith("postgresql://")
    assert settings.allowance.sources is not None


@pytest.mark.parametrize("line", [pytest.param(line, id=f"{name}: {line}") for name, line in COMMANDS])
def test_commands_are_understood(line):
    command, *words = shlex.split(line)
    GROUP.commands[command].make_context(command, words).close()


def test_commands_are_found_where_drivers_are_started():
    starts = {name for name, line in COMMANDS if line.startswith("run --")}
    assert starts == {"mergefleet.service", "rayjob.yaml", "submit-job.sh"}


@pytest.mark.parametrize("name", ["rayjob.yaml", "submit-job.sh"])
def test_a_driver_inside_a_cluster_joins_it(name):
    (line,) = [line for where, line in COMMANDS if where == name and line.startswith("run")]
    command = GROUP.commands["run"]
    with command.make_context("run", shlex.split(line)[1:]) as context:
        assert context.params["address"] == "auto"


@pytest.mark.parametrize("name", STOPPING)
def test_a_driver_has_the_time_it_takes_to_stop(name):
    """A worker that answers nothing is given up after so many seconds; only then does a driver end without it."""
    found = re.findall(STOPPING[name], TEXTS[name], flags=re.MULTILINE)
    assert found
    assert all(int(seconds) >= Settings.model_fields["unresponsive_seconds"].default + 30 for seconds in found)


def test_versions_are_those_of_the_project():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    tags = {tag for text in TEXTS.values() for tag in re.findall(r"mergefleet:([\w.]+)-(?:cpu|cuda)\b", text)}
    assert tags == {version}
    ray = {each for text in TEXTS.values() for each in re.findall(r'rayVersion: "(.*)"', text)}
    assert ray == {pins["ray"]}


@pytest.mark.parametrize("name", TEXTS)
def test_no_credential_is_in_a_file(name):
    """Names of secrets and empty values, and what cannot be mistaken for one."""
    given = re.findall(r"(?:TOKEN|PASSWORD|SECRET\w*|ACCESS_KEY\w*)[=:][ \"']*([^\s\"']+)", TEXTS[name])
    assert set(given) <= {"token", "...", "PASSWORD@HOST/NAME"}
