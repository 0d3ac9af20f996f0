"""`check` through the command line, and as a part of every merge."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.settings import Settings
from tests.faults import FAULTS, fields
from tests.models import build_llama, build_qwen2, make_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("check") / "base")


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result


def test_a_good_checkpoint_ends_with_0_and_its_notes(base):
    """A checkpoint without a manifest, as transformers saves it."""
    code, result = call("check", base, "--json")
    told = json.loads(result.stdout)
    assert (code, told["num_errors"], told["num_warnings"]) == (0, 0, 0)
    assert told["num_notes"] == len(told["findings"]) > 0
    assert {"rule", "file", "where", "found", "expected", "refused_by", "advice", "source"} <= told["findings"][
        0
    ].keys()


def test_an_error_ends_with_2_and_says_what_to_do(base, tmp_path):
    """Names of a PeftModel, for a person."""
    broken = shutil.copytree(base, tmp_path / "broken")
    FAULTS["saved as a PeftModel"][2](broken)
    code, result = call("check", broken)
    assert code == 2
    assert "error  names.left-of-peft  model.safetensors: base_model.model." in result.stdout
    assert "refused by vllm, sglang, llama.cpp; misread by transformers-5, transformers-4" in result.stdout
    assert "merge before saving" in result.stdout
    assert f"{broken}: 1 errors" in result.stdout


def test_one_engine_is_asked_about_alone(base, tmp_path):
    """What transformers 4 refuses is an error to those who deploy on it, and nothing to others."""
    new = shutil.copytree(base, tmp_path / "new")
    fields("tokenizer_config.json", tokenizer_class="TokenizersBackend")(new)
    assert call("check", new)[0] == 0
    code, result = call("check", new, "--engine", "transformers-4", "--json")
    errors = {each["rule"] for each in json.loads(result.stdout)["findings"] if each["severity"] == "error"}
    assert (code, errors) == (2, {"tokenizer.new-class"})
    assert call("check", new, "--engine", "vllm")[0] == 0
    assert call("check", new, "--engine", "ollama")[0] == 2


def test_what_is_not_there_is_told(tmp_path):
    """No such directory is a wrong argument, not a finding."""
    code, result = call("check", tmp_path / "nothing", "--json")
    assert (code, json.loads(result.stdout)["error"]["class"]) == (2, "not_found")


def test_a_configuration_that_asks_for_too_much_is_refused(base, tmp_path):
    """A million layers are looked at in a process of bounded time."""
    deep = shutil.copytree(base, tmp_path / "deep")
    document = {
        "model_type": "mpt",
        "architectures": ["MptForCausalLM"],
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 10**6,
    }
    (deep / "config.json").write_text(json.dumps(document))
    code, result = call("check", deep, "--json")
    assert code == 2, result.output


def merge(base, adapter, to):
    return call("merge", "--base", base, "--adapter", adapter, "--to", to, "--parity", "arithmetic", "--json")


def test_a_merge_is_checked_and_good(base, tmp_path):
    """What is merged here has no error and no warning, and no note in its report for it."""
    adapter = make_adapter(base, tmp_path / "adapter", rank=2)
    code, result = merge(base, adapter, tmp_path / "out")
    assert code == 0, result.output
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report.get("notes", []) == []
    code, result = call("check", tmp_path / "out", "--json")
    told = json.loads(result.stdout)
    assert (code, told["num_errors"], told["num_warnings"]) == (0, 0, 0)


def test_what_some_engine_minds_stands_in_the_report(tmp_path):
    """A base whose generation flags cannot be saved: its release has them, too, and says so."""
    base = build_qwen2(tmp_path / "base")
    fields("generation_config.json", temperature=0.5, do_sample=False)(base)
    adapter = make_adapter(base, tmp_path / "adapter", rank=2)
    code, result = merge(base, adapter, tmp_path / "out")
    assert code == 0, result.output
    notes = json.loads((tmp_path / "out" / "parity.json").read_text())["notes"]
    assert any("generation_config.json: flags that do nothing" in note for note in notes)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"] == notes


def test_what_no_engine_loads_is_not_published(tmp_path):
    """A base with a wrapper's names in tensors that its model does not take: they would be shipped as they are."""
    base = build_qwen2(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", rank=2)
    import torch
    from safetensors.torch import load_file, save_file

    stored = load_file(base / "model.safetensors")
    stored["model.layers.0._orig_mod.extra.weight"] = torch.zeros(4, dtype=torch.bfloat16)
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    code, result = merge(base, adapter, tmp_path / "out")
    assert code == 3, result.output
    assert "names of a wrapper around the model" in result.stdout
    assert not (tmp_path / "out").exists()
