"""Several adapters as one: the merge of what is combined here against PEFT's over the whole loaded model."""

import json
import re
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import workers.adapters.combination
import workers.unit.request_adapters
from jobs.combination import CombinationType
from jobs.errors import BadInputError, UnsupportedError
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from tests.combinations import EVERY_TYPE, combine_by_peft, merge_combined_by_peft
from tests.merges import different, merge_by_peft, one_torch_thread, plan_requests, read_tensors
from tests.methods import make_method_adapter
from tests.models import build_llama, load_plain, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS, open_adapter
from workers.adapters.config import ADAPTER_CONFIG
from workers.merging.base_plan import plan_base
from workers.merging.checks.evidence import Evidence
from workers.merging.plan import plan_merge
from workers.parity.inference import quiet_libraries
from workers.sources.fetch import fetch_base
from workers.unit.estimate import combination_seconds
from workers.unit.footprint import combination_bytes
from workers.unit.request_adapters import fetch_adapters, outline_adapters

# PEFT writes a `cat` into parameters of the base's dtype; ours are in float32 whatever the base is in.
ROUNDED_BY_PEFT = {"cat"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("combination")


@pytest.fixture(scope="module")
def base(places):
    return build_llama(places / "llama")


@pytest.fixture(scope="module")
def wide(places):
    return build_llama(places / "wide", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapters(places, base):
    return (
        make_adapter(base, places / "one"),
        make_adapter(base, places / "two", targets=["q_proj", "v_proj", "down_proj"], alpha=5, seed=2),
        make_adapter(base, places / "three", targets=["q_proj", "o_proj"], rslora=True, seed=3),
    )


@pytest.fixture(scope="module")
def small(places, base):
    return make_adapter(base, places / "small", rank=3, targets=["q_proj", "up_proj"], seed=4)


@pytest.fixture
def request_for(tmp_path):
    def make(base, adapters, weights, **how):
        return MergeRequest(
            id="job",
            base=str(base),
            adapters=[
                {"adapter": str(adapter), "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)
            ],
            combination=how,
            destination=str(tmp_path / "release"),
            base_quantization="none",
            parity={"level": "arithmetic"},
        )

    return make


@pytest.fixture
def combine(request_for, tmp_path):
    def combine(base, adapters, weights, cache="cache", **how):
        request = request_for(base, adapters, weights, **how)
        return fetch_adapters(request, fetch_base(LocalPath(base), tmp_path), tmp_path / cache)

    return combine


@pytest.fixture
def merge(request_for, tmp_path):
    def merge(base, adapters, weights, **how):
        planned = plan_requests([request_for(base, adapters, weights, **how)], tmp_path / "merge")
        result = planned.run()
        assert not result.errors, result.errors
        return read_tensors(planned.output("job"))

    return merge


def test_the_types_are_those_of_peft():
    assert set(EVERY_TYPE) == set(CombinationType)


@pytest.mark.parametrize("kind", sorted(set(EVERY_TYPE) - ROUNDED_BY_PEFT))
@pytest.mark.parametrize("weights", [(0.7, -0.4), (1.0, 0.5, -2.0)])
def test_every_type_merges_as_peft_does(base, adapters, tmp_path, merge, kind, weights):
    how = EVERY_TYPE[kind]
    adapters = adapters[: len(weights)]
    expected = merge_combined_by_peft(base, adapters, weights, tmp_path / "peft", combination_type=kind, **how)
    assert different(merge(base, adapters, weights, type=kind, **how), expected) == []


@pytest.mark.parametrize("kind", sorted(EVERY_TYPE))
def test_every_type_merges_as_peft_does_into_float32(wide, adapters, tmp_path, merge, kind):
    how, weights = EVERY_TYPE[kind], (0.7, -0.4, 1.5)
    expected = merge_combined_by_peft(wide, adapters, weights, tmp_path / "peft", combination_type=kind, **how)
    assert different(merge(wide, adapters, weights, type=kind, **how), expected) == []


def test_a_cat_is_not_rounded_before_it_is_merged(base, adapters, tmp_path, merge):
    weights = (0.7, -0.4)
    ours = merge(base, adapters[:2], weights, type="cat")
    combine_by_peft(base, adapters[:2], weights, combination_type="cat", dtype=torch.float32).save_pretrained(
        tmp_path / "saved", selected_adapters=["all"]
    )
    assert different(ours, merge_by_peft(base, tmp_path / "saved" / "all", tmp_path / "peft")) == []
    rounded = merge_combined_by_peft(base, adapters[:2], weights, tmp_path / "rounded", combination_type="cat")
    exact = {name: tensor.double() for name, tensor in read_tensors(base).items()}
    for adapter, weight in zip(adapters[:2], weights, strict=True):
        scaling = json.loads((adapter / ADAPTER_CONFIG).read_text())["lora_alpha"] / 8
        tensors = load_file(adapter / ADAPTER_WEIGHTS)
        for name in [name for name in tensors if "lora_A" in name]:
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
            exact[name.removeprefix("base_model.model.").replace("lora_A.", "")] += weight * scaling * delta
    changed = [name for name in exact if "proj" in name]
    errors = {
        who: sum(float((tensors[name].double() - exact[name]).square().sum()) for name in changed)
        for who, tensors in (("ours", ours), ("rounded", rounded))
    }
    assert errors["ours"] < 0.95 * errors["rounded"]


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd", "dare_linear_svd", "magnitude_prune_svd"])
def test_ranks_may_differ_where_whole_deltas_are_combined(wide, adapters, small, tmp_path, merge, kind):
    given, how, weights = (adapters[0], small), EVERY_TYPE[kind], (1.0, -0.5)
    expected = merge_combined_by_peft(wide, given, weights, tmp_path / "peft", combination_type=kind, **how)
    assert different(merge(wide, given, weights, type=kind, **how), expected) == []


@pytest.mark.parametrize(
    "how",
    [
        {"type": "svd", "svd_rank": 2},
        {"type": "svd", "svd_rank": 50, "svd_full_matrices": False},
        {"type": "svd", "svd_clamp": 0.9, "svd_full_matrices": False},
        {"type": "ties", "density": 0.3, "majority_sign_method": "frequency"},
        {"type": "ties", "density": 1.0},
        {"type": "dare_ties_svd", "density": 0.3, "majority_sign_method": "frequency", "svd_rank": 4, "seed": 11},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_every_argument_reaches_peft(base, adapters, tmp_path, merge, how):
    given, weights = adapters[:2], (1.0, 0.5)
    arguments = {"combination_type" if name == "type" else name: value for name, value in how.items()}
    expected = merge_combined_by_peft(base, given, weights, tmp_path / "peft", **arguments)
    assert different(merge(base, given, weights, **how), expected) == []


def test_ranks_below_the_configured_one_are_written_down(base, adapters, tmp_path, merge, combine):
    """An SVD has no more vectors than its matrix has rows or columns, and patterns give modules ranks of their own."""
    patterns = {"rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 12}, "alpha_pattern": {"q_proj": 7}}
    given = [make_adapter(base, tmp_path / f"adapter{seed}", seed=seed, **patterns) for seed in (5, 6)]
    how = {"combination_type": "linear"}
    expected = merge_combined_by_peft(base, given, (1.0, 0.5), tmp_path / "linear", **how)
    assert different(merge(base, given, (1.0, 0.5), type="linear"), expected) == []
    config = open_adapter(combine(base, given, (1.0, 0.5), type="linear").directory).config
    assert config.r == config.lora_alpha == 12
    assert config.rank_pattern == config.alpha_pattern
    assert config.rank_pattern[r"^model\.layers\.0\.self_attn\.q_proj"] == 3
    how = {"type": "svd", "svd_rank": 50}
    high = combine(base, adapters[:1] * 2, (1.0, 0.5), svd_full_matrices=False, **how).directory
    assert open_adapter(high).config.rank_pattern[r"^model\.layers\.1\.self_attn\.k_proj"] == 32
    with pytest.raises(UnsupportedError, match="svd_full_matrices: false, or svd_rank: 32 or less"):
        combine(base, adapters[:1] * 2, (1.0, 0.5), **how)


def test_a_single_adapter_may_be_weighted(base, adapters, tmp_path, merge):
    expected = merge_combined_by_peft(base, adapters[:1], (-0.25,), tmp_path / "peft", combination_type="linear")
    assert different(merge(base, adapters[:1], (-0.25,), type="linear"), expected) == []


def test_embeddings_are_combined(wide, tmp_path, merge):
    given = []
    for seed in (1, 2):
        made = make_adapter(wide, tmp_path / f"made{seed}", targets=["embed_tokens", "q_proj"], seed=seed, trained=True)
        model = PeftModel.from_pretrained(load_plain(wide), made)
        model.save_pretrained(tmp_path / f"adapter{seed}", save_embedding_layers=False)
        given.append(tmp_path / f"adapter{seed}")
    for kind in ("linear", "svd", "cat"):
        expected = merge_combined_by_peft(wide, given, (1.0, 0.5), tmp_path / kind, combination_type=kind)
        assert different(merge_anew(merge, wide, given, tmp_path, kind), expected) == []


def merge_anew(merge, base, given, tmp_path, kind):
    shutil.rmtree(tmp_path / "merge", ignore_errors=True)
    return merge(base, given, (1.0, 0.5), type=kind)


def test_ia3_is_summed(wide, tmp_path, merge, combine):
    given = [make_method_adapter(wide, tmp_path / f"ia3-{seed}", "IA3", std=0.1 * seed) for seed in (1, 2)]
    names = ["adapter0", "adapter1"]
    with quiet_libraries(), one_torch_thread():
        model = PeftModel.from_pretrained(load_plain(wide), given[0], adapter_name=names[0])
        model.load_adapter(given[1], adapter_name=names[1])
        model.add_weighted_adapter(names, [0.5, 0.75], "all")
        model.set_adapter("all")
        model.merge_and_unload().save_pretrained(tmp_path / "peft")
    assert different(merge(wide, given, (0.5, 0.75), type="linear"), read_tensors(tmp_path / "peft")) == []
    with pytest.raises(UnsupportedError, match=r"IA3 by weighted sum alone.*found svd"):
        combine(wide, given, (1, 1), type="svd")


@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal"])
def test_masks_are_those_of_peft_however_the_adapters_were_initialized(base, adapters, tmp_path, merge, init):
    given = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in adapters[:2]]
    for adapter in given:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text())
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(config | {"init_lora_weights": init}))
    how = {"density": 0.5, "seed": 3}
    expected = merge_combined_by_peft(base, given, (1, 0.5), tmp_path / "peft", combination_type="dare_linear", **how)
    assert different(merge(base, given, (1, 0.5), type="dare_linear", **how), expected) == []


def test_masks_follow_the_seed_alone(base, adapters, combine):
    def weights(cache, seed):
        torch.rand(3)
        source = combine(base, adapters[:2], (1, 1), cache, type="dare_linear", density=0.5, seed=seed)
        return load_file(source.directory / ADAPTER_WEIGHTS)

    before = torch.get_rng_state()
    first = weights("one", 3)
    torch.set_rng_state(before)
    assert different(first, weights("two", 3)) == []
    assert different(first, weights("three", 4)) != []


def test_what_was_combined_is_kept_and_named_after_all_that_decides_it(base, adapters, combine, monkeypatch):
    one = combine(base, adapters[:2], (1, 0.5), type="ties", density=0.5)
    assert [part.directory for part in one.parts] == list(adapters[:2])
    assert {tensor.dtype for tensor in load_file(one.directory / ADAPTER_WEIGHTS).values()} == {torch.float32}
    others = [
        combine(base, adapters[:2], (1, 0.25), type="ties", density=0.5),
        combine(base, adapters[:2], (1, 0.5), type="ties", density=0.25),
        combine(base, adapters[1::-1], (1, 0.5), type="ties", density=0.5),
        combine(base, adapters[:2], (1, 0.5), type="magnitude_prune", density=0.5),
    ]
    assert len({source.directory for source in [one, *others]}) == 5
    monkeypatch.setattr(workers.unit.request_adapters, "_combine", None)  # nothing is combined again
    assert combine(base, adapters[:2], (1, 0.5), type="ties", density=0.5, majority_sign_method="total") == one


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_proof_of_a_sum_begins_at_each_adapter(base, adapters, tmp_path, request_for, monkeypatch, factor):
    """What is lost while adapters are concatenated is found; what PEFT makes of them is their sum."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    really = workers.adapters.combination.read_tensor

    def read(path, spec):
        return really(path, spec) * (factor if spec.name == name and path.parent == adapters[1] else 1.0)

    monkeypatch.setattr(workers.adapters.combination, "read_tensor", read)
    planned = plan_requests([request_for(base, adapters[:2], (0.7, -0.4), type="cat")], tmp_path / "merge")
    assert not planned.run().errors
    checks = planned.check()["job"]
    wrong = {check.tensor for check in checks.values() if check.num_bad_elements}
    assert wrong == (set() if factor == 1 else {"model.layers.0.self_attn.q_proj.weight"})
    assert Evidence(planned.plans[0]).unfounded(checks) == ()


def test_a_tensor_that_a_combination_has_lost_is_named(base, adapters, tmp_path, request_for):
    planned = plan_requests([request_for(base, adapters[:2], (1, 1), type="linear")], tmp_path / "merge")
    evidence = Evidence(planned.plans[0])
    lost = next(name for name in evidence.tensors if "layers.1." in name)
    del evidence.tensors[lost]
    assert evidence.unfounded({}) == (*evidence.tensors, lost)


def shapes_of(plan):
    return {name: (delta.a_RI.shape, delta.b_OR.shape, delta.scaling) for name, delta in plan.deltas.items()}


def test_an_outline_is_planned_as_the_merge_is(base, adapters, tmp_path, request_for, combine):
    for kind, how in EVERY_TYPE.items():
        request = request_for(base, adapters, (1, -0.5, 0.3), type=kind, **how)
        source = fetch_base(LocalPath(base), tmp_path)
        (tmp_path / kind).mkdir()
        outline = outline_adapters(request, source, tmp_path / "cache", tmp_path / kind)
        assert not (tmp_path / "cache" / "combined").exists()
        planned = plan_base(source, request)
        drawn = plan_merge(planned, request, outline)
        made = plan_merge(planned, request, combine(base, adapters, (1, -0.5, 0.3), kind, type=kind, **how))
        assert drawn.merge_key == made.merge_key
        assert shapes_of(drawn) == shapes_of(made)
        assert drawn.changed == made.changed
        assert combination_bytes(drawn) == combination_bytes(made) > 0
        assert (combination_seconds(drawn) > 0) is kind.endswith("svd")


def test_tokenizers_that_agree_are_taken(base, adapters, tmp_path, combine):
    given = [shutil.copytree(adapter, tmp_path / adapter.name) for adapter in adapters[:2]]
    for adapter in given:
        shutil.copy(base / "tokenizer.json", adapter)
    (given[0] / "chat_template.jinja").write_text("{{ messages }}")
    combined = combine(base, given, (1, 1), type="linear").directory
    assert (combined / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert (combined / "chat_template.jinja").read_text() == "{{ messages }}"
    (given[1] / "chat_template.jinja").write_text("other")
    with pytest.raises(UnsupportedError, match=r"differ, and the merged model has one chat_template\.jinja"):
        combine(base, given, (1, 1), type="linear")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "no tensor such as .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "no tensor such as .*lm_head"),
        ({"lora_bias": True}, "no tensor such as .*lora_B.bias"),
        ({"rslora": True}, "use_rslora"),
        ({"targets": ["embed_tokens"]}, "no tensor such as .*embed_tokens"),
        ({"targets": ["q_proj", "v_proj"], "layers_to_transform": [0]}, r"leaves out model.layers.1.\S+, which .*two"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_peft_would_drop_is_refused_by_name(base, adapters, tmp_path, combine, fields, words):
    made = make_adapter(base, tmp_path / "made", trained=True, **fields)
    with pytest.raises(UnsupportedError, match=words) as caught:
        combine(base, [made, adapters[1]], (1, 1), type="cat")
    assert str(made) in str(caught.value)


def test_what_peft_refuses_is_refused(base, adapters, small, tmp_path, combine):
    with pytest.raises(BadInputError, match="same r value"):
        combine(base, [adapters[0], small], (1, 1), type="linear")
    pattern = make_adapter(base, tmp_path / "pattern", targets=r".*q_proj")
    with pytest.raises(BadInputError, match="same target modules type"):
        combine(base, [adapters[0], pattern], (1, 1), type="linear")
    loha = make_method_adapter(base, tmp_path / "loha", "LOHA")
    with pytest.raises(UnsupportedError, match=r"LORA or IA3, found LOHA; merge one after the other"):
        combine(base, [loha, loha], (1, 1), type="linear")
    ia3 = make_method_adapter(base, tmp_path / "ia3", "IA3")
    with pytest.raises(UnsupportedError, match="found IA3 beside LORA"):
        combine(base, [adapters[0], ia3], (1, 1), type="linear")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_every_adapter_is_accounted_for(base, adapters, tmp_path, combine):
    broken = shutil.copytree(adapters[1], tmp_path / "broken")
    config = json.loads((broken / ADAPTER_CONFIG).read_text())
    (broken / ADAPTER_CONFIG).write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(UnsupportedError, match=re.escape(str(broken)) + r".*belong to nothing"):
        combine(base, [adapters[0], broken], (1, 1), type="cat")
