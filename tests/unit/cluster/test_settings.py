"""Settings come from the environment and a file, and every name is checked."""

import re
from pathlib import Path

import pytest

from cluster.settings import Settings, load_settings, worker_settings
from jobs.allowance import Allowance
from jobs.errors import BadInputError

OPERATIONS = Path(__file__).parents[3] / "docs" / "operations.md"


@pytest.fixture(autouse=True)
def _clean(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.delenv("MERGEFLEET_CONFIG", raising=False)
    monkeypatch.delenv("MERGEFLEET_DEBUG", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_nothing_has_to_be_set(tmp_path):
    settings = load_settings()
    assert settings.home == tmp_path / ".mergefleet"
    assert settings.store == f"sqlite:///{tmp_path}/.mergefleet/mergefleet.db"
    assert {settings.cache.parent, settings.scratch.parent, settings.reports.parent} == {settings.home}


def test_the_home_moves_everything_below_it(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_HOME", "/data/fleet")
    settings = load_settings()
    assert settings.store == "sqlite:////data/fleet/mergefleet.db"
    assert settings.cache == Path("/data/fleet/cache")


def test_the_environment_goes_before_the_file_and_arguments_before_both(monkeypatch, tmp_path):
    (tmp_path / "mergefleet.toml").write_text('workers = 3\nresident_bytes = "2GB"\nlease_seconds = 60\n')
    monkeypatch.setenv("MERGEFLEET_LEASE_SECONDS", "45")
    settings = load_settings(workers=7)
    assert (settings.workers, settings.lease_seconds, settings.resident_bytes) == (7, 45.0, 2_000_000_000)


def test_the_file_can_be_named(monkeypatch, tmp_path):
    (tmp_path / "other.toml").write_text("workers = 2\n")
    monkeypatch.setenv("MERGEFLEET_CONFIG", str(tmp_path / "other.toml"))
    assert load_settings().workers == 2


def test_a_named_file_that_is_missing_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("MERGEFLEET_CONFIG", str(tmp_path / "none.toml"))
    with pytest.raises(BadInputError, match=r"cannot read .*none\.toml"):
        load_settings()


def test_an_unknown_variable_is_refused_with_the_nearest_name(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_WORKER", "2")
    with pytest.raises(BadInputError, match=r"MERGEFLEET_WORKER \(nearest: MERGEFLEET_WORKERS\)"):
        load_settings()


@pytest.mark.parametrize("written", ["use_magic, more", "use_magic,more,"])
def test_inert_fields_are_names_with_commas_between(monkeypatch, written):
    monkeypatch.setenv("MERGEFLEET_INERT_ADAPTER_FIELDS", written)
    settings = load_settings()
    assert settings.inert_adapter_fields == {"use_magic", "more"}
    assert worker_settings(settings, device="cpu", num_threads=1).inert_adapter_fields == {"use_magic", "more"}


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "mergefleet.toml").write_text("lease_second = 3\n")
    with pytest.raises(BadInputError, match=r"mergefleet\.toml: lease_second \(nearest: lease_seconds\)"):
        load_settings()


def test_a_file_that_is_no_toml_is_refused(tmp_path):
    (tmp_path / "mergefleet.toml").write_text("workers: 3\n")
    with pytest.raises(BadInputError, match="is no TOML"):
        load_settings()


def test_all_wrong_values_are_named_at_once(monkeypatch, tmp_path):
    (tmp_path / "mergefleet.toml").write_text('device = "tpu"\n')
    monkeypatch.setenv("MERGEFLEET_WORKERS", "many")
    with pytest.raises(BadInputError, match=r"device: .*'tpu'; MERGEFLEET_WORKERS: .*'many'"):
        load_settings()


def test_the_message_about_a_store_does_not_show_its_password(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_STORE", "user:hunter2@db")
    with pytest.raises(BadInputError, match="MERGEFLEET_STORE") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_a_setting_that_would_be_ignored_is_refused(monkeypatch):
    monkeypatch.setenv("MERGEFLEET_DASHBOARD", "false")
    monkeypatch.setenv("MERGEFLEET_DASHBOARD_PORT", "9000")
    with pytest.raises(BadInputError, match="dashboard_port"):
        load_settings()


def test_every_setting_says_what_it_is():
    source = Path(load_settings.__code__.co_filename).read_text()
    body = source[source.index("class Settings") : source.index("@model_validator")]
    assert body.count('"""') == 2 * (len(Settings.model_fields) + 1)


def test_lists_of_places_come_from_the_environment_and_the_file(monkeypatch, tmp_path):
    assert load_settings().allowance == Allowance()
    (tmp_path / "mergefleet.toml").write_text('allowed_sources = ["/models", "hf://org/*"]\n')
    monkeypatch.setenv("MERGEFLEET_ALLOWED_DESTINATIONS", "s3://out/team, /srv/releases")
    settings = load_settings()
    assert settings.allowed_sources == ("/models", "hf://org/*")
    assert settings.allowed_destinations == ("s3://out/team", "/srv/releases")
    assert worker_settings(settings, device="cpu", num_threads=1).allowance == settings.allowance != Allowance()


@pytest.mark.parametrize("value", ["", "models", "s3://out,", "s3://*"])
def test_a_list_that_would_mean_something_else_is_refused(monkeypatch, value):
    monkeypatch.setenv("MERGEFLEET_ALLOWED_SOURCES", value)
    with pytest.raises(BadInputError, match=r"MERGEFLEET_ALLOWED_SOURCES: .*expected /path, s3://bucket"):
        load_settings()


def test_the_defaults_that_operators_read_are_those_of_the_settings():
    """Every plain number, and every word in code, of the table in docs/operations.md."""
    rows = re.findall(
        r"^\| `MERGEFLEET_([A-Z_]+)` \| .* \| (?:`([a-z]+)`|(\d+)) \|$", OPERATIONS.read_text(), re.MULTILINE
    )
    assert len(rows) >= 5
    for name, word, number in rows:
        assert Settings.model_fields[name.lower()].default == (word or float(number)), name
