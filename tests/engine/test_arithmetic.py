"""The arithmetic check: passes what one rounding allows, and notices everything else by name."""

import ctypes
import dataclasses
import random
import shutil
import threading
import time

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import workers.merging.checks.arithmetic
import workers.numerics.tiles
from jobs.errors import CancelledError, InternalError
from jobs.parity_policy import Thresholds
from jobs.parity_report import TensorCheck
from tests.merges import CPU, merge_by_peft, open_descriptors, plan_pass, read_tensors
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.bases.quantized_cache import QuantizedCache
from workers.files.layout import DTYPES
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.judgement import failures
from workers.merging.checks.proof import Operands
from workers.numerics import products
from workers.numerics.kernels import blas, merging
from workers.parity.verdict import wrong_headers

LIMIT = Thresholds().max_rounding_excess
TARGETS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("arithmetic")


@pytest.fixture(scope="module")
def base(places):
    return build_llama(places / "llama", max_shard_size="100KB", tokenizer=False)


@pytest.fixture(scope="module")
def adapter(places, base):
    return make_adapter(base, places / "adapter", targets=TARGETS)


@pytest.fixture(scope="module")
def merged(places, base, adapter):
    """A pass that has run."""
    return run(plan_pass(base, {"job": adapter}, places / "pass"))


def run(planned):
    assert planned.run().errors == {}
    return planned


@pytest.fixture
def damaged(merged, tmp_path):
    """The same pass over a copy of its output, to be damaged."""
    shutil.copytree(merged.output("job"), tmp_path / "outputs" / "job")
    return dataclasses.replace(merged, directory=tmp_path / "outputs")


def check(planned, job="job"):
    return planned.check()[job]


def bad(planned, job="job"):
    """Return what is wrong with a merged checkpoint, by tensor; headers stand for themselves."""
    wrong = wrong_headers(planned.plans[0].output, planned.output(job))
    return wrong or dict(failures(list(planned.check()[job].values()), LIMIT))


def exact_sums(planned, name):
    """Return W, the delta and their sum in float64, from the files alone."""
    plan = planned.plans[0]
    weight = read_tensors(plan.base.source.directory)[name].double()
    if name not in plan.deltas:
        return weight, None, weight
    factors = load_file(plan.adapter.directory / ADAPTER_WEIGHTS)
    prefix = f"base_model.model.{name.removesuffix('.weight')}"
    a, b = factors[f"{prefix}.lora_A.weight"].double(), factors[f"{prefix}.lora_B.weight"].double()
    delta = 2.0 * (b @ a)
    return weight, delta, weight + delta


def test_a_right_merge_passes(merged):
    assert bad(merged) == {}
    checks = check(merged)
    assert checks.keys() == read_tensors(merged.base.source.directory).keys()
    assert {name for name, each in checks.items() if each.changed} == set(merged.plans[0].deltas)
    assert all(each.rounding_excess <= 1 for each in checks.values())
    assert all(each.max_abs_error == 0 for each in checks.values() if not each.changed)


def test_the_figures_are_those_of_float64(merged):
    tensors = read_tensors(merged.output("job"))
    for name, each in check(merged).items():
        weight, delta, exact = exact_sums(merged, name)
        assert each.weight_norm == pytest.approx(float(weight.norm()), rel=1e-4)
        assert each.max_abs_error == pytest.approx(float((tensors[name].double() - exact).abs().max()), rel=1e-3)
        assert each.num_bad_elements == 0
        if delta is None:
            assert (each.delta_norm, each.survival) == (0, None)
        else:
            survival = float(((tensors[name].double() - weight) * delta).sum() / (delta * delta).sum())
            assert each.delta_norm == pytest.approx(float(delta.norm()), rel=1e-4)
            assert each.survival == pytest.approx(survival, rel=1e-3)
            assert 0.98 < survival < 1.02


def test_a_delta_below_the_rounding_does_not_survive(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "tiny", targets=TARGETS, std=1e-6)
    checks = check(run(plan_pass(base, {"job": adapter}, tmp_path)))
    survivals = [each.survival for each in checks.values() if each.changed]
    assert len(survivals) == 4
    assert max(survivals) < 0.5


@pytest.mark.parametrize("std", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("rank", [1, 8])
def test_small_deltas_of_low_rank_pass_though_float32_rounds_first(tmp_path, rank, std):
    """Sums so near to the middle of two values that float32 takes them for the middle are among a few million."""
    shape = {"hidden_size": 1024, "intermediate_size": 4, "num_hidden_layers": 1, "vocab_size": 8, "head_dim": 256}
    base = build_llama(tmp_path / "base", tokenizer=False, **shape)
    adapter = make_adapter(base, tmp_path / "adapter", rank=rank, std=std, targets=("q_proj", "o_proj"))
    checks = check(run(plan_pass(base, {"job": adapter}, tmp_path)))
    assert sum(each.changed for each in checks.values()) == 2
    assert max(each.rounding_excess for each in checks.values()) <= 1


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    rank=st.integers(1, 70),
    alpha=st.floats(0.01, 200),
    std=st.floats(1e-6, 10),
    base_dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    quantization=st.sampled_from(["none", "nf4"]),
)
def test_every_right_merge_passes(tmp_path_factory, rank, alpha, std, base_dtype, dtype, quantization):
    directory = tmp_path_factory.mktemp("right")
    shape = {"num_hidden_layers": 1, "vocab_size": 64}
    base = build_llama(directory / "base", dtype=base_dtype, tokenizer=False, **shape)
    adapter = make_adapter(base, directory / "adapter", rank=rank, alpha=alpha, std=std)
    planned = plan_pass(base, {"job": adapter}, directory, dtype=dtype, base_quantization=quantization)
    errors = planned.run().errors
    assume("cannot hold" not in str(errors.get("job")))  # overflow in float16
    assert errors == {}
    assert bad(planned) == {}


def test_a_merge_by_peft_passes(base, adapter, merged, tmp_path):
    tensors = merge_by_peft(base, adapter, tmp_path / "peft")
    for shard in merged.plans[0].output.shards:
        path = tmp_path / "outputs" / "job" / shard.name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({spec.name: tensors[spec.name] for spec in shard.tensors}, path, metadata={"format": "pt"})
    assert bad(dataclasses.replace(merged, directory=tmp_path / "outputs")) == {}


BLAS = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)


def flip(path, offset, bit):
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def as_right_as_before(planned, name, element, values):
    """Whether float32 cannot tell which of two values of one element is the nearer."""
    _, delta, exact = exact_sums(planned, name)
    before, after = (abs(float(value) - float(exact.flatten()[element])) for value in values)
    return delta is not None and abs(after - before) < 1e-4 * abs(float(values[0]) - float(values[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_anywhere_is_noticed(merged, damaged, data):
    shard = data.draw(st.sampled_from(merged.plans[0].output.shards))
    path = damaged.output("job") / shard.name
    offset = data.draw(st.integers(0, path.stat().st_size - 1), label="offset")
    bit = data.draw(st.integers(0, 7), label="bit")
    flip(path, offset, bit)
    try:
        found = bad(damaged)
        spec = next((spec for spec in shard.tensors if spec.begin <= offset < spec.end), None)
        if spec is None:
            assert found
            return
        element = (offset - spec.begin) // spec.dtype.itemsize
        values = [read_tensors(each.output("job"))[spec.name].flatten()[element] for each in (merged, damaged)]
        if as_right_as_before(merged, spec.name, element, values):
            return
        assert list(found) == [spec.name]
        assert f"tensor {spec.name}: 1 elements are not base + delta" in found[spec.name]
    finally:
        shutil.copy(merged.output("job") / shard.name, path)


@pytest.mark.parametrize("bit", range(16))
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"])
def test_every_bit_of_an_element_counts(merged, damaged, name, bit):
    shard, spec = merged.plans[0].output.tensors[name]
    flip(damaged.output("job") / shard.name, spec.begin + 2 * 77 + bit // 8, bit % 8)
    found = check(damaged)[name]
    assert found.num_bad_elements == 1
    error = (read_tensors(damaged.output("job"))[name].double() - exact_sums(merged, name)[2]).abs().max()
    if error < 1e38:  # else infinity or NaN
        assert found.max_abs_error == pytest.approx(float(error), rel=1e-3)
    assert found.rounding_excess > LIMIT
    assert list(bad(damaged)) == [name]


@pytest.mark.parametrize("bit", [4, 7, 12, 22, 23, 30, 31])
def test_all_but_the_last_bits_of_float32_count(tmp_path, bit):
    base = build_llama(tmp_path / "base", dtype=torch.float32, num_hidden_layers=1, tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", targets=["k_proj"], std=1e-3)
    planned = run(plan_pass(base, {"job": adapter}, tmp_path))
    (name,) = planned.plans[0].deltas
    assert bad(planned) == {}
    _, spec = planned.plans[0].output.tensors[name]
    flip(planned.output("job") / "model.safetensors", spec.begin + 4 * 99 + bit // 8, bit % 8)
    assert list(bad(planned)) == [name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_values_that_compare_oddly_are_noticed(merged, damaged, name, value):
    shard, _ = merged.plans[0].output.tensors[name]
    path = damaged.output("job") / shard.name
    tensors = {spec.name: load_file(path)[spec.name] for spec in shard.tensors}
    tensors[name].view(-1)[5] = value
    data = bytearray(path.read_bytes())
    _, spec = merged.plans[0].output.tensors[name]
    data[spec.begin : spec.end] = tensors[name].view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)
    found = check(damaged)[name]
    assert list(bad(damaged)) == [name]
    assert found.num_bad_elements == 1
    # Only finite figures can stand in a JSON report.
    assert TensorCheck.model_validate_json(found.model_dump_json()) == found


def change_scaling(planned, factor):
    (plan,) = planned.plans
    deltas = {name: dataclasses.replace(delta, scaling=delta.scaling * factor) for name, delta in plan.deltas.items()}
    return dataclasses.replace(planned, plans=(dataclasses.replace(plan, deltas=deltas),))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("factor", [0.5, 1.02, 0.0, -1.0])
def test_another_scaling_in_the_merge_is_noticed(base, adapter, tmp_path, quantization, factor):
    planned = plan_pass(base, {"job": adapter}, tmp_path, base_quantization=quantization)
    run(change_scaling(planned, factor))
    found = bad(planned)
    assert set(found) == set(planned.plans[0].deltas)
    checks = check(planned)
    for name in found:
        assert checks[name].survival == pytest.approx(factor, abs=0.02)
        assert checks[name].num_bad_elements > 1000 * abs(1 - factor)


def test_a_scaling_of_one_tensor_is_noticed_by_name(base, adapter, tmp_path):
    planned = plan_pass(base, {"job": adapter}, tmp_path)
    (plan,) = planned.plans
    name = "model.layers.1.mlp.down_proj.weight"
    deltas = plan.deltas | {name: dataclasses.replace(plan.deltas[name], scaling=plan.deltas[name].scaling / 2)}
    run(dataclasses.replace(planned, plans=(dataclasses.replace(plan, deltas=deltas),)))
    assert list(bad(planned)) == [name]


def test_a_merge_into_the_other_weights_is_noticed(base, adapter, tmp_path):
    into_own = run(plan_pass(base, {"job": adapter}, tmp_path / "own"))
    into_4bit = run(plan_pass(base, {"job": adapter}, tmp_path / "nf4", base_quantization="nf4"))
    crossed = dataclasses.replace(into_4bit, directory=into_own.directory)
    assert set(bad(crossed)) == set(into_4bit.base.quantization.weights)
    crossed = dataclasses.replace(into_own, directory=into_4bit.directory)
    assert set(bad(crossed)) == set(into_4bit.base.quantization.weights)


def test_a_merge_into_another_quantization_is_noticed(base, adapter, tmp_path):
    plain = run(plan_pass(base, {"job": adapter}, tmp_path / "plain", base_quantization="nf4"))
    options = {"bnb_4bit_use_double_quant": True}
    double = plan_pass(base, {"job": adapter}, tmp_path / "d", base_quantization="nf4", quantization_options=options)
    fp4 = plan_pass(base, {"job": adapter}, tmp_path / "f", base_quantization="fp4")
    for other in (double, fp4):
        crossed = dataclasses.replace(other, directory=plain.directory)
        assert set(bad(crossed)) == set(plain.base.quantization.weights)


def test_a_merge_into_another_base_is_noticed(base, adapter, merged, tmp_path):
    other = build_llama(tmp_path / "other", seed=8, max_shard_size="100KB", tokenizer=False)
    planned = run(plan_pass(other, {"job": adapter}, tmp_path))
    crossed = dataclasses.replace(merged, directory=planned.directory)
    same = [name for name, tensor in read_tensors(base).items() if torch.equal(tensor, read_tensors(other)[name])]
    assert set(bad(crossed)) == set(read_tensors(base)) - set(same)


def test_a_merge_of_another_adapter_is_noticed(base, merged, tmp_path):
    other = make_adapter(base, tmp_path / "other", targets=TARGETS, seed=7)
    planned = run(plan_pass(base, {"job": other}, tmp_path))
    assert set(bad(dataclasses.replace(merged, directory=planned.directory))) == set(merged.plans[0].deltas)


def test_two_elements_swapped_are_noticed(merged, damaged):
    name = "model.layers.0.mlp.down_proj.weight"
    shard, spec = merged.plans[0].output.tensors[name]
    path = damaged.output("job") / shard.name
    data = bytearray(path.read_bytes())
    first, second = slice(spec.begin, spec.begin + 2), slice(spec.begin + 200, spec.begin + 202)
    data[first], data[second] = data[second], data[first]
    path.write_bytes(data)
    assert check(damaged)[name].num_bad_elements == 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_many_jobs_are_checked_as_one_at_a_time(base, adapter, tmp_path, quantization):
    adapters = {"a": adapter, "b": make_adapter(base, tmp_path / "b", seed=3)}
    planned = run(plan_pass(base, adapters, tmp_path / "both", base_quantization=quantization))
    together = planned.check(num_threads=3)
    for name, each in adapters.items():
        alone = run(plan_pass(base, {name: each}, tmp_path / "alone" / name, base_quantization=quantization))
        assert alone.check(num_threads=1)[name] == together[name]


def test_biases_and_a_base_stored_in_4_bits_pass(base, adapter, tmp_path):
    stored = build_bnb_4bit(base, tmp_path / "bnb", double_quant=True)
    assert bad(run(plan_pass(stored, {"job": adapter}, tmp_path / "stored", base_quantization="nf4"))) == {}
    tied = build_qwen2(tmp_path / "qwen2", tokenizer=False)
    adapter = make_adapter(tied, tmp_path / "for-qwen2")
    assert bad(run(plan_pass(tied, {"job": adapter}, tmp_path / "tied", base_quantization="nf4"))) == {}


@pytest.mark.parametrize("code", DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (), (0,), (5, 0), (2, 3, 2)])
def test_unchanged_tensors_of_any_kind_are_compared_by_their_bits(base, adapter, tmp_path, code, shape):
    tensors = read_tensors(base) | {"extra": torch.ones(shape).to(DTYPES[code])}
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", tmp_path / "base")
    planned = run(plan_pass(tmp_path / "base", {"job": adapter}, tmp_path))
    assert bad(planned) == {}
    _, spec = planned.plans[0].output.tensors["extra"]
    if spec.num_bytes:
        flip(planned.output("job") / "model.safetensors", spec.end - 1, 0)
        assert list(bad(planned)) == ["extra"]


def test_a_check_of_files_can_be_stopped(merged):
    def stop():
        raise CancelledError("stop")

    before = open_descriptors()
    check = ArithmeticCheck(merged.base, None, torch.device("cpu"))
    with pytest.raises(CancelledError):
        check.files(merged.plans[0], merged.output("job"), num_threads=2, stop=stop)
    assert open_descriptors() <= before


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles and pieces so small that many threads add to what is known of a tensor, in any order."""
    monkeypatch.setitem(workers.numerics.tiles.TILE_ELEMENTS, "cpu", 1 << 9)
    monkeypatch.setattr(workers.numerics.tiles, "_STRIP_ELEMENTS", 1 << 7)
    merge = products.merge

    def slow(*arguments, **options):
        time.sleep(random.random() / 1000)
        return merge(*arguments, **options)

    monkeypatch.setattr(products, "merge", slow)


def plain_checks(checks):
    """Without what only the files' check is told in these tests."""
    return {check.tensor: check.model_copy(update={"quantization_error": None}) for check in checks}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_checked_on_its_way_is_what_the_files_are_checked_for(base, adapter, tmp_path, quantization):
    """To the last bit, alone or together, by one thread or many: a report is a part of its release."""
    adapters = {"job": adapter, "other": make_adapter(base, tmp_path / "other", targets=("v_proj",), seed=3)}
    alone = plan_pass(base, {"job": adapter}, tmp_path / "alone", base_quantization=quantization)
    expected = plain_checks(alone.run(num_threads=1, checked=True).checks["job"])
    planned = plan_pass(base, adapters, tmp_path / "pass", base_quantization=quantization)
    told = []
    result = planned.run(num_threads=4, checked=True, on_bytes=told.append)
    assert plain_checks(result.checks["job"]) == expected
    in_files = planned.check(num_threads=3)
    for name in adapters:
        assert plain_checks(result.checks[name]) == plain_checks(in_files[name].values())
        assert {each.tensor for each in result.checks[name]} == set(read_tensors(planned.output(name)))
    assert sum(told) == 2 * sum(
        tensor.nbytes for name in adapters for tensor in read_tensors(planned.output(name)).values()
    )


class WrongProduct:
    """The products of merges, but not those of checks, have a mistake in them, whoever multiplies."""

    def __init__(self, monkeypatch, change, *, by_torch):
        self._merge, self._change, self.num_changed = products.merge, change, 0
        self._multiply, self._mm = BLAS(blas.sgemm_address()), torch.mm
        self._adding = threading.local()
        self._compiled = BLAS(self._multiplied)
        address = 0 if by_torch else ctypes.cast(self._compiled, ctypes.c_void_p).value
        monkeypatch.setattr(products, "merge", self)
        monkeypatch.setattr(products, "sgemm_address", lambda: address)
        monkeypatch.setattr(torch, "mm", self._multiplied_by_torch)

    def __call__(self, *arguments, weight_OI=None, **options):
        self._adding.now = weight_OI is not None
        return self._merge(*arguments, weight_OI=weight_OI, **options)

    def _multiplied(self, *pointers):
        self._multiply(*pointers)
        num_columns, num_rows = (ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int32))[0] for pointer in pointers[2:4])
        found = (ctypes.c_float * (num_rows * num_columns)).from_address(pointers[11])
        self._spoil(torch.frombuffer(found, dtype=torch.float32).view(num_rows, num_columns))

    def _multiplied_by_torch(self, left, right, *, out):
        self._mm(left, right, out=out)
        self._spoil(out)

    def _spoil(self, product):
        if self._adding.now:
            self._change(product)
            self.num_changed += 1


def one_element(product):
    product[3, 5] += 0.01


def two_that_cancel(product):
    product[3, 5] += 0.01
    product[3, 6] -= 0.01


def a_huge_element(product):
    product[3, 5] = 1e30


def rows_of_others(product):
    product.copy_(product.roll(1, dims=0))


def a_column_left_out(product):
    product[:, -1] = 0


def a_bit_too_much(product):
    product *= 1.01


@pytest.mark.parametrize(
    "change", [one_element, two_that_cancel, a_huge_element, rows_of_others, a_column_left_out, a_bit_too_much]
)
@pytest.mark.parametrize("by_torch", [False, True])
def test_the_product_of_the_merge_is_not_trusted(base, tmp_path, monkeypatch, change, by_torch):
    """What is wrong with it is found as if the check had computed its own."""
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",))
    planned = plan_pass(base, {"job": adapter}, tmp_path)
    if not (by_torch or blas.sgemm_address()):
        pytest.skip("torch comes without the BLAS that compiled loops call")
    wrong = WrongProduct(monkeypatch, change, by_torch=by_torch)
    checks = planned.run(checked=True).checks["job"]
    assert wrong.num_changed
    found = {each.tensor for each in checks if each.num_bad_elements}
    assert found == {each.tensor for each in checks if each.targeted}
    monkeypatch.undo()
    assert plain_checks(checks) == plain_checks(planned.check()["job"].values())


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("wrong", [1.001, -1.0, 0.0])
def test_the_scaling_of_the_merge_is_not_trusted(base, tmp_path, monkeypatch, wrong, dtype):
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",))
    planned = plan_pass(base, {"job": adapter}, tmp_path, dtype=dtype)
    merge = products.merge

    def merge_wrongly(b_OR, a_RI, scaling, *arguments, weight_OI=None, **options):
        scaling = scaling if weight_OI is None else wrong * scaling
        return merge(b_OR, a_RI, scaling, *arguments, weight_OI=weight_OI, **options)

    monkeypatch.setattr(products, "merge", merge_wrongly)
    checks = planned.run(checked=True).checks["job"]
    found = {each.tensor for each in checks if each.num_bad_elements}
    assert found == {each.tensor for each in checks if each.targeted}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-20, 1.0])
def test_what_is_nearly_nothing_is_right_too(base, tmp_path, dtype, size):
    """Products below the smallest float32, beside weights that are zero: nothing is off by more than a rounding."""
    adapter = make_adapter(base, tmp_path / "adapter", targets=("q_proj",))
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    tensors = {name: tensor * (size if "lora_A" in name else 1) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor[:, ::3] = 0
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    shutil.copytree(base, tmp_path / "base")
    for path in (tmp_path / "base").glob("*.safetensors"):
        save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    planned = plan_pass(tmp_path / "base", {"job": adapter}, tmp_path, dtype=str(dtype).removeprefix("torch."))
    checks = planned.run(checked=True).checks["job"]
    assert [each for each in checks if each.num_bad_elements or each.rounding_excess > 1] == []
    assert plain_checks(checks) == plain_checks(planned.check()["job"].values())


def projections_of(operands, product):
    factors_I = torch.from_numpy(operands.comparison(product, scaling=1.0).factors_I)
    weighted = product.double() * factors_I.double()
    return torch.stack([chunk.sum(1) for chunk in weighted.split(merging.CHUNK, dim=1)], dim=1).float().numpy()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 7), (64, 16, 2048), (16, 256, 14336), (64, 8, 32000)], ids=str)
@pytest.mark.parametrize("size", [1e-20, 1e-3, 1.0, 1e15])
@pytest.mark.parametrize("kind", ["normal", "positive", "outliers"])
def test_a_right_product_is_proven_and_one_that_is_off_by_little_is_not(shape, size, kind):
    """Off at one element, by 1/15,000 of the lengths of its row of B and its column of A."""
    num_rows, rank, num_columns = shape
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, num_columns, generator=generator)
    b = torch.randn(num_rows, rank, generator=generator).mul_(size)
    if kind == "positive":
        a, b = a.abs(), b.abs()
    if kind == "outliers":
        a[:, ::100] *= 1000
        b[::2] *= 1e-6
    operands = Operands(a, b, 2.0, torch.float32)
    product = torch.mm(b, a)
    assert operands.proves(slice(0, num_rows), projections_of(operands, product))
    for row, column in ((0, 0), (num_rows - 1, num_columns - 1), (num_rows // 2, num_columns // 2)):
        wrong = product.clone()
        wrong[row, column] += float(b[row].double().norm() * a[:, column].double().norm()) / 15_000
        assert not operands.proves(slice(0, num_rows), projections_of(operands, wrong))


def test_bytes_that_go_to_another_place_are_a_fault(merged):
    (plan,) = merged.plans
    name = "model.layers.0.self_attn.q_proj.weight"
    shard, spec = plan.output.tensors[name]
    check = ArithmeticCheck(merged.base, None, torch.device("cpu"))
    tally, weight = check.tally(plan, name, (shard, spec)), check.weight(merged.base.by_name[name], slice(2, 4))
    begin = spec.begin + 2 * spec.row_bytes
    with (merged.output("job") / shard.name).open("rb") as file:
        file.seek(begin)
        rows = torch.frombuffer(bytearray(file.read(2 * spec.row_bytes)), dtype=torch.uint8)
    expected = check.expect(tally, slice(2, 4), weight)
    check.judge(expected, rows, (shard.name, begin))
    for place in ((shard.name, begin + spec.row_bytes), ("another.safetensors", begin)):
        with pytest.raises(InternalError, match=r"rows 2 to 4 of model\.layers\.0\.self_attn\.q_proj\.weight go to"):
            check.judge(expected, rows, place)
    assert tally.summary().num_bad_elements == 0


def test_the_base_of_the_check_is_not_what_the_merge_left_behind(base, adapter, tmp_path):
    """The weights in 4-bit come out of the cache again; what is held of another run does not count."""
    planned = run(plan_pass(base, {"job": adapter}, tmp_path, base_quantization="nf4"))
    again = QuantizedCache(tmp_path / "fresh", CPU, 1).open(planned.base.quantization, lambda _: None)
    assert bad(dataclasses.replace(planned, quantized=again)) == {}


def test_failures_name_the_worst_first():
    checks = [
        TensorCheck(tensor="fine", changed=True, targeted=True, max_abs_error=0.1, rounding_excess=0.99),
        TensorCheck(
            tensor="bad", changed=True, targeted=True, max_abs_error=0.1, rounding_excess=3, num_bad_elements=2
        ),
        TensorCheck(
            tensor="worse", changed=True, targeted=True, max_abs_error=0.2, rounding_excess=30, num_bad_elements=9
        ),
        TensorCheck(tensor="sign", changed=False, max_abs_error=0, rounding_excess=0, num_bad_elements=1),
    ]
    assert list(failures(checks, 1.0)) == ["worse", "bad", "sign"]
    assert list(failures(checks, 10.0)) == ["worse", "sign"]
    assert "9 elements" in failures(checks, 1.0)["worse"]
    assert "30 times what one rounding allows" in failures(checks, 1.0)["worse"]
