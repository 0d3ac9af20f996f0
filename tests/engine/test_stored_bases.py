"""Merges into bases in stored forms: what the library dequantizes, merged by PEFT, bit for bit."""

import json
import shutil

import pytest
import torch

from jobs.errors import UnsupportedError
from tests import architectures
from tests.merges import different, merge, merge_by_peft, plan_pass, read_tensors
from tests.methods import save_old_adapter
from tests.models import build_bnb_4bit, build_llama, make_adapter
from tests.stored import twin_of
from tests.stored.cells import ARCHITECTURES, ON_EXPERTS, STORED
from tests.stored.forms import LINEAR
from tests.stored.fp8_blocks import store_fp8
from tests.stored.mxfp4 import store_mxfp4
from tests.stored.reading import is_misread
from workers.bases.model import load_config, model_class
from workers.merging.plain_base import write_plain_base
from workers.merging.sidecars import write_sidecars

FORMS = {
    "dense": (
        "fp8",
        "compressed-tensors fp8 by channel",
        "compressed-tensors fp8 by block",
        "compressed-tensors int8 by channel",
        "compressed-tensors int4 by group",
        "compressed-tensors int4 with zero points",
        "compressed-tensors nvfp4",
        "ModelOpt fp8",
        "ModelOpt nvfp4",
    ),
    "mixture of experts": (
        "fp8",
        "compressed-tensors fp8 by block",
        "compressed-tensors int8 by channel",
        "compressed-tensors int4 by group",
        "compressed-tensors nvfp4",
    ),
    "latent attention": ("fp8", "compressed-tensors int4 by group", "ModelOpt nvfp4"),
}
"""In which each architecture is stored here; `make fidelity` has all."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Bases in 16 bits, each with an adapter, by architecture."""
    directory = tmp_path_factory.mktemp("plain")
    made = {}
    for architecture, (model_type, targets) in ARCHITECTURES.items():
        base = architectures.build("decoder", model_type, directory / model_type)
        adapter = make_adapter(base, directory / f"{model_type}-adapter", targets=targets, rank=2)
        made[architecture] = base, adapter
    return made


@pytest.fixture(
    scope="module",
    params=[(architecture, form) for architecture, forms in FORMS.items() for form in forms],
    ids=lambda pair: "-".join(pair).replace(" ", "-"),
)
def stored(request, plain, tmp_path_factory):
    """A base in a form with its twin in 16 bits beside it, and an adapter."""
    architecture, form = request.param
    base, adapter = plain[architecture]
    return LINEAR[form](base, tmp_path_factory.mktemp("stored") / "base"), adapter


def test_a_release_is_the_merge_by_peft_of_what_the_library_dequantizes(stored, tmp_path):
    base, adapter = stored
    merged = merge(base, adapter, tmp_path / "ours", **STORED)
    expected = merge_by_peft(twin_of(base), adapter, tmp_path / "peft")
    assert different(merged, expected) == []


def test_what_transformers_does_not_read_is_known(stored, tmp_path):
    """Parity full then runs the base as it was dequantized here; the twin is what that has to be."""
    base, adapter = stored
    planned = plan_pass(base, {"job": adapter}, tmp_path, **STORED)
    assert (planned.base.misread is not None) == is_misread(base)
    (tmp_path / "numbers").mkdir()
    write_plain_base(planned.base, tmp_path / "numbers", torch.device("cpu"), lambda: None)
    assert different(read_tensors(tmp_path / "numbers"), read_tensors(twin_of(base))) == []
    model = model_class(load_config(tmp_path / "numbers")).from_pretrained(tmp_path / "numbers", dtype=torch.bfloat16)
    twin = model_class(load_config(twin_of(base))).from_pretrained(twin_of(base), dtype=torch.bfloat16)
    assert different(dict(model.state_dict()), dict(twin.state_dict())) == []


@pytest.mark.parametrize("form", ["fp8", "compressed-tensors int4 with zero points", "ModelOpt nvfp4"])
def test_what_adapters_are_merged_into_beside_streams(plain, tmp_path, form):
    """DoRA, which PEFT merges, takes the same weights."""
    base = LINEAR[form](plain["dense"][0], tmp_path / "base")
    dora = make_adapter(twin_of(base), tmp_path / "dora", targets=["o_proj"], rank=2, use_dora=True)
    merged = merge(base, dora, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(twin_of(base), dora, tmp_path / "peft")) == []


@pytest.mark.parametrize("form", ["fp8", "compressed-tensors int4 by group", "compressed-tensors nvfp4"])
def test_single_experts_that_are_codes(tmp_path, form):
    """Expected is W + scaling * B @ A for each, W as the library dequantizes it."""
    plain = architectures.build("decoder", "qwen2_moe", tmp_path / "plain")
    base = LINEAR[form](plain, tmp_path / "base")
    targets = ["q_proj", "gate_proj", "down_proj"]
    expected = save_old_adapter(twin_of(base), tmp_path / "adapter", target_modules=targets)
    merged = merge(base, tmp_path / "adapter", tmp_path / "ours", **STORED)
    twin = merge(twin_of(base), tmp_path / "adapter", tmp_path / "of-the-twin", **STORED)
    assert different(merged, twin) == []
    assert len([name for name in expected if ".experts." in name]) >= 8
    for name, exact in expected.items():
        assert torch.allclose(merged[name].double(), exact, rtol=2**-8, atol=1e-6)


@pytest.fixture(scope="module", params=[False, True], ids=["together", "scales-apart"])
def gpt_oss(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt-oss")
    plain = architectures.build("decoder", "gpt_oss", directory / "plain")
    return store_mxfp4(plain, directory / "mxfp4", apart=request.param)


@pytest.mark.parametrize(
    "options",
    [
        {"targets": ["q_proj", "o_proj"]},
        ON_EXPERTS,
    ],
    ids=["attention", "experts"],
)
def test_experts_in_mxfp4(gpt_oss, tmp_path, options):
    adapter = make_adapter(twin_of(gpt_oss), tmp_path / "adapter", rank=2, **options)
    merged = merge(gpt_oss, adapter, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(twin_of(gpt_oss), adapter, tmp_path / "peft")) == []


def test_what_transformers_dequantizes_of_mxfp4(gpt_oss):
    assert not is_misread(gpt_oss)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    return build_llama(directory / "plain", tokenizer=False)


@pytest.mark.parametrize(
    ("block", "scale_dtype", "apart"),
    [((128, 128), torch.bfloat16, True), ((48, 80), torch.float32, False), (None, torch.float32, False)],
    ids=["scales apart", "cut blocks", "one scale"],
)
def test_layouts(llama, tmp_path, block, scale_dtype, apart):
    fp8 = store_fp8(llama, tmp_path / "fp8", block=block, scale_dtype=scale_dtype, apart=apart)
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj", "up_proj"])
    merged = merge(fp8, adapter, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(twin_of(fp8), adapter, tmp_path / "peft")) == []


def test_what_the_model_does_not_take_is_dequantized_too(llama, tmp_path):
    """DeepSeek-V3 keeps a layer for its next tokens, which transformers leaves out."""
    source = shutil.copytree(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    fp8 = store_fp8(source, tmp_path / "fp8")
    adapter = make_adapter(source, tmp_path / "adapter", targets=["q_proj"])
    merged = merge(fp8, adapter, tmp_path / "ours", **STORED)
    twin = read_tensors(twin_of(fp8))
    last = [name for name in twin if f"layers.{config['num_hidden_layers'] - 1}." in name]
    assert last
    assert merged.keys() == twin.keys()
    assert different({name: merged[name] for name in last}, {name: twin[name] for name in last}) == []


def test_a_release_declares_no_form(llama, tmp_path):
    fp8 = store_fp8(llama, tmp_path / "fp8")
    planned = plan_pass(
        fp8,
        {"job": make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])},
        tmp_path / "ours",
        **STORED,
    )
    assert not planned.run().errors
    write_sidecars(planned.plans[0], planned.output("job"))
    assert "quantization_config" not in json.loads((planned.output("job") / "config.json").read_text())
    assert not [name for name in read_tensors(planned.output("job")) if "scale" in name]


def test_other_words_are_refused_with_the_right_one(llama, tmp_path):
    fp8 = store_fp8(llama, tmp_path / "fp8")
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    for word in ("none", "nf4"):
        with pytest.raises(UnsupportedError, match=r"stored in FP8.*request base_quantization: stored"):
            plan_pass(fp8, {"job": adapter}, tmp_path / word, base_quantization=word)


def test_what_is_left_to_the_base_is_its_own_weights_where_they_are_codes(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    bases = {
        "nf4": llama,
        "fp4": build_bnb_4bit(llama, tmp_path / "bnb", quant_type="fp4"),
        "stored": store_fp8(llama, tmp_path / "fp8"),
    }
    for quantization, base in bases.items():
        left, said = (
            plan_pass(base, {"job": adapter}, tmp_path / word, **STORED | {"base_quantization": word}).plans[0]
            for word in ("default", quantization)
        )
        assert left.request.base_quantization == quantization
        assert left.merge_key == said.merge_key


def test_options_of_4_bit_are_refused_where_nothing_is_converted(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    base = store_fp8(llama, tmp_path / "fp8")
    options = {"base_quantization": "default", "quantization_options": {"bnb_4bit_use_double_quant": True}}
    with pytest.raises(UnsupportedError, match="stored in FP8, and nothing is converted to 4-bit"):
        plan_pass(base, {"job": adapter}, tmp_path, **options)


def test_the_base_that_parity_full_runs_keeps_its_own_dtype(llama, tmp_path):
    """A cast to the dtype of a release is not to be hidden by the same cast of what it is held against."""
    base = LINEAR["ModelOpt fp8"](llama, tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=["q_proj"])
    planned = plan_pass(base, {"job": adapter}, tmp_path / "pass", **STORED, dtype="float16")
    (tmp_path / "numbers").mkdir()
    write_plain_base(planned.base, tmp_path / "numbers", torch.device("cpu"), lambda: None)
    assert different(read_tensors(tmp_path / "numbers"), read_tensors(twin_of(base))) == []


def test_plain_bases_are_stored_as_they_are(llama, tmp_path):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["q_proj"])
    merged = merge(llama, adapter, tmp_path / "ours", **STORED)
    assert different(merged, merge_by_peft(llama, adapter, tmp_path / "peft")) == []
