"""What PEFT merged is held against the unmerged adapter: a wrong merge and a wrong bit are found, and named."""

import dataclasses
import math
import re

import pytest
import torch
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.loha.layer import LoHaLayer
from peft.tuners.lora.layer import Embedding
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.lycoris_utils import LycorisLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jobs.errors import CancelledError
from tests.merges import plan_pass, read_tensors
from tests.methods import make_method_adapter
from tests.models import build_llama, build_qwen2, make_adapter
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.judgement import failures
from workers.merging.checks.module_checks import check_modules

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


def bad(planned):
    """Return the tensors that fail, by name, with what is said of them."""
    return failures(list(planned.check()["job"].values()), max_rounding_excess=1.0)


@pytest.fixture
def merged(llama, tmp_path):
    planned = plan_pass(llama, {"job": make_method_adapter(llama, tmp_path / "adapter", "LOHA")}, tmp_path)
    assert not planned.run().errors
    assert bad(planned) == {}
    return planned


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.1, 2.0])
def test_another_scaling_in_the_merge_is_found(llama, tmp_path, monkeypatch, factor):
    """Both merges are wrong in the same way, as a fault in PEFT would have it; the unmerged layer is not."""
    adapter = make_method_adapter(llama, tmp_path / "adapter", "LOHA", std=0.2)
    get_delta_weight, merge = LoHaLayer.get_delta_weight, LycorisLayer.merge
    factors = [1.0]

    def merge_wrongly(*arguments, **options):
        factors.append(factor)
        try:
            return merge(*arguments, **options)
        finally:
            factors.pop()

    monkeypatch.setattr(
        LoHaLayer,
        "get_delta_weight",
        lambda *arguments, **options: get_delta_weight(*arguments, **options) * factors[-1],
    )
    monkeypatch.setattr(LycorisLayer, "merge", merge_wrongly)
    planned = plan_pass(llama, {"job": adapter}, tmp_path)
    assert not planned.run().errors
    found = bad(planned)
    assert set(found) == set(planned.plans[0].by_peft)
    assert re.search(rf"tensor {NAME}: .*does not answer as base \+ adapter does: off by \d\S* times", found[NAME])


@pytest.mark.parametrize("factor", [1.0, 1.0001])
def test_an_embedding_in_float32_may_err_as_its_product_does(tmp_path, monkeypatch, factor):
    """Terms of a delta cancel out at some elements, and what float32 loses of each of them stays."""
    base = build_llama(tmp_path / "base", dtype=torch.float32, num_hidden_layers=1, tokenizer=False)
    adapter = make_method_adapter(base, tmp_path / "adapter", "LORA", std=0.5, r=64, target_modules=["embed_tokens"])
    get_delta_weight = Embedding.get_delta_weight
    monkeypatch.setattr(Embedding, "get_delta_weight", lambda *given: get_delta_weight(*given) * factor)
    planned = plan_pass(base, {"job": adapter}, tmp_path)
    assert not planned.run().errors
    assert set(bad(planned)) == ({"model.embed_tokens.weight"} if factor != 1 else set())


def test_a_merge_that_forgets_is_found(llama, tmp_path, monkeypatch):
    adapter = make_method_adapter(llama, tmp_path / "adapter", "IA3", std=0.2)
    monkeypatch.setattr(IA3Linear, "merge", lambda *_, **__: None)
    planned = plan_pass(llama, {"job": adapter}, tmp_path)
    assert not planned.run().errors
    assert set(bad(planned)) == set(planned.plans[0].by_peft)


def test_a_magnitude_that_is_left_out_is_found(llama, tmp_path, monkeypatch):
    adapter = make_adapter(llama, tmp_path / "adapter", use_dora=True, trained=True)

    def merge_unsafe(module, active_adapter, _):
        module.get_base_layer().weight.data += module.get_delta_weight(active_adapter)

    monkeypatch.setattr(DoraLinearVariant, "merge_unsafe", staticmethod(merge_unsafe))
    planned = plan_pass(llama, {"job": adapter}, tmp_path)
    assert not planned.run().errors
    assert set(bad(planned)) == set(planned.plans[0].by_peft)


@pytest.mark.parametrize("bit", [0, 6, 9, 15])
def test_a_single_wrong_bit_is_found(merged, bit):
    path = merged.output("job") / "model.safetensors"
    tensors = load_file(path)
    tensors[NAME].view(torch.int16)[17, 33] ^= 1 << bit if bit < 15 else -(1 << 15)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    rewrite(path, tensors, metadata)
    found = bad(merged)
    assert list(found) == [NAME]
    assert "1 elements are not base + delta" in found[NAME]


def rewrite(path, tensors, metadata):
    """Write tensors in the place and order in which the file has them."""
    before = path.read_bytes()
    header = before[: 8 + int.from_bytes(before[:8], "little")]
    save_file(tensors, path, metadata=metadata)
    after = path.read_bytes()
    assert len(after) == len(before)
    assert after[: len(header)] == header


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_found(merged, value):
    path = merged.output("job") / "model.safetensors"
    tensors = load_file(path)
    tensors[NAME][3, 5] = value
    rewrite(path, tensors, {"format": "pt"})
    assert list(bad(merged)) == [NAME]


def test_a_merge_into_the_other_weights_is_found(llama, merged, tmp_path):
    planned = plan_pass(llama, {"job": merged.plans[0].adapter.directory}, tmp_path / "nf4", base_quantization="nf4")
    assert set(bad(dataclasses.replace(planned, directory=merged.directory))) >= set(planned.plans[0].by_peft)


def test_the_figures_are_those_of_float64(tmp_path):
    base = build_qwen2(tmp_path / "base", tokenizer=False)
    adapter = make_method_adapter(base, tmp_path / "adapter", "LOHA", std=0.2)
    planned = plan_pass(base, {"job": adapter}, tmp_path)
    assert not planned.run().errors
    shipped, before = read_tensors(planned.output("job")), read_tensors(base)
    checks = planned.check()["job"]
    stored = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in planned.plans[0].by_peft if name.endswith(".weight")]:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        parts = [stored[f"{prefix}.hada_{part}"].double() for part in ("w1_a", "w1_b", "w2_a", "w2_b")]
        delta = (parts[0] @ parts[1]) * (parts[2] @ parts[3]) * (8 / 4)
        kept = shipped[name].double() - before[name].double()
        check = checks[name]
        assert check.weight_norm == pytest.approx(float(before[name].double().norm()), rel=1e-5)
        assert check.delta_norm == pytest.approx(float(kept.norm()), rel=1e-5)
        assert check.survival == pytest.approx(float((kept * delta).sum() / delta.square().sum()), abs=0.02)
        assert check.rounding_excess == pytest.approx(0.25, abs=0.15)


def test_progress_and_cancellation(merged):
    (plan,) = merged.plans
    told = []
    how = {"evidence": Evidence(plan), "on_bytes": told.append}
    check_modules(plan, merged.output("job"), merged.weights, stop=lambda: None, **how)
    assert sum(told) == sum(plan.output.tensors[name][1].num_bytes for name in plan.by_peft)

    def stop():
        if len(told) > 3:
            raise CancelledError("stop")

    told.clear()
    with pytest.raises(CancelledError):
        check_modules(plan, merged.output("job"), merged.weights, stop=stop, **how)
