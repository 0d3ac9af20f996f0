"""The whole directory: plain transformers loads it as it is, and it answers in the adapter's tokenizer."""

import dataclasses
import hashlib
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from jobs.errors import BadInputError, NoCapacityError
from jobs.locations import HubRepo
from jobs.request import MergeRequest
from tests.merges import merge_by_peft, plan_pass, plan_requests, read_tensors
from tests.models import (
    CHAT_TEMPLATE,
    build_bnb_4bit,
    build_llama,
    build_qwen2,
    build_tokenizer,
    load_plain,
    make_adapter,
)
from workers.bases.model import quiet_transformers
from workers.merging.card import write_card
from workers.merging.sidecars import digest_file, write_sidecars, write_text
from workers.sources.fetch import Source


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("sidecars")


@pytest.fixture(scope="module")
def bases(places):
    llama = build_llama(places / "llama", max_shard_size="100KB")
    return {
        "llama": llama,
        "qwen2": build_qwen2(places / "qwen2"),
        "bnb": build_bnb_4bit(llama, places / "bnb"),
    }


@pytest.fixture(scope="module")
def adapters(places, bases):
    """PEFT adapters by base; the one of the 4-bit base is that of the base it was made from."""
    llama = make_adapter(bases["llama"], places / "llama-adapter")
    return {"llama": llama, "qwen2": make_adapter(bases["qwen2"], places / "qwen2-adapter"), "bnb": llama}


@pytest.fixture
def base(bases, tmp_path):
    return shutil.copytree(bases["llama"], tmp_path / "base")


@pytest.fixture
def adapter(adapters, tmp_path):
    return shutil.copytree(adapters["llama"], tmp_path / "adapter")


def build_other_tokenizer(directory):
    """Save a tokenizer that has no beginning of sequence."""
    build_tokenizer(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write(base, adapter, tmp_path, **fields):
    """Merge and write the whole directory; return it and what was said to be written."""
    planned = plan_pass(base, {"job": adapter}, tmp_path / "pass", **fields)
    shards = [file.artifact for file in planned.run().files["job"]]
    written = write_sidecars(planned.plans[0], planned.output("job"))
    return planned.output("job"), (*shards, *written)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("llama", {"base_quantization": "nf4"}),
        ("llama", {"dtype": "float32"}),
        ("llama", {"max_shard_size": "60KB"}),
        ("llama", {"max_shard_size": "10MB", "dtype": "float16", "base_quantization": "fp4"}),
        ("qwen2", {}),
        ("qwen2", {"base_quantization": "nf4", "max_shard_size": "60KB"}),
        ("bnb", {"base_quantization": "nf4"}),
        ("bnb", {"base_quantization": "nf4", "dtype": "float32"}),
    ],
    ids=str,
)
def test_plain_transformers_loads_it_and_finds_everything(bases, adapters, tmp_path, name, fields):
    output, _ = write(bases[name], adapters[name], tmp_path, **fields)
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            output, dtype="auto", output_loading_info=True, local_files_only=True
        )
    assert not any(info.values()), info
    assert not hasattr(model.config, "quantization_config")
    assert not any("lora" in module.lower() for module, _ in model.named_modules())
    dtype = getattr(torch, fields.get("dtype", "bfloat16"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    stored = read_tensors(output)
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored[parameter_name])
    assert AutoTokenizer.from_pretrained(output).chat_template == CHAT_TEMPLATE
    assert GenerationConfig.from_pretrained(output).eos_token_id == 1


def test_it_answers_as_base_and_adapter(bases, adapters, tmp_path):
    output, _ = write(bases["llama"], adapters["llama"], tmp_path, dtype="float32")
    tokens = AutoTokenizer.from_pretrained(output)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        merged = load_plain(output)(**tokens).logits
        reference = PeftModel.from_pretrained(load_plain(bases["llama"], torch.float32), adapters["llama"])
        expected = reference(**tokens).logits
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"max_shard_size": "60KB"}, {"dtype": "float32"}], ids=str)
def test_every_file_is_told_with_its_true_size_and_digest(bases, adapters, tmp_path, fields):
    output, artifacts = write(bases["llama"], adapters["llama"], tmp_path, **fields)
    found = {
        str(path.relative_to(output)): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in output.rglob("*")
        if path.is_file()
    }
    assert {artifact.path: (artifact.num_bytes, artifact.sha256) for artifact in artifacts} == found


def test_the_index_is_that_of_transformers(bases, adapters, tmp_path):
    output, _ = write(bases["llama"], adapters["llama"], tmp_path)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    tensors = merge_by_peft(bases["llama"], adapters["llama"], tmp_path / "peft")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"] == {name: path.name for path in output.glob("*.safetensors") for name in load_file(path)}


def test_one_file_has_no_index(bases, adapters, tmp_path):
    output, _ = write(bases["llama"], adapters["llama"], tmp_path, max_shard_size="10MB")
    assert [path.name for path in output.glob("model*")] == ["model.safetensors"]


def test_the_configuration_is_the_bases_but_for_what_changed(bases, adapters, tmp_path):
    own = json.loads((bases["llama"] / "config.json").read_text())
    output, _ = write(bases["llama"], adapters["llama"], tmp_path / "own")
    assert json.loads((output / "config.json").read_text()) == own | {"torch_dtype": "bfloat16"}
    output, _ = write(bases["llama"], adapters["llama"], tmp_path / "cast", dtype="float16")
    dtypes = {"dtype": "float16", "torch_dtype": "float16"}
    assert json.loads((output / "config.json").read_text()) == own | dtypes
    stored = json.loads((bases["bnb"] / "config.json").read_text())
    output, _ = write(bases["bnb"], adapters["bnb"], tmp_path / "bnb", base_quantization="nf4")
    assert stored.pop("quantization_config")["load_in_4bit"]
    assert json.loads((output / "config.json").read_text()) == stored | {"torch_dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("stated", "asked", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "float32", "float32"),
        ({"dtype": "bfloat16", "torch_dtype": "float16"}, None, "bfloat16"),  # transformers 5 reads the first
        ({}, None, "bfloat16"),  # of the tensors
    ],
    ids=str,
)
def test_older_and_newer_readers_find_one_dtype(base, adapter, tmp_path, stated, asked, expected):
    config = json.loads((base / "config.json").read_text())
    del config["dtype"]
    nested = {"vision_config": {"torch_dtype": "float16", "depth": 1}, "audio_config": {"depth": 2}}
    (base / "config.json").write_text(json.dumps(config | stated | nested))
    output, _ = write(base, adapter, tmp_path, dtype=asked)
    written = json.loads((output / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == (expected, expected)
    of_part = asked or "float16"
    assert written["vision_config"] == {"torch_dtype": of_part, "dtype": of_part, "depth": 1}
    assert written["audio_config"] == {"depth": 2}
    assert load_plain(output).dtype == getattr(torch, expected)


def test_the_adapters_tokenizer_wins_whole(base, adapter, tmp_path):
    build_other_tokenizer(adapter)
    (adapter / "chat_template.jinja").write_text("adapter {{ messages }}")
    (base / "special_tokens_map.json").write_text('{"bos_token": "<|begin|>"}')
    (base / "added_tokens.json").write_text("{}")
    output, _ = write(base, adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.bos_token is None
    assert tokenizer.chat_template == "adapter {{ messages }}"
    assert not (output / "special_tokens_map.json").exists()
    assert not (output / "added_tokens.json").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (adapter / name).read_bytes()


def test_a_template_inside_the_adapters_tokenizer_is_not_hidden_by_the_bases_file(base, adapter, tmp_path):
    build_tokenizer(adapter)
    (adapter / "chat_template.jinja").unlink()
    config = json.loads((adapter / "tokenizer_config.json").read_text()) | {"chat_template": "inside {{ messages }}"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("base's tools")
    output, _ = write(base, adapter, tmp_path)
    assert AutoTokenizer.from_pretrained(output).chat_template == "inside {{ messages }}"
    assert not (output / "additional_chat_templates").exists()


def test_a_template_alone_goes_with_the_bases_tokenizer(base, adapter, tmp_path):
    (adapter / "chat_template.jinja").write_text("adapter {{ messages }}")
    output, _ = write(base, adapter, tmp_path)
    assert AutoTokenizer.from_pretrained(output).chat_template == "adapter {{ messages }}"
    assert (output / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("within", [False, True], ids=["file", "within"])
def test_a_tokenizer_without_a_template_keeps_that_of_the_base(base, adapter, tmp_path, within):
    if within:
        config = json.loads((base / "tokenizer_config.json").read_text())
        template = (base / "chat_template.jinja").read_text()
        (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
        (base / "chat_template.jinja").unlink()
    build_other_tokenizer(adapter)
    (adapter / "chat_template.jinja").unlink()
    output, _ = write(base, adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.bos_token is None
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_more_templates_come_along(base, adapter, tmp_path):
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("tools {{ messages }}")
    output, artifacts = write(base, adapter, tmp_path)
    assert AutoTokenizer.from_pretrained(output).chat_template == {
        "default": CHAT_TEMPLATE,
        "tool": "tools {{ messages }}",
    }
    assert "additional_chat_templates/tool.jinja" in {artifact.path for artifact in artifacts}


def test_the_adapters_processor_wins_file_by_file(base, adapter, tmp_path):
    (base / "preprocessor_config.json").write_text('{"of": "base"}')
    (base / "processor_config.json").write_text('{"of": "base"}')
    (adapter / "preprocessor_config.json").write_text('{"of": "adapter"}')
    output, _ = write(base, adapter, tmp_path)
    assert json.loads((output / "preprocessor_config.json").read_text()) == {"of": "adapter"}
    assert json.loads((output / "processor_config.json").read_text()) == {"of": "base"}


def test_what_is_of_no_use_to_a_checkpoint_stays_behind(base, adapter, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", ".gitattributes", "a\tb.txt"):
        (base / name).write_text("{}")
    for name in ("trainer_state.json", "optimizer.pt", "all_results.json"):
        (adapter / name).write_text("{}")
    for name in ("hf_quant_config.json", "params.json", "quantize_config.json", "run.py", "trainer_state.json"):
        (base / name).write_text("{}")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "merges.txt"):
        (base / name).write_text(name)
    output, _ = write(base, adapter, tmp_path)
    assert {path.name for path in output.iterdir() if not path.name.endswith(".safetensors")} == {
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    load_plain(output)


def test_a_link_to_another_file_of_the_base_is_copied_as_a_file(base, adapter, tmp_path):
    (base / "tokenizer.json").rename(base / "real.json")
    (base / "tokenizer.json").symlink_to("real.json")
    output, _ = write(base, adapter, tmp_path)
    assert not (output / "tokenizer.json").is_symlink()
    assert (output / "tokenizer.json").read_bytes() == (base / "real.json").read_bytes()


def test_a_link_out_of_the_adapter_is_not_copied(base, adapter, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("a file of the service")
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    (adapter / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(BadInputError, match=r"chat_template\.jinja: expected a file of this directory"):
        write(base, adapter, tmp_path)


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({}, "merged into: the base's own weights"),
        ({"base_quantization": "nf4"}, "merged into: the base's weights through nf4 and back"),
    ],
)
def test_the_card_says_what_it_is(bases, adapters, tmp_path, fields, phrase):
    planned = plan_pass(bases["llama"], {"job": adapters["llama"]}, tmp_path, **fields)
    planned.run()
    (plan,) = planned.plans
    write_card(plan, planned.output("job"), num_changed=3)
    card = ModelCard.load(planned.output("job") / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.get("base_model") is None
    assert phrase in card.text
    assert plan.merge_key in card.text
    assert str(adapters["llama"]) in card.text
    assert f"tensors changed: 3 of {len(plan.base.tensors)}" in card.text


def test_the_card_names_the_licences_of_base_and_adapter(base, adapter, tmp_path):
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE\n---\n")
    (adapter / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    planned = plan_pass(base, {"job": adapter}, tmp_path)
    planned.run()
    write_card(planned.plans[0], planned.output("job"), num_changed=1)
    card = ModelCard.load(planned.output("job") / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "apache-2.0-and-cc-by-nc-4.0")
    assert card.data.license_link is None
    assert "apache-2.0, cc-by-nc-4.0, the base's first" in card.text


def test_the_card_of_a_base_from_the_hub_names_it(bases, adapters, tmp_path):
    planned = plan_pass(bases["llama"], {"job": adapters["llama"]}, tmp_path)
    planned.run()
    (plan,) = planned.plans
    source = Source(location=HubRepo("org/base", "main"), directory=bases["llama"], digest="0" * 64)
    output = planned.output("job")
    write_card(dataclasses.replace(plan, base=dataclasses.replace(plan.base, source=source)), output, num_changed=1)
    card = ModelCard.load(output / "README.md")
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("org/base", "finetune")


def test_the_card_of_several_adapters_calls_it_a_merge(bases, adapters, tmp_path):
    several = [{"adapter": str(adapters["llama"]), "weight": weight} for weight in (1, -0.5)]
    request = MergeRequest(
        base=str(bases["llama"]),
        adapters=several,
        combination={"type": "cat"},
        destination=str(tmp_path / "release"),
        base_quantization="none",
    )
    planned = plan_requests([request], tmp_path)
    planned.run()
    (plan,) = planned.plans
    source = Source(location=HubRepo("org/base", "main"), directory=bases["llama"], digest="0" * 64)
    output = planned.output(request.id)
    write_card(dataclasses.replace(plan, base=dataclasses.replace(plan.base, source=source)), output, num_changed=1)
    card = ModelCard.load(output / "README.md")
    assert (card.data.base_model, card.data.get("base_model_relation")) == ("org/base", "merge")
    assert f"- adapter: `{adapters['llama']}`, weight -0.5\n- combined by PEFT: cat\n" in card.text


def test_a_tokenizer_that_is_no_json_is_named(base, adapter, tmp_path):
    (adapter / "tokenizer_config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"adapter/tokenizer_config\.json"):
        write(base, adapter, tmp_path)


def test_a_full_disk_is_no_capacity(tmp_path):
    (tmp_path / "full.json").symlink_to("/dev/full")
    with pytest.raises(NoCapacityError, match=r"full\.json"):
        write_text(tmp_path / "full.json", "x" * 100_000)


def test_a_file_is_told_as_it_is(tmp_path):
    (tmp_path / "a.json").write_bytes(b"12345")
    artifact = digest_file(tmp_path, "a.json")
    assert (artifact.path, artifact.num_bytes) == ("a.json", 5)
    assert artifact.sha256 == hashlib.sha256(b"12345").hexdigest()
