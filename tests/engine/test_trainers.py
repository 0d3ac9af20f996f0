"""Adapters that other trainers wrote: expected is what PEFT merges of the adapter that they were written from."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import MergefleetError
from jobs.locations import LocalPath
from tests import architectures
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.methods import save_old_adapter
from tests.models import LINEAR_TARGETS, build_llama, build_qwen2, make_adapter
from tests.trainers import write_mlx, write_tinker, write_torchtune
from workers.merging.checks.evidence import Evidence
from workers.sources.fetch import fetch_adapter

LLAMA_HEADS = {"q_proj": 4, "k_proj": 2}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return build_qwen2(tmp_path_factory.mktemp("base") / "qwen2")


@pytest.fixture(scope="module")
def plain(llama, tmp_path_factory):
    return make_adapter(llama, tmp_path_factory.mktemp("adapter") / "plain", targets=(*LINEAR_TARGETS, "lm_head"))


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def experts(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / request.param
    return architectures.build("decoder", request.param, directory, dtype=torch.float32)


def change_config(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(adapter, change, name="adapters.safetensors"):
    save_file(change(load_file(adapter / name)), adapter / name)


def refusal(base, adapter, directory):
    with pytest.raises(MergefleetError) as error:
        plan_pass(base, {"job": adapter}, directory)
    return str(error.value)


def check_is_merged_as_peft_does(base, peft, foreign, directory, words):
    """Bits, what is told, the proof's own account of the adapter, and the digest, which is of the files as written."""
    planned = plan_pass(base, {"job": foreign}, directory / "ours")
    assert not planned.run().errors
    assert different(read_tensors(planned.output("job")), merge_by_peft(base, peft, directory / "peft")) == []
    plan = planned.plans[0]
    assert Evidence(plan).unfounded(planned.check()["job"]) == ()
    assert any(note.startswith(words) and "converted" in note for note in plan.notes)
    assert plan.adapter.digest == fetch_adapter(LocalPath(foreign), directory / "elsewhere").digest


@pytest.mark.parametrize(
    ("fields", "num_layers"),
    [
        ({"targets": LINEAR_TARGETS}, -1),
        ({"targets": LINEAR_TARGETS, "rank": 3, "alpha": 0.7 * 3}, -1),
        ({"targets": r"model\.layers\.1\.self_attn\.[qv]_proj"}, 1),
        ({"targets": ("q_proj", "lm_head", "embed_tokens"), "trained": True}, 16),
        ({"targets": ("q_proj", "down_proj"), "use_dora": True, "trained": True}, -1),
    ],
    ids=["all linears", "odd scale", "last layer", "head and embedding", "DoRA"],
)
def test_mlx_is_merged_as_peft_merges_it(llama, tmp_path, fields, num_layers):
    keys = None
    if "lm_head" in fields["targets"]:
        keys = ["self_attn.q_proj", "lm_head", "model.embed_tokens"]
    peft = make_adapter(llama, tmp_path / "adapter", **fields)
    mlx = write_mlx(peft, tmp_path / "mlx", num_layers=num_layers, **({"keys": keys} if keys else {}))
    check_is_merged_as_peft_does(llama, peft, mlx, tmp_path, "an adapter of MLX, trained on /models/tiny")


def test_mlx_on_a_vision_language_base(tmp_path):
    """mlx_lm has the text model of Gemma 3 alone, under names that transformers had, too, before its version 4.52."""
    base = architectures.build("vision-language", "gemma3", tmp_path / "base")
    peft = make_adapter(base, tmp_path / "adapter", targets=r"model\.language_model\..*\.(q_proj|up_proj)")
    mlx = write_mlx(peft, tmp_path / "mlx")
    change_tensors(
        mlx,
        lambda tensors: {n.replace("model.language_model.", "language_model.model."): t for n, t in tensors.items()},
    )
    check_is_merged_as_peft_does(base, peft, mlx, tmp_path, "an adapter of MLX")


@pytest.mark.parametrize("flat", [False, True], ids=["stack", "matrix"])
def test_experts_of_mlx_are_merged_one_by_one(experts, tmp_path, flat):
    """Expected is W + scale B A of each expert in float64; mlx_lm has A as a matrix before its version 0.28.3."""
    own = {"gate_proj": "gate_proj", "down_proj": "down_proj", "up_proj": "up_proj"}
    own = own if experts.name == "qwen3_moe" else {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    expected = save_old_adapter(experts, tmp_path / "old", target_modules=[*own, "q_proj"])
    saved, stacks = {}, {}
    for name, tensor in load_file(tmp_path / "old" / "adapter_model.safetensors").items():
        module, half = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        if ".experts." not in module:
            saved[f"{module}.lora_{half.lower()}"] = tensor.T.contiguous()
            continue
        place, number, leaf = re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)", module).groups()
        stacks.setdefault(f"{place}.switch_mlp.{own[leaf]}.lora_{half.lower()}", {})[int(number)] = tensor
    for name, rows in stacks.items():
        stack = torch.stack([rows[number] for number in sorted(rows)])
        saved[name] = stack.flatten(0, 1) if flat and name.endswith("a") else stack
    (tmp_path / "mlx").mkdir()
    save_file(saved, tmp_path / "mlx" / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    merged = merge(experts, tmp_path / "mlx", tmp_path / "ours", parity={"level": "arithmetic"})
    before = read_tensors(experts)
    assert len(expected) >= 24
    for name, tensor in merged.items():
        exact = expected.get(name, before[name].double())
        assert torch.allclose(tensor.double(), exact, rtol=1e-6, atol=1e-7), name


def test_mlx_of_older_versions(llama, tmp_path):
    """Before September 2024: `lora_layers`, and an alpha that counted until June and no more since."""
    peft = make_adapter(llama, tmp_path / "adapter", targets=("q_proj", "v_proj"), rank=4, alpha=8)
    mlx = write_mlx(peft, tmp_path / "mlx")
    config = json.loads((mlx / "adapter_config.json").read_text())
    del config["fine_tune_type"], config["num_layers"]
    config |= {"lora_layers": 2, "use_dora": False}
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    expected = merge_by_peft(llama, peft, tmp_path / "peft")
    assert different(merge(llama, mlx, tmp_path / "1"), expected) == []
    config["lora_parameters"]["alpha"] = 4.0
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    assert different(merge(llama, mlx, tmp_path / "2"), expected) == []
    config["lora_parameters"]["alpha"] = 16.0
    (mlx / "adapter_config.json").write_text(json.dumps(config))
    assert "write scale = 8.0" in refusal(llama, mlx, tmp_path / "3")
    change_config(mlx, fine_tune_type="lora")  # later versions write an alpha that means nothing
    assert different(merge(llama, mlx, tmp_path / "4"), expected) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fine_tune_type": "full"}, "holds whole layers, not an adapter"),
        ({"fine_tune_type": "ia3"}, "expected lora or dora, found 'ia3'"),
        ({"fine_tune_type": "dora"}, "no magnitude is there"),
        ({"lora_parameters": None}, "field lora_parameters: expected an object with rank and scale"),
        ({"lora_parameters": {"rank": 8}}, "field lora_parameters.scale: expected a number, found nothing"),
        ({"lora_parameters": {"rank": 9, "scale": 2.0}}, r"expected shape \[inputs, 9\], found \[64, 8\]"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "magic": 1}}, "lora_parameters.magic = 1 is none"),
        ({"lora_parameters": {"rank": 8, "scale": 2.0, "keys": ["mlp.up_proj"]}}, "do not name it"),
        ({"num_layers": 1.5}, r"field num_layers: expected a whole number, found 1\.5"),
        ({"num_layers": 1}, r"module model\.layers\.0\.\S+ was trained, and"),
        ({"use_magic": True}, "field use_magic = true is none that is known of an adapter of MLX"),
        ({"peft_type": "LORA"}, "the tensors are those of MLX"),
    ],
)
def test_mlx_with_a_configuration_that_is_not_its_own_is_refused(llama, tmp_path, fields, said):
    peft = make_adapter(llama, tmp_path / "adapter", targets=("q_proj", "v_proj"))
    mlx = write_mlx(peft, tmp_path / "mlx")
    change_config(mlx, **fields)
    message = refusal(llama, mlx, tmp_path / "ours")
    assert re.search(said, message)
    assert message.startswith(str(mlx)), "what is to be changed is the adapter, not its copy in the cache"


def test_tensors_that_mlx_does_not_write_are_refused(llama, qwen2, tmp_path):
    peft = make_adapter(llama, tmp_path / "adapter", targets=("q_proj",))
    mlx = write_mlx(peft, tmp_path / "mlx")
    change_tensors(mlx, lambda tensors: tensors | {"model.norm.weight": torch.ones(64)})
    assert "tensor model.norm.weight is none that is known of an adapter of MLX" in refusal(llama, mlx, tmp_path / "1")
    change_tensors(
        mlx,
        lambda tensors: {
            n: t for n, t in tensors.items() if not n.endswith(("norm.weight", "0.self_attn.q_proj.lora_b"))
        },
    )
    assert "expected both factors of its delta" in refusal(llama, mlx, tmp_path / "2")
    tied = write_mlx(make_adapter(qwen2, tmp_path / "tied", targets=("embed_tokens",)), tmp_path / "tied-mlx")
    change_config(tied, lora_parameters={"rank": 8, "scale": 2.0, "keys": ["model.embed_tokens"]})
    assert "MLX adds the delta to both" in refusal(qwen2, tied, tmp_path / "3")
    other = architectures.build("decoder", "gpt_neox", tmp_path / "neox")
    assert "for a base of model_type gpt_neox" in refusal(other, tied, tmp_path / "4")


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["adapter_model.pt", "adapter_2.pt"])
def test_torchtune_is_merged_as_peft_merges_it(llama, tmp_path, name, use_dora):
    """Rows of queries and keys alternate in torchtune's Llama, by its `hf_to_tune`."""
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head")
    peft = make_adapter(llama, tmp_path / "adapter", targets=targets, use_dora=use_dora, trained=True)
    tune = write_torchtune(peft, tmp_path / "tune", name, heads=LLAMA_HEADS, head_dim=16)
    (tune / "recipe_state.pt").write_bytes(b"not looked at")
    check_is_merged_as_peft_does(llama, peft, tune, tmp_path, "an adapter of torchtune")


def test_torchtune_has_the_rows_of_qwen_as_transformers_has_them(qwen2, tmp_path):
    """By `qwen2_hf_to_tune`; its configuration names modules as torchtune does if it was written before the export."""
    peft = make_adapter(qwen2, tmp_path / "adapter", targets=("q_proj", "k_proj", "o_proj", "up_proj"))
    tune = write_torchtune(peft, tmp_path / "tune", heads={}, head_dim=16)
    change_config(tune, target_modules=["q_proj", "k_proj", "output_proj", "w3"])
    check_is_merged_as_peft_does(qwen2, peft, tune, tmp_path, "an adapter of torchtune")


def test_an_export_of_torchtune_in_an_order_that_the_base_does_not_have_is_refused(llama, qwen2, tmp_path):
    """`tune_to_peft_adapter_weights` reorders queries and keys for Qwen2, too, whose base it has as transformers does.

    Expected of what is left once the export is removed is PEFT's merge of the adapter as it was trained.
    """
    trained = make_adapter(qwen2, tmp_path / "trained", targets=("q_proj", "v_proj"))
    tune = write_torchtune(trained, tmp_path / "tune", heads={}, head_dim=16)

    def as_exported(name, tensor):
        if not name.endswith("q_proj.lora_B.weight"):
            return tensor
        return tensor.view(4, 8, 2, -1).transpose(1, 2).reshape(tensor.shape)

    tensors = load_file(trained / "adapter_model.safetensors")
    exported = {name: as_exported(name, tensor).contiguous() for name, tensor in tensors.items()}
    save_file(exported, tune / "adapter_model.safetensors")
    assert "rows of queries and keys in the order of Llama" in refusal(qwen2, tune, tmp_path / "1")
    (tune / "adapter_model.safetensors").unlink()
    check_is_merged_as_peft_does(qwen2, trained, tune, tmp_path, "an adapter of torchtune")
    # Of Llama, the same order is right: read as PEFT's.
    peft = make_adapter(llama, tmp_path / "llama", targets=("q_proj", "k_proj"))
    both = write_torchtune(peft, tmp_path / "both", heads=LLAMA_HEADS, head_dim=16)
    save_file(load_file(peft / "adapter_model.safetensors"), both / "adapter_model.safetensors")
    assert different(merge(llama, both, tmp_path / "2"), merge_by_peft(llama, peft, tmp_path / "3")) == []


def test_torchtune_that_does_not_say_enough_is_refused(llama, plain, tmp_path):
    tune = write_torchtune(plain, tmp_path / "tune", heads=LLAMA_HEADS, head_dim=16)
    change_config(tune, target_modules=["q_proj"])
    assert "field target_modules: expected a list of down_proj, gate_proj" in refusal(llama, tune, tmp_path / "1")
    change_config(tune, use_rslora=True)
    assert "field use_rslora = true is none that is known" in refusal(llama, tune, tmp_path / "2")
    (tune / "adapter_config.json").unlink()
    assert "which says nothing of rank and alpha" in refusal(llama, tune, tmp_path / "3")
    (tune / "adapter_0.pt").write_bytes(b"")
    assert "are both adapters of torchtune" in refusal(llama, tune, tmp_path / "4")
    other = architectures.build("decoder", "phi3", tmp_path / "phi3")
    phi = write_torchtune(plain, tmp_path / "phi", heads=LLAMA_HEADS, head_dim=16)
    assert "for a base of model_type phi3" in refusal(other, phi, tmp_path / "5")


def test_tinker_is_merged_as_peft_merges_it(llama, plain, tmp_path):
    tinker = write_tinker(plain, tmp_path / "tinker")
    check_is_merged_as_peft_does(llama, plain, tinker, tmp_path, "an adapter of Tinker")


def test_tinker_without_a_name_of_its_own(llama, tmp_path):
    """No head and no experts: tensors are PEFT's own, and the configuration has nothing but rank and alpha."""
    peft = make_adapter(llama, tmp_path / "adapter", targets=LINEAR_TARGETS)
    tinker = write_tinker(peft, tmp_path / "tinker")
    check_is_merged_as_peft_does(llama, peft, tinker, tmp_path, "an adapter of Tinker")


def test_tinker_multiplies_by_alpha_through_r_whatever_rank_a_tensor_has(llama, tmp_path):
    """As `validate_adapter_config` and `plan_standard_op` of tinker_cookbook do."""
    peft = make_adapter(
        llama,
        tmp_path / "adapter",
        targets=("q_proj", "v_proj"),
        rank=8,
        alpha=12,
        rank_pattern={"v_proj": 3},
        alpha_pattern={"v_proj": 4.5},
    )
    tinker = write_tinker(peft, tmp_path / "tinker")
    check_is_merged_as_peft_does(llama, peft, tinker, tmp_path, "an adapter of Tinker")


@pytest.mark.parametrize(
    ("shared", "rank"), [(False, 4), (True, 4), (True, 16)], ids=["each", "shared", "of less rank"]
)
def test_experts_of_tinker_are_merged_one_by_one(tmp_path, shared, rank):
    """Expected is W + alpha / r B A of each expert in float64; what experts share counts for all of them."""
    base = architectures.build("decoder", "qwen3_moe", tmp_path / "base", dtype=torch.float32)
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    expected = save_old_adapter(base, tmp_path / "old", target_modules=targets)
    change_config(tmp_path / "old", r=rank, lora_alpha=2 * rank)
    in_common = re.compile(r".*\.(w[13]\.lora_A|w2\.lora_B)\.weight")
    tinker = write_tinker(tmp_path / "old", tmp_path / "tinker", shared=in_common.fullmatch if shared else None)
    before = read_tensors(base)
    if shared:
        tensors = load_file(tinker / "adapter_model.safetensors")
        for name in [name for name in expected if ".experts." in name]:
            place, number, leaf = re.fullmatch(r"(.+)\.experts\.(\d+)\.(.+)_proj\.weight", name).groups()
            start = f"base_model.model.{place}.experts.{ {'gate': 'w1', 'up': 'w3', 'down': 'w2'}[leaf] }.lora_"
            a, b = (tensors[f"{start}{half}.weight"].double() for half in "AB")
            expected[name] = before[name].double() + 2 * (b[int(number) % len(b)] @ a[int(number) % len(a)])
    merged = merge(base, tinker, tmp_path / "ours", parity={"level": "arithmetic"})
    for name, tensor in merged.items():
        exact = expected.get(name, before[name].double())
        assert torch.allclose(tensor.double(), exact, rtol=1e-6, atol=1e-7), name


def test_projections_that_tinker_trains_apart(tmp_path):
    """Expected is W + alpha / r B A in float64 for the rows of each, as `_plan_split_qkv_op` of tinker_cookbook has it;
    bits are those of PEFT's merge of one adapter of three times the rank."""
    base = architectures.build("vision-language", "qwen3_5", tmp_path / "base", dtype=torch.float32)
    place = "model.language_model.layers.0.linear_attn"
    before = read_tensors(base)
    sizes = {"q": 32, "k": 32, "v": 64}  # 2 heads of 16 for queries and keys, 4 for values
    assert before[f"{place}.in_proj_qkv.weight"].shape == (sum(sizes.values()), 64)
    torch.manual_seed(3)
    a = {one: torch.randn(4, 64) * 0.2 for one in sizes}
    b = {one: torch.randn(size, 4) * 0.2 for one, size in sizes.items()}
    inside = f"base_model.model.{place.replace('language_model.', '')}.in_proj_"
    pairs = {f"{inside}{one}.lora_A.weight": a[one] for one in sizes}
    pairs |= {f"{inside}{one}.lora_B.weight": b[one] for one in sizes}
    (tmp_path / "tinker").mkdir()
    save_file(pairs, tmp_path / "tinker" / "adapter_model.safetensors")
    (tmp_path / "tinker" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 10}))
    peft = make_adapter(base, tmp_path / "blocks", targets=rf"{re.escape(place)}\.in_proj_qkv", rank=12, alpha=30)
    name = f"base_model.model.{place}.in_proj_qkv.lora_"
    blocks = {f"{name}A.weight": torch.cat([*a.values()]), f"{name}B.weight": torch.block_diag(*b.values())}
    save_file(blocks, peft / "adapter_model.safetensors")
    check_is_merged_as_peft_does(base, peft, tmp_path / "tinker", tmp_path, "an adapter of Tinker")
    merged = merge(base, tmp_path / "tinker", tmp_path / "again")[f"{place}.in_proj_qkv.weight"].double()
    delta = torch.cat([2.5 * b[one].double() @ a[one].double() for one in sizes])
    assert torch.allclose(merged, before[f"{place}.in_proj_qkv.weight"].double() + delta, rtol=1e-6, atol=1e-6)
    del pairs[f"{inside}k.lora_A.weight"], pairs[f"{inside}k.lora_B.weight"]
    save_file(pairs, tmp_path / "tinker" / "adapter_model.safetensors")
    assert "without in_proj_k, so that nothing says" in refusal(base, tmp_path / "tinker", tmp_path / "refused")


def test_a_text_adapter_of_tinker_on_a_vision_language_base(tmp_path):
    """Tinker's names begin with model. whatever the base is; PEFT's adapter is made on the base's own names."""
    base = architectures.build("vision-language", "qwen2_5_vl", tmp_path / "base")
    targets = r"model\.language_model\..*\.(q_proj|up_proj)|lm_head"
    peft = make_adapter(base, tmp_path / "adapter", targets=targets)
    tinker = write_tinker(peft, tmp_path / "tinker")
    change_tensors(
        tinker,
        lambda tensors: {name.replace("model.language_model.", "model."): t for name, t in tensors.items()},
        "adapter_model.safetensors",
    )
    check_is_merged_as_peft_does(base, peft, tinker, tmp_path, "an adapter of Tinker")


def test_what_tinker_leaves_open_is_refused(llama, qwen2, plain, tmp_path):
    tied = make_adapter(qwen2, tmp_path / "tied", targets=("q_proj", "lm_head"))
    tinker = write_tinker(tied, tmp_path / "tinker")
    assert "this base has no head beside its embedding" in refusal(qwen2, tinker, tmp_path / "1")
    change_config(tinker, use_rslora=True)
    assert "field use_rslora = true is none that is known" in refusal(llama, tinker, tmp_path / "2")
    stacked = write_tinker(plain, tmp_path / "stacked")
    stack = {f"base_model.model.model.layers.0.mlp.experts.w1.lora_{half}.weight": torch.ones(2, 8, 8) for half in "AB"}
    change_tensors(stacked, lambda tensors: tensors | stack, "adapter_model.safetensors")
    assert "the files of this base hold no single ones" in refusal(llama, stacked, tmp_path / "3")
    change_tensors(
        stacked,
        lambda tensors: {n: torch.zeros(0, 0, 0) if n in stack else t for n, t in tensors.items()},
        "adapter_model.safetensors",
    )
    expected = merge_by_peft(llama, plain, tmp_path / "peft")
    assert different(merge(llama, stacked, tmp_path / "4"), expected) == []  # placeholders that hold nothing


def test_what_is_converted_is_converted_once(llama, plain, tmp_path):
    tinker = write_tinker(plain, tmp_path / "tinker")
    first = plan_pass(llama, {"job": tinker}, tmp_path).plans[0].adapter
    written = (first.directory / "adapter_model.safetensors").stat()
    second = plan_pass(llama, {"job": tinker}, tmp_path).plans[0].adapter
    assert second == first
    assert (second.directory / "adapter_model.safetensors").stat() == written
