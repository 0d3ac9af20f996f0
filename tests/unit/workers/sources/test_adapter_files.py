"""Adapters as trainers and hubs leave them: merged as PEFT merges the same adapter, or refused with the cause."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from jobs.errors import MergefleetError, UnsupportedError
from jobs.locations import LocalPath
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.models import build_llama, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS, open_adapter
from workers.adapters.config import ADAPTER_CONFIG
from workers.merging.checks.evidence import Evidence
from workers.sources.adapter_files import weight_files
from workers.sources.fetch import fetch_adapter
from workers.sources.foreign_adapters import foreign_kind

PREFIX = "base_model.model."
TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "plain", targets=TARGETS)


@pytest.fixture(scope="module")
def expected(base, plain, tmp_path_factory):
    """What PEFT makes of the adapter."""
    return merge_by_peft(base, plain, tmp_path_factory.mktemp("expected") / "peft")


@pytest.fixture
def adapter(plain, tmp_path):
    """A copy of the adapter, to be written as others do."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def rename(adapter, change):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({change(name): tensor for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS)


def change_config(adapter, **fields):
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(base, adapter, directory):
    with pytest.raises(MergefleetError) as error:
        plan_pass(base, {"job": adapter}, directory)
    return str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module."),
        lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."),
        lambda name: name.replace(".layers.0.", ".layers.0._orig_mod."),
        lambda name: name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
        lambda name: name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine."),
        lambda name: f"model.{name}",
        lambda name: f"policy.module.{name}",
        lambda name: name.removeprefix(PREFIX),
        lambda name: name.removeprefix(f"{PREFIX}model."),
    ],
    ids=[
        "compiled",
        "ddp",
        "ddp-compiled",
        "fsdp",
        "checkpointed",
        "fsdp-inside",
        "compiled-inside",
        "default",
        "named",
        "lightning",
        "policy",
        "no-prefix",
        "body",
    ],
)
def test_names_of_a_training_run_are_names_of_peft(base, adapter, expected, tmp_path, change):
    rename(adapter, change)
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


@pytest.mark.parametrize("name", ["lora_magnitude_vector.default.weight", "lora_magnitude_vector.mine.weight"])
def test_magnitudes_under_the_names_of_a_state_dict(base, tmp_path, name):
    """What `model.state_dict()` calls them, where trainers save that by themselves."""
    adapter = make_adapter(base, tmp_path / "adapter", targets=TARGETS, use_dora=True, trained=True)
    expected = merge_by_peft(base, adapter, tmp_path / "peft")
    own = name.split(".")[1]
    halves = {half: f"{half}.{own}" for half in ("lora_A", "lora_B")}
    rename(
        adapter,
        lambda stored: (
            stored.replace("lora_magnitude_vector", name)
            .replace("lora_A", halves["lora_A"])
            .replace("lora_B", halves["lora_B"])
        ),
    )
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


def test_tensors_of_two_adapters_in_one_file_are_refused(base, adapter, tmp_path):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    one = {name.replace("_A.", "_A.one.").replace("_B.", "_B.one."): tensor for name, tensor in tensors.items()}
    save_file(one | {name.replace(".one.", ".two."): t + 1 for name, t in one.items()}, adapter / ADAPTER_WEIGHTS)
    assert "lora_A.two.weight are one and the same to PEFT" in refusal(base, adapter, tmp_path / "1")
    other = {name.replace(".one.", ".two."): t for name, t in one.items() if "v_proj" in name}
    save_file({name: t for name, t in one.items() if "q_proj" in name} | other, adapter / ADAPTER_WEIGHTS)
    assert "holds tensors of 2 adapters, one and two" in refusal(base, adapter, tmp_path / "2")


def test_parts_with_an_index_are_one_adapter(base, adapter, expected, tmp_path):
    """As transformers saves a model with an adapter on that is larger than `max_shard_size`."""
    split(adapter, 3)
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


def split(adapter, num_parts):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    (adapter / ADAPTER_WEIGHTS).unlink()
    places = {}
    for part in range(num_parts):
        name = f"adapter_model-{part + 1:05d}-of-{num_parts:05d}.safetensors"
        own = dict(sorted(tensors.items())[part::num_parts])
        save_file(own, adapter / name)
        places |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": places}
    (adapter / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_part_that_is_missing_or_of_another_adapter_is_named(base, adapter, tmp_path):
    split(adapter, 3)
    second = adapter / "adapter_model-00002-of-00003.safetensors"
    kept = second.read_bytes()
    second.unlink()
    assert f"has no {second.name}, a part of the adapter" in refusal(base, adapter, tmp_path / "1")
    save_file({"base_model.model.other": torch.zeros(1)}, second)
    assert "files of two adapters are mixed" in refusal(base, adapter, tmp_path / "2")
    second.write_bytes(kept)
    save_file({}, adapter / ADAPTER_WEIGHTS)
    assert "are both there, and nothing says which" in refusal(base, adapter, tmp_path / "3")


def test_pickled_parts_are_one_adapter(base, adapter, expected, tmp_path):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    (adapter / ADAPTER_WEIGHTS).unlink()
    torch.save(tensors, adapter / "adapter_model-00001-of-00001.bin")
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


NORM = "model.norm.weight"
MOVE = ".*nothing says what in it was trained; move it elsewhere if the adapter does not need it$"
EMBEDDING = "model.embed_tokens.weight"


def trained(base, names):
    """Return tensors of a base as training would change them."""
    weights = read_tensors(base)
    generator = torch.Generator().manual_seed(5)
    return {name: weights[name] + torch.randn(weights[name].shape, generator=generator).bfloat16() for name in names}


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("non_lora_trainables.bin", PREFIX),
        ("trainable_params.safetensors", "module."),
        ("vit.safetensors", ""),
        ("extra.ckpt", f"model.{PREFIX}"),
        ("non_lora_trainables.BIN", PREFIX),
        ("new_embeddings.SafeTensors", ""),
    ],
)
def test_what_was_trained_beside_is_merged(base, adapter, expected, tmp_path, file, prefix):
    tensors = trained(base, [NORM, EMBEDDING])
    beside = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    save_file(beside, adapter / file) if file.lower().endswith("safetensors") else torch.save(beside, adapter / file)
    planned = plan_pass(base, {"job": adapter}, tmp_path / "ours")
    assert not planned.run().errors
    assert different(read_tensors(planned.output("job")), expected | tensors) == []
    assert tensors.keys() <= planned.plans[0].changed
    found = planned.check()["job"]
    assert max(check.rounding_excess for check in found.values()) <= 1
    assert all(found[name].delta_norm > 0 for name in tensors)


def test_the_adapter_once_more_under_its_own_names_passes(base, adapter, expected, tmp_path):
    """accelerate saves the tensors of an adapter under FSDP in this file, too."""
    torch.save(load_file(adapter / ADAPTER_WEIGHTS), adapter / "pytorch_model_fsdp.bin")
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []
    assert fetch_adapter(LocalPath(adapter), tmp_path / "cache").beside == {}
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors[next(reversed(tensors))].view(-1)[-1] += 1
    torch.save(tensors, adapter / "pytorch_model_fsdp.bin")
    assert "adapter_model.safetensors and pytorch_model_fsdp.bin both hold tensor" in refusal(
        base, adapter, tmp_path / "2"
    )


@pytest.mark.parametrize("prefix", [PREFIX, "", "module._orig_mod.base_model.model."])
def test_whole_tensors_once_more_under_other_names_pass(base, tmp_path, prefix):
    """As trainers save all that was trained a second time; the proof counts such a tensor once."""
    adapter = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], modules_to_save=["norm"], trained=True)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    torch.save(
        {name.replace(PREFIX, prefix): t for name, t in tensors.items() if "lora_" not in name},
        adapter / "non_lora_trainables.bin",
    )
    planned = plan_pass(base, {"job": adapter}, tmp_path / "ours")
    assert not planned.run(checked=True).errors
    checks, evidence = planned.check()["job"], Evidence(planned.plans[0])
    assert evidence.unfounded(checks) == ()
    assert list(evidence.tensors) == [name for name in evidence.tensors if name.startswith(PREFIX)]


def test_a_copy_as_torchtune_keeps_it_passes(base, adapter, expected, tmp_path):
    """The other way round than `tune_to_peft_adapter_weights` of torchtune 0.6."""
    config = json.loads((base / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items():
        module, half, _ = name.removeprefix(f"{PREFIX}model.").replace("self_attn", "attn").rsplit(".", 2)
        num_heads = heads.get(module.rpartition(".")[2]) if half == "lora_B" else None
        turned = tensor if num_heads is None else tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2)
        tensors[f"{module}.{half.lower()}.weight"] = turned.reshape(tensor.shape).contiguous()
    torch.save(tensors, adapter / "adapter_model.pt")
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []
    tensors[next(reversed(tensors))].view(-1)[-1] += 1
    torch.save(tensors, adapter / "adapter_model.pt")
    said = refusal(base, adapter, tmp_path / "2")
    assert "adapter_model.pt is an adapter as torchtune keeps it for itself" in said
    assert said.endswith("remove adapter_model.pt if the other is the adapter to merge")


def test_files_beside_decide_the_digest(plain, adapter, base, tmp_path):
    def digest():
        return fetch_adapter(LocalPath(adapter), tmp_path / "cache").digest

    digests = [fetch_adapter(LocalPath(plain), tmp_path / "cache").digest, digest()]
    for scale in (1, 2):
        save_file({NORM: trained(base, [NORM])[NORM] * scale}, adapter / "trained.safetensors")
        digests.append(digest())
    assert digests[0] == digests[1]
    assert len(set(digests[1:])) == 3


@pytest.mark.parametrize(
    ("file", "tensors", "said"),
    [
        (
            "mm_projector.safetensors",
            {f"{PREFIX}model.mm_projector.0.weight": torch.zeros(4, 4)},
            r"mm_projector\.safetensors: tensor .* and LlamaForCausalLM has no parameter model\.mm_projector\.0\.",
        ),
        (
            "vit.safetensors",
            {NORM: torch.zeros(4)},
            r"vit\.safetensors: tensor model\.norm\.weight .* expected shape \[64\].* found \[4\]",
        ),
        (
            "new_embeddings.safetensors",
            {"input_embeddings": torch.zeros(4, 64)},
            r"new_embeddings\.safetensors: tensor input_embeddings was trained beside .* no parameter",
        ),
        (
            "merged.safetensors",
            {"model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 64)},
            r"q_proj holds an adapter as well, and nothing says whether this is its weight before or after a merge",
        ),
        ("trained.safetensors", {NORM: torch.zeros(0)}, r"trained\.safetensors: tensor \S+ is empty.*ZeRO-3"),
        (
            "twice.safetensors",
            {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(1)},
            r"both hold tensor",
        ),
        ("trained.bin", {"step": 5}, r"trained\.bin: expected tensors by name, found int under 'step'"),
        (
            "last.ckpt",
            {"state_dict": {}, "epoch": 1},
            rf"last\.ckpt: .*found dict under 'state_dict'; it holds more {MOVE}",
        ),
        ("mp_rank_00_model_states.pt", {"module": {}}, rf"mp_rank_00_model_states\.pt: .*it holds more {MOVE}"),
        ("embeddings.pt", torch.zeros(4), rf"embeddings\.pt: expected a dict of tensors .*, found Tensor, {MOVE}"),
    ],
)
def test_what_fits_nowhere_is_refused_by_name(base, adapter, tmp_path, file, tensors, said):
    save_file(tensors, adapter / file) if file.endswith("safetensors") else torch.save(tensors, adapter / file)
    assert re.search(said, refusal(base, adapter, tmp_path / "ours"))


@pytest.mark.parametrize(
    "file", ["model-00001-of-00002.safetensors", "trained.pkl", "weights.NPZ", "tf_model.h5", "last.pth.tar"]
)
def test_files_that_are_not_read_are_refused_by_name(base, adapter, tmp_path, file):
    (adapter / file).write_bytes(b"weights")
    assert f"{file} beside the adapter may hold weights" in refusal(base, adapter, tmp_path / "ours")


def test_bystanders_pass(base, adapter, expected, tmp_path):
    for file in (
        *("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "random_states_0.pkl"),
        *(
            "training_args.bin",
            "trainer_state.json",
            "scaler.pt",
            "recipe_state.pt",
            "zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "adapter_model.bin",
            "model.gguf",
            "log.txt",
        ),
    ):
        (adapter / file).write_bytes(b"not read")
    (adapter / "global_step5").mkdir()
    (adapter / "global_step5" / "mp_rank_00_model_states.pt").write_bytes(b"not read")
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


@pytest.mark.parametrize(
    ("file", "name", "told"),
    [
        ("value_head.safetensors", "v_head.summary.weight", "v_head.summary.weight"),
        ("value_head.safetensors", "summary.weight", "v_head.summary.weight"),
        ("model.safetensors", "v_head.summary.weight", "v_head.summary.weight"),
        ("model.safetensors", "module.v_head.summary.weight", "module.v_head.summary.weight"),
    ],
)
def test_a_value_head_is_left_behind_and_told(base, adapter, expected, tmp_path, file, name, told):
    save_file({name: torch.ones(1, 64)}, adapter / file)
    planned = plan_pass(base, {"job": adapter}, tmp_path / "ours")
    assert not planned.run().errors
    assert different(read_tensors(planned.output("job")), expected) == []
    assert planned.plans[0].opened.notes == (f"a value head is left behind, which only the training needed: {told}",)
    assert Evidence(planned.plans[0]).unfounded(planned.check()["job"]) == ()


def test_a_header_does_not_say_what_is_left_behind(base, adapter, tmp_path):
    """A header of an adapter that names a file for half of its tensors, as gathered adapters once did."""
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    hidden = {name: "value_head.bin" for name in tensors if "v_proj" in name}
    save_file(tensors, adapter / ADAPTER_WEIGHTS, metadata={"mergefleet.files": json.dumps(hidden)})
    (adapter / ".trained_beside.json").write_text(json.dumps(hidden))
    assert plan_pass(base, {"job": adapter}, tmp_path / "1").plans[0].changed >= {
        f"model.layers.0.self_attn.{target}.weight" for target in TARGETS
    }
    change_config(adapter, target_modules=["q_proj"])
    assert "tensors belong to nothing that its configuration declares" in refusal(base, adapter, tmp_path / "2")


def test_the_proof_takes_no_word_for_what_is_left_behind(base, adapter, tmp_path):
    plan = plan_pass(base, {"job": adapter}, tmp_path / "plan").plans[0]
    hidden = f"{PREFIX}model.layers.0.self_attn.v_proj.lora_B.weight"
    tensors = {name: spec for name, spec in plan.opened.tensors.items() if name != hidden}
    opened = dataclasses.replace(plan.opened, tensors=tensors, left_behind=frozenset({hidden}))
    assert hidden in Evidence(dataclasses.replace(plan, opened=opened)).tensors


def make_kohya(directory):
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 4)}, directory / "style.safetensors")


def make_gguf(directory):
    (directory / "lora.gguf").write_bytes(b"GGUF")


def make_nemo(directory):
    """As NeMo 2 saves a checkpoint: shards of torch.distributed.checkpoint or of Megatron in a folder."""
    for folder in ("weights", "context"):
        (directory / folder).mkdir()
    (directory / "weights" / "__0_0.distcp").write_bytes(b"")


def make_nemo_yaml(directory):
    """What convert_nemo_to_canonical.py --hf_format leaves."""
    torch.save({}, directory / "adapter_model.bin")
    (directory / "adapter_config.yaml").write_text("peft_type: LORA")


def make_diffusers(directory):
    save_file({"unet.down.lora_A.weight": torch.zeros(4, 4)}, directory / "pytorch_lora_weights.safetensors")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_kohya, r"style\.safetensors: tensor lora_unet_mid_block\.lora_down\.weight: this is a LoRA as kohya's"),
        (make_nemo, r"distributed checkpoint of NeMo \(context and weights\).*target='hf-peft'"),
        (make_nemo_yaml, r"adapter_config\.yaml, as the converter of NeMo 1 writes it"),
        (make_gguf, r"lora\.gguf is an adapter of llama\.cpp"),
        (make_diffusers, r"pytorch_lora_weights\.safetensors is a LoRA of diffusers"),
    ],
)
def test_adapters_of_others_are_called_what_they_are(base, tmp_path, make, said):
    (tmp_path / "adapter").mkdir()
    make(tmp_path / "adapter")
    assert re.search(said, refusal(base, tmp_path / "adapter", tmp_path / "ours"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ggml-adapter-model.bin", "an adapter of llama.cpp"),
        ("model.safetensors", "called like a whole model"),
        ("pytorch_model.bin", "called like a whole model"),
        ("last.ckpt", "a checkpoint of a trainer"),
        ("tuned.nemo", "an archive of NeMo"),
        ("adapters.npz", "an adapter of MLX from before April 2024"),
        ("0000100_adapters.safetensors", "a checkpoint from the middle of a training of MLX"),
    ],
)
def test_files_of_others_are_called_what_they_are(name, kind):
    with pytest.raises(UnsupportedError, match=rf"{re.escape(name)} is {re.escape(kind)}; expected adapter_model"):
        weight_files(["adapter_config.json", name], "/adapters/a")


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lycoris_blocks_0_attn.lokr_w1", "kohya's sd-scripts and LyCORIS"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "a LoRA of diffusers"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora.up.weight", "a LoRA of diffusers"),
        (f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight", None),
    ],
)
def test_tensors_of_others_are_called_what_they_are(tensor, kind):
    found = foreign_kind([tensor])
    assert found is None if kind is None else kind in found[1]


def test_an_adapter_saved_empty_is_told_of_zero3(base, adapter, tmp_path):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({name: torch.zeros(0) for name in tensors}, adapter / ADAPTER_WEIGHTS)
    assert re.search(r"is empty, of shape \[0\]: DeepSpeed ZeRO-3", refusal(base, adapter, tmp_path / "ours"))


@pytest.mark.parametrize(
    ("saved_by", "said"),
    [
        ("99.1.0", "PEFT 99.1.0 saved the adapter and knows it: merge it where that version is installed"),
        ("0.1.0", "PEFT 0.1.0 saved the adapter, so that it is no field of PEFT's but one that a trainer wrote"),
        (None, "the configuration does not say which version of PEFT saved it"),
    ],
)
def test_a_field_of_another_version_names_the_version(base, adapter, tmp_path, saved_by, said):
    change_config(adapter, use_magic=True, peft_version=saved_by)
    message = refusal(base, adapter, tmp_path / "refused")
    assert said in message
    assert "or name it in MERGEFLEET_INERT_ADAPTER_FIELDS" in message


def test_a_field_that_the_operator_calls_inert_is_passed_over_and_told(base, adapter, tmp_path):
    change_config(adapter, use_magic=True, use_more=True)
    opened = open_adapter(adapter, frozenset({"use_magic", "use_more"}))
    assert [note.split(" is taken to change nothing")[0] for note in opened.notes] == [
        "field use_magic of adapter_config.json",
        "field use_more of adapter_config.json",
    ]
    planned = plan_pass(base, {"job": adapter}, tmp_path / "plan", inert_fields=opened.inert_fields)
    assert planned.plans[0].notes[:2] == opened.notes
    with pytest.raises(UnsupportedError, match=r"field use_more = True is unknown"):
        open_adapter(adapter, frozenset({"use_magic"}))


@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}, {"corda_config": {"beta_magnitude": 1}}],
)
def test_how_an_initialization_computed_does_not_matter(base, adapter, expected, tmp_path, fields):
    change_config(adapter, **fields)
    assert different(merge(base, adapter, tmp_path / "ours"), expected) == []


def test_a_head_that_no_class_of_the_base_has_is_called_what_it_is(base, tmp_path):
    """Here one in the shape of another class: it does not say how its model computes."""
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=1)
    config = LoraConfig(target_modules=list(TARGETS), task_type="SEQ_CLS")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / ADAPTER_WEIGHTS
    tensors = load_file(path)
    save_file(tensors | {f"{PREFIX}score.out_proj.weight": torch.ones(1, 64)}, path)
    said = refusal(base, tmp_path / "adapter", tmp_path / "ours")
    assert re.search(r"it is the head of a model that does not continue text \(task_type SEQ_CLS\)", said)
    assert "load the base as AutoModelForSequenceClassification" in said
    save_file(tensors, path)
    # What the message says to do is possible.
    LlamaForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(tmp_path / "classifier")
    ours = merge(tmp_path / "classifier", tmp_path / "adapter", tmp_path / "merged", parity={"level": "arithmetic"})
    assert different(ours, merge_by_peft(tmp_path / "classifier", tmp_path / "adapter", tmp_path / "peft")) == []


@pytest.mark.parametrize(
    ("task", "head"),
    [("TOKEN_CLS", "AutoModelForTokenClassification"), ("QUESTION_ANS", "AutoModelForQuestionAnswering")],
)
def test_the_class_of_a_head_is_that_of_its_task(base, adapter, tmp_path, task, head):
    change_config(adapter, task_type=task)
    tensors = load_file(adapter / ADAPTER_WEIGHTS) | {f"{PREFIX}classifier.weight": torch.ones(3, 64)}
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    assert f"load the base as {head}, with" in refusal(base, adapter, tmp_path / "ours")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_magnitude_vector.weight", "without lora_magnitude_vector.*: use_dora is False"),
        ("lora_B.bias", "without lora_B.bias: lora_bias is False"),
    ],
)
def test_a_tensor_that_a_switch_of_the_configuration_leaves_out_names_the_switch(base, adapter, tmp_path, name, said):
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    first = next(iter(tensors)).partition(".lora_")[0]
    save_file(tensors | {f"{first}.{name}": torch.ones(64)}, adapter / ADAPTER_WEIGHTS)
    assert re.search(said, refusal(base, adapter, tmp_path / "ours"))


def test_a_classifier_without_its_head_is_told(base, adapter, expected, tmp_path):
    """What it adds to the layers below is all that its files hold, and is merged."""
    change_config(adapter, task_type="SEQ_CLS")
    planned = plan_pass(base, {"job": adapter}, tmp_path / "ours")
    assert any("trained for task_type SEQ_CLS" in note for note in planned.plans[0].notes)
    assert not planned.run().errors
    assert different(read_tensors(planned.output("job")), expected) == []
