"""What transformers renames, fuses and splits while loading: found out and done here as it does it."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import BadInputError
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from tests import architectures
from tests.merges import plan_pass, read_tensors
from tests.methods import make_method_adapter
from tests.models import load_plain
from workers.bases.conversions import Conversions
from workers.bases.model import skeleton
from workers.merging.base_plan import plan_base
from workers.sources.fetch import fetch_base

# Per-expert weights become one parameter, prefixes move, one tensor becomes three, q, k and v go into one.
ARCHITECTURES = [
    ("decoder", "llama"),
    ("decoder", "mixtral"),
    ("decoder", "qwen3_moe"),
    ("decoder", "deepseek_v3"),
    ("decoder", "hrm_text"),
    ("decoder", "olmo_hybrid"),
    ("decoder", "kimi_linear"),
    ("vision-language", "gemma3"),
    ("vision-language", "qwen2_5_vl"),
    ("vision-language", "mllama"),
    ("encoder", "nomic_bert"),
]


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda param: param[1])
def base(request, tmp_path_factory):
    return architectures.build(*request.param, tmp_path_factory.mktemp("base") / request.param[1])


@pytest.fixture
def stored(base):
    return read_tensors(base)


@pytest.fixture
def conversions(base, stored):
    return Conversions(skeleton(base), {name: tensor.to("meta") for name, tensor in stored.items()})


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left, right)


def test_what_4_bits_change_of_a_part_is_told_for_the_tensor_it_is_a_part_of(tmp_path):
    base = architectures.build("decoder", "hrm_text", tmp_path / "base")
    adapter = make_method_adapter(base, tmp_path / "adapter", "LORA", r=4, target_modules=["o_proj"])
    planned = plan_pass(base, {"job": adapter}, tmp_path, base_quantization="nf4", parity={"level": "arithmetic"})
    [plan] = planned.plans
    assert plan.regrouped
    assert plan.changed == {name for name in plan.by_peft.keys() | plan.deltas.keys() if "o_proj" in name}
    assert not planned.run().errors
    checks = planned.check()["job"]
    assert {name for name, check in checks.items() if check.targeted} == plan.changed
    stored, merged = read_tensors(base), read_tensors(planned.output("job"))
    for name in plan.regrouped:
        error = float((merged[name].double() - stored[name].double()).norm())
        assert checks[name].quantization_error == pytest.approx(error, rel=1e-5)
        assert checks[name].num_bad_elements == 0


def test_tensors_become_what_transformers_makes_of_them(base, stored, conversions):
    expected = load_plain(base).state_dict()
    found = {name: stored[other] for name, other in conversions.stored_names.items()}
    for group in conversions.groups:
        found |= conversions.load(group, stored.__getitem__)
    assert all(same(tensor, expected[name]) for name, tensor in found.items())
    tied = load_plain(base).all_tied_weights_keys
    assert {name for name, _ in load_plain(base).named_parameters()} <= found.keys() | tied.keys() | set(tied.values())


def test_tensors_go_back_to_where_they_were(stored, conversions):
    for group in conversions.groups:
        back = conversions.revert(group, conversions.load(group, stored.__getitem__))
        assert back.keys() == set(group.stored)
        assert all(same(tensor, stored[name]) for name, tensor in back.items())


def test_every_stored_tensor_has_one_place(stored, conversions):
    places = [*conversions.stored_names.values(), *(name for group in conversions.groups for name in group.stored)]
    assert sorted(places) == sorted(stored)


def test_tensors_that_the_model_does_not_take_have_none(tmp_path):
    base = architectures.build("decoder", "mixtral", tmp_path / "base")
    stored = read_tensors(base) | {"mtp.head.weight": torch.zeros(2, 2)}
    found = Conversions(skeleton(base), {name: tensor.to("meta") for name, tensor in stored.items()})
    assert "mtp.head.weight" not in found.parameter_names


def plan(base, tmp_path):
    request = MergeRequest(
        id="one", base=str(base), adapter="/none", destination="/releases/one", base_quantization="none"
    )
    return plan_base(fetch_base(LocalPath(base), tmp_path / "cache"), request)


def change(base, tmp_path, edit):
    shutil.copytree(base, tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "changed"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return architectures.build("decoder", "mixtral", tmp_path_factory.mktemp("base") / "mixtral")


def test_an_expert_that_is_missing_is_a_shape_that_does_not_fit(mixtral, tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    changed = change(mixtral, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(BadInputError, match=r"make model\.layers\.1\.mlp\.experts\.down_proj of shape \[3, 64, 128\]"):
        plan(changed, tmp_path)


def test_missing_tensors_are_named(mixtral, tmp_path):
    changed = change(mixtral, tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(BadInputError, match=r"1 tensors .* missing, first model\.layers\.1\.self_attn\.q_proj\.weight"):
        plan(changed, tmp_path)


def test_tensors_under_other_names_are_told_with_missing_ones(mixtral, tmp_path):
    def rename(tensors):
        for name in list(tensors):
            tensors[f"elsewhere.{name}"] = tensors.pop(name)

    with pytest.raises(BadInputError, match=r"missing, first .*; it holds elsewhere\.lm_head\.weight and \d+ more"):
        plan(change(mixtral, tmp_path, rename), tmp_path)
