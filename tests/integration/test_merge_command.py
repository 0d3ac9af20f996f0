"""`plan`, `merge`, `verify` and `pull` on real pico models, through the command line."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.settings import Settings
from tests.models import build_llama, make_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    base = build_llama(directory / "base")
    for name in ("north", "south"):
        make_adapter(base, directory / name)
    return directory


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result


def merge(models, to, *arguments, adapters=("north",)):
    named = [part for name in adapters for part in ("--adapter", models / name)]
    return call("merge", "--base", models / "base", *named, "--to", to, "--parity", "arithmetic", *arguments)


def test_one_adapter_goes_to_the_destination_and_is_verified_and_pulled(models, tmp_path):
    code, result = merge(models, tmp_path / "out", "--json")
    assert code == 0, result.output
    [merged] = json.loads(result.stdout)["merges"]
    assert merged["release"]["created"] is True
    code, result = call("verify", tmp_path / "out", "--json")
    assert (code, json.loads(result.stdout)["merge_key"]) == (0, merged["release"]["merge_key"])
    code, result = call("pull", tmp_path / "out", tmp_path / "copy", "--json")
    assert code == 0
    assert (tmp_path / "copy" / "config.json").exists()


def test_the_same_merge_again_writes_nothing(models, tmp_path):
    merge(models, tmp_path / "out")
    code, result = merge(models, tmp_path / "out", "--json")
    assert (code, json.loads(result.stdout)["merges"][0]["release"]["created"]) == (0, False)


def test_several_adapters_go_below_the_destination_by_their_names(models, tmp_path):
    code, result = merge(models, tmp_path / "out", adapters=("north", "south"))
    assert code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["north", "south"]
    assert result.stdout.count("tensors changed") == 2


def test_an_adapter_that_fails_fails_alone_and_the_exit_code_tells(models, tmp_path):
    code, result = merge(models, tmp_path / "out", "--json", adapters=("north", "nowhere"))
    assert code == 2
    north, nowhere = json.loads(result.stdout)["merges"]
    assert north["release"] is not None
    assert nowhere["failure"]["class"] == "not_found"


def test_a_release_that_was_changed_is_not_verified(models, tmp_path):
    merge(models, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, result = call("verify", tmp_path / "out")
    assert code == 2
    assert "model.safetensors: SHA-256" in result.stderr


def test_plan_tells_what_would_happen_and_which_requests_are_bad(models, tmp_path):
    path = tmp_path / "requests.jsonl"
    lines = [
        {"id": name, "base": str(models / "base"), "adapter": str(models / name), "destination": str(tmp_path / name)}
        for name in ("north", "nowhere")
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, result = call("plan", path, "--json")
    assert code == 2
    north, nowhere = json.loads(result.stdout)["requests"]
    assert north["plan"]["num_changed_tensors"] == 14
    assert north["plan"]["bytes_read"] > north["plan"]["bytes_written"] // 2
    assert nowhere["failure"]["class"] == "not_found"
    code, result = call("plan", path)
    assert code == 2
    assert "14 of" in result.stdout
    assert "nowhere: not_found" in result.stderr
    assert not (tmp_path / "north").exists()


def test_what_should_be_known_of_a_release_is_told_before_and_with_it(models, tmp_path):
    adapter = shutil.copytree(models / "north", tmp_path / "ending-elsewhere")
    config = json.loads((models / "base" / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|begin|>"}))
    path = tmp_path / "requests.jsonl"
    request = {"id": "it", "base": str(models / "base"), "adapter": str(adapter), "destination": str(tmp_path / "out")}
    path.write_text(json.dumps(request | {"base_quantization": "none", "parity": {"level": "arithmetic"}}))
    code, result = call("plan", path, "--json")
    [planned] = json.loads(result.stdout)["requests"]
    [note] = planned["notes"]
    assert (code, note[:40]) == (0, "the tokenizer ends at '<|begin|>' (id 0)")
    assert f"it  note: {note}" in call("plan", path)[1].stdout
    arguments = ("merge", "--base", models / "base", "--adapter", adapter, "--to", tmp_path / "out")
    code, result = call(*arguments, "--base-quantization", "none", "--parity", "arithmetic")
    assert f"{tmp_path / 'out'}  note: {note}" in result.stdout
    for name in ("manifest.json", "parity.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["notes"] == [note]


def test_plan_tells_the_memory_of_a_gpu_that_this_machine_need_not_have(models, tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl"
    requests = [
        {
            "id": kind,
            "base": str(models / "base"),
            "adapter": str(models / "north"),
            "base_quantization": kind,
            "destination": str(tmp_path / kind),
        }
        for kind in ("none", "nf4")
    ]
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    found = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setenv("MERGEFLEET_DEVICE", device)
        _, result = call("plan", path, "--json")
        plans = [each["plan"] for each in json.loads(result.stdout)["requests"]]
        found[device] = [(plan["peak_memory_bytes"], plan["peak_device_memory_bytes"]) for plan in plans]
    assert [on_device for _, on_device in found["cpu"]] == [0, 0]
    assert 0 < found["cuda"][0][1] < found["cuda"][1][1]  # the base in 4-bit lies there, too
    assert all(on_gpu > on_cpu for (on_cpu, _), (on_gpu, _) in zip(found["cpu"], found["cuda"], strict=True))
    _, result = call("plan", path)
    assert "GPU" in result.stdout


def test_plan_names_what_is_combined(models, tmp_path):
    path = tmp_path / "requests.jsonl"
    adapters = [{"adapter": str(models / "north"), "weight": 0.5}, {"adapter": str(models / "south"), "weight": -1}]
    how = {"type": "svd", "svd_rank": 4}
    places = {"base": str(models / "base"), "destination": str(tmp_path / "both")}
    path.write_text(json.dumps({"id": "both", "adapters": adapters, "combination": how, **places}) + "\n")
    code, result = call("plan", path, "--json")
    assert code == 0
    (both,) = json.loads(result.stdout)["requests"]
    assert (both["adapters"], both["combination"]) == (adapters, how)
    assert both["plan"]["num_changed_tensors"] == 14
    code, result = call("plan", path)
    assert code == 0
    assert "svd" in result.stdout
    assert not list(tmp_path.rglob("combined"))
