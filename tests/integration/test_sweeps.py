"""A sweep over the checkpoints that transformers' Trainer leaves: submitted twice, merged, proven, and ranked."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments
from typer.testing import CliRunner

from cluster.cli import app
from cluster.settings import Settings
from jobs.ledger.store import JobStore
from jobs.states import JobState
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import LINEAR_TARGETS, build_llama, load_plain
from tests.releases import advance, begin, settle
from workers.merging.settings import WorkerSettings
from workers.parity.inference import quiet_libraries
from workers.worker import MergeWorker

TRAINED_ON = "Question: What is two times two? Answer: four. The capital of France is Paris."
HELD_OUT = "The capital of Spain is Madrid. Once upon a time, there lived a baker."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """Return a directory with a checkpoint for each of three steps, as the Trainer writes them."""
    directory = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(TRAINED_ON)["input_ids"]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=3,
        save_steps=1,
        learning_rate=0.2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with quiet_libraries():
        model = get_peft_model(
            load_plain(base), LoraConfig(r=4, target_modules=list(LINEAR_TARGETS), task_type="CAUSAL_LM")
        )
        model.train()
        dataset = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}] * 6
        Trainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer).train()
    return directory


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"MERGEFLEET_{name.upper()}", raising=False)
    monkeypatch.setenv("MERGEFLEET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def call(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def held_out_nll(base, adapter):
    """Return the likelihood of the held-out text by PEFT alone, unmerged, in float32: nats for a token."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer(HELD_OUT, return_tensors="pt")["input_ids"]
    with quiet_libraries(), torch.inference_mode():
        model = PeftModel.from_pretrained(load_plain(base, torch.float32), str(adapter)).eval()
        logits = model(input_ids=ids).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


def test_a_sweep_that_is_submitted_again_adds_what_is_new_and_is_ranked(base, trained, home, tmp_path):
    run = tmp_path / "runs" / "x"
    names = {path.name for path in (trained / "checkpoint-1").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"}
    for step in (1, 2):
        shutil.copytree(trained / f"checkpoint-{step}", run / f"checkpoint-{step}")
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "matrix:\n"
        f"  bases: [{base}]\n"
        "  adapters: runs/x/checkpoint-*\n"
        "  base_quantization: none\n"
        "  destination: releases/x/{step}\n"
        "  labels: {run: x, step: '{step}'}\n"
        f"  parity: {{texts: ['{HELD_OUT}'], prompts: ['{TRAINED_ON[:20]}'], min_positions: 8, max_new_tokens: 2}}\n"
    )
    assert call("submit", path) == "batch sweep: 2 jobs queued\n"

    shutil.copytree(trained / "checkpoint-3", run / "checkpoint-3")
    shutil.copytree(trained / "checkpoint-3", run / "checkpoint-4")
    weights = run / "checkpoint-4" / "adapter_model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size // 2])
    left_out, queued = call("submit", path).splitlines()
    assert left_out.startswith(
        f"left out: {run}/checkpoint-4: has {size // 2} bytes of adapter_model.safetensors, whose"
    )
    assert queued == "batch sweep: 1 jobs queued, 2 were there already"
    told = json.loads(call("submit", path, "--json"))
    assert (told["created"], len(told["unchanged"]), len(told["left_out"])) == ([], 3, 1)

    store = JobStore(f"sqlite:///{home}/mergefleet.db")
    assert [record.request.labels["step"] for record in store.jobs()] == ["1", "2", "3"]
    merge_all(store, home)
    store.close()

    for step in (1, 2, 3):
        expected = merge_by_peft(base, trained / f"checkpoint-{step}", tmp_path / "peft" / str(step))
        assert different(read_tensors(tmp_path / "releases" / "x" / str(step)), expected) == []
    expected = {step: held_out_nll(base, trained / f"checkpoint-{step}") for step in (1, 2, 3)}
    assert min(abs(expected[one] - expected[other]) for one, other in ((1, 2), (2, 3), (1, 3))) > 0.05
    call("report", "sweep", "--to", tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text()
    table = page.partition("<h2>Which step is best</h2>")[2].partition("</table>")[0]
    assert f"<code>{run}/checkpoint-*</code>" in table
    rows = re.findall(r'<tr><td class="n">(\d)</td><td class="n">(\d)</td><td class="n">([\d.]+)</td>', table)
    assert [(rank, int(step)) for rank, step, _ in rows] == [
        (str(rank), step) for rank, step in enumerate(sorted(expected, key=expected.get), start=1)
    ]
    for _, step, nll in rows:
        assert float(nll) == pytest.approx(expected[int(step)], abs=0.02)  # the base is in bfloat16
        assert f'file://{tmp_path}/releases/x/{step}"' in table


def test_base_and_adapters_in_folders_of_one_repository_are_merged(base, trained, home, hub, tmp_path):
    """What is fetched is what the merge needs: nothing of the trainer's, nothing of a checkpoint that is not named."""
    repo = f"org/{tmp_path.name}"
    files = {f"bases/pico/{path.name}": path.read_bytes() for path in base.iterdir()}
    for step in (1, 2, 3):
        for path in (trained / f"checkpoint-{step}").iterdir():
            files[f"runs/x/checkpoint-{step}/{path.name}"] = path.read_bytes()
    hub.create(repo, files)
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "matrix:\n"
        f"  bases: [hf://{repo}/bases/pico@main]\n"
        f"  adapters: ['hf://{repo}/runs/x/checkpoint-?@main']\n"
        "  base_quantization: none\n"
        "  destination: releases/{base}/{step}\n"
        "  parity: {level: arithmetic}\n"
    )
    assert call("submit", path) == "batch sweep: 3 jobs queued\n"
    store = JobStore(f"sqlite:///{home}/mergefleet.db")
    store.cancel([record.id for record in store.jobs() if record.request.adapter.name == "checkpoint-2"])
    merge_all(store, home)
    commit = hub.repos[repo][-1].oid
    for record in store.jobs():
        if record.release is not None:
            assert str(record.release.manifest.base) == f"hf://{repo}/bases/pico@{commit}"
            assert str(record.release.manifest.adapter).endswith(f"@{commit}")
    store.close()
    for step in (1, 3):
        expected = merge_by_peft(base, trained / f"checkpoint-{step}", tmp_path / "peft" / str(step))
        assert different(read_tensors(tmp_path / "releases" / "pico" / str(step)), expected) == []
    snapshot = Path(os.environ["HF_HOME"]) / "hub" / f"models--{repo.replace('/', '--')}" / "snapshots" / commit
    brought = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}
    assert {name.partition("/")[0] for name in brought} == {"bases", "runs"}
    assert {name.split("/")[2] for name in brought if name.startswith("runs/")} == {"checkpoint-1", "checkpoint-3"}
    kept = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
    assert not {name.rpartition("/")[2] for name in brought} & kept


def test_adapters_that_peft_saved_under_their_names_are_merged_one_by_one(base, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    with quiet_libraries():
        model = get_peft_model(load_plain(base), config, adapter_name="policy")
        model.add_adapter("critic", config)
        model.save_pretrained(tmp_path / "named")
    assert {path.name for path in (tmp_path / "named").iterdir() if path.is_dir()} == {"policy", "critic"}
    arguments = ["merge", "--base", base, "--base-quantization", "none", "--parity", "arithmetic"]
    both = [part for name in ("policy", "critic") for part in ("--adapter", tmp_path / "named" / name)]
    call(*arguments, *both, "--to", tmp_path / "out")
    for name in ("policy", "critic"):
        expected = merge_by_peft(base, tmp_path / "named" / name, tmp_path / "peft" / name)
        assert different(read_tensors(tmp_path / "out" / name), expected) == []
    result = CliRunner().invoke(app, [*map(str, arguments), "--adapter", f"{tmp_path}/named", "--to", f"{tmp_path}/x"])
    assert result.exit_code == 2
    told = " ".join(result.output.split())
    assert f"2 have one: critic, policy; name the one that is meant, such as {tmp_path}/named/critic" in told


def merge_all(store: JobStore, home) -> None:
    """Do what a driver and its worker do, in this process."""
    worker = MergeWorker(
        WorkerSettings(
            cache=home / "cache", scratch=home / "scratch", reports=home / "reports", device="cpu", num_threads=1
        )
    )
    leases = {lease.job_id: lease for lease in store.claim("driver", 9, 600)}
    for lease in leases.values():
        begin(store, lease.job_id, lease.token)
    outcomes = worker.run_unit("unit", tuple(lease.request for lease in leases.values())).jobs
    for outcome in outcomes:
        assert outcome.failure is None, outcome.failure
        token = leases[outcome.job_id].token
        advance(store, outcome.job_id, token, JobState.PUBLISHING)
        release = worker.publish(outcome.job_id).release
        settle(store, outcome.job_id, token, release, str(outcome.report_path))
    worker.close()
