"""The pass: bit for bit what PEFT and transformers make of the whole model, whatever happens to the jobs beside it."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from jobs.errors import BadInputError, CancelledError, NoCapacityError, NotFoundError, TransientIOError
from tests.merges import different, merge, merge_by_peft, open_descriptors, plan_pass, read_tensors
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.files.shard import ShardWriter
from workers.numerics.tiles import rows_per_tile

QV = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def llama(places):
    """Several shards, bfloat16, a separate head."""
    return build_llama(places / "llama", max_shard_size="100KB", tokenizer=False)


@pytest.fixture(scope="module")
def qwen2(places):
    """One file, biases, a tied head."""
    return build_qwen2(places / "qwen2", tokenizer=False)


@pytest.fixture(scope="module")
def large(places):
    """A base whose weights take several tiles each."""
    return build_llama(
        places / "large",
        hidden_size=128,
        intermediate_size=6144,
        num_hidden_layers=1,
        max_shard_size="1MB",
        tokenizer=False,
    )


@pytest.fixture(scope="module")
def adapters(places, llama):
    """Four adapters of different kinds for the Llama."""
    return {
        "plain": make_adapter(llama, places / "plain"),
        "qv": make_adapter(llama, places / "qv", targets=QV, rank=4, seed=2),
        "stable": make_adapter(llama, places / "stable", rank=5, alpha=7, rslora=True, seed=3),
        "patterns": make_adapter(
            llama,
            places / "patterns",
            rank_pattern={"q_proj": 3, r"layers\.1\.mlp\.up_proj": 11},
            alpha_pattern={"down_proj": 1.5},
            seed=4,
        ),
    }


def bitsandbytes(quant_type, *, double_quant=False, skip=None):
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        llm_int8_skip_modules=skip,
    )


def change_tensors(directory, change):
    """Change some tensors of an adapter or of a base with one file."""
    (path,) = directory.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("kind", ["plain", "qv", "stable", "patterns"])
def test_a_sharded_llama(llama, adapters, tmp_path, kind):
    merged = merge(llama, adapters[kind], tmp_path)
    assert different(merged, merge_by_peft(llama, adapters[kind], tmp_path / "peft")) == []


def test_a_tied_qwen2_with_biases(qwen2, tmp_path):
    adapter = make_adapter(qwen2, tmp_path / "adapter")
    assert different(merge(qwen2, adapter, tmp_path), merge_by_peft(qwen2, adapter, tmp_path / "peft")) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bases_of_other_dtypes(tmp_path, dtype):
    base = build_llama(tmp_path / "base", dtype=dtype, tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter")
    assert different(merge(base, adapter, tmp_path), merge_by_peft(base, adapter, tmp_path / "peft")) == []


def test_a_base_of_several_dtypes_keeps_them(qwen2, tmp_path):
    base = shutil.copytree(qwen2, tmp_path / "base")

    def change(tensors):
        for name in tensors:
            if "norm" in name or "k_proj" in name:
                tensors[name] = tensors[name].float()

    change_tensors(base, change)
    adapter = make_adapter(qwen2, tmp_path / "adapter")
    merged = merge(base, adapter, tmp_path)
    dtypes = {name: tensor.dtype for name, tensor in load_file(base / "model.safetensors").items()}
    assert {name: tensor.dtype for name, tensor in merged.items()} == dtypes
    # transformers lifts a mixed base to one dtype; the tensors it does not lift are the same.
    expected = merge_by_peft(qwen2, adapter, tmp_path / "peft")
    same = [name for name in merged if dtypes[name] == torch.bfloat16]
    assert different({name: merged[name] for name in same}, {name: expected[name] for name in same}) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_in_16_bits_are_lifted_first(llama, adapters, tmp_path, dtype):
    adapter = shutil.copytree(adapters["plain"], tmp_path / "adapter")
    change_tensors(adapter, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items()}))
    assert different(merge(llama, adapter, tmp_path), merge_by_peft(llama, adapter, tmp_path / "peft")) == []


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_separate_head_as_a_target(llama, tmp_path, quantization):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=["lm_head", "o_proj"])
    change_tensors(adapter, lambda tensors: tensors.pop("base_model.model.lm_head.base_layer.weight"))
    config = bitsandbytes(quantization) if quantization else None
    merged = merge(llama, adapter, tmp_path, base_quantization=quantization or "none")
    assert different(merged, merge_by_peft(llama, adapter, tmp_path / "peft", quantization=config)) == []


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_through_4_bits_and_back(request, tmp_path, architecture, quant_type, double_quant):
    base = request.getfixturevalue(architecture)
    adapter = make_adapter(base, tmp_path / "adapter", quantized=True)
    merged = merge(
        base,
        adapter,
        tmp_path,
        base_quantization=quant_type,
        quantization_options={"bnb_4bit_use_double_quant": double_quant},
    )
    config = bitsandbytes(quant_type, double_quant=double_quant)
    expected = merge_by_peft(base, adapter, tmp_path / "peft", quantization=config)
    assert different(merged, expected) == []
    assert different(merged, merge(base, adapter, tmp_path / "plain")) != []


@pytest.mark.parametrize("skip", [("lm_head",), ("q_proj", "model.layers.1", "lm_head"), ("down_proj",)])
def test_modules_that_are_not_quantized(llama, adapters, tmp_path, skip):
    merged = merge(
        llama,
        adapters["plain"],
        tmp_path,
        base_quantization="nf4",
        quantization_options={"llm_int8_skip_modules": skip},
    )
    config = bitsandbytes("nf4", skip=list(skip))
    assert different(merged, merge_by_peft(llama, adapters["plain"], tmp_path / "peft", quantization=config)) == []


@pytest.mark.parametrize(
    "shape", [{"quant_type": "nf4"}, {"quant_type": "nf4", "double_quant": True}, {"quant_type": "fp4"}]
)
def test_a_base_stored_in_4_bits(llama, adapters, tmp_path, shape):
    base = build_bnb_4bit(llama, tmp_path / "bnb", **shape)
    merged = merge(base, adapters["plain"], tmp_path, base_quantization=shape["quant_type"])
    assert different(merged, merge_by_peft(base, adapters["plain"], tmp_path / "peft", dequantize=True)) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_4_bits_in_another_dtype_are_as_transformers_loads_them(llama, adapters, tmp_path, dtype):
    merged = merge(llama, adapters["plain"], tmp_path, base_quantization="nf4", dtype=dtype)
    expected = merge_by_peft(
        llama, adapters["plain"], tmp_path / "peft", quantization=bitsandbytes("nf4"), dtype=getattr(torch, dtype)
    )
    assert different(merged, expected) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_stored_in_4_bits_in_another_dtype(llama, adapters, tmp_path, dtype):
    base = build_bnb_4bit(llama, tmp_path / "bnb")
    merged = merge(base, adapters["plain"], tmp_path, base_quantization="nf4", dtype=str(dtype).removeprefix("torch."))
    expected = merge_by_peft(base, adapters["plain"], tmp_path / "peft", dequantize=True, dtype=dtype)
    linears = [name for name in merged if "proj" in name]
    assert different({n: merged[n] for n in linears}, {n: expected[n] for n in linears}) == []
    # transformers leaves the others in the checkpoint's dtype.
    stored = load_file(base / "model.safetensors")
    others = [name for name in merged if "proj" not in name]
    assert different({n: merged[n] for n in others}, {n: stored[n].to(dtype) for n in others}) == []


def neighbours(values):
    """Return the next smaller and the next larger value of each, in float64."""
    bits = values.view({2: torch.int16, 4: torch.int32}[values.itemsize])
    away, towards = (bits + 1).view(values.dtype).double(), (bits - 1).view(values.dtype).double()
    positive = values > 0
    return torch.where(positive, towards, away), torch.where(positive, away, towards)


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_another_dtype_is_one_rounding_from_the_exact_sum(tmp_path, base_dtype, dtype):
    base = build_llama(tmp_path / "base", dtype=base_dtype, tokenizer=False)
    adapter = make_adapter(base, tmp_path / "adapter", rank=8, alpha=12)
    merged = merge(base, adapter, tmp_path, dtype=str(dtype).removeprefix("torch."))
    weights = load_file(base / "model.safetensors")
    factors = load_file(adapter / ADAPTER_WEIGHTS)
    num_elements = num_not_nearest = 0
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" not in factors:
            assert torch.equal(tensor, weights[name].to(dtype))
            continue
        a, b = factors[f"{prefix}.lora_A.weight"].double(), factors[f"{prefix}.lora_B.weight"].double()
        exact = weights[name].double() + 1.5 * (b @ a)
        smaller, larger = neighbours(tensor)
        nearest = torch.minimum((smaller - exact).abs(), (larger - exact).abs())
        error = (tensor.double() - exact).abs()
        # Where another value is nearer, it is so by less than float32 can tell.
        float32_error = 2.0**-23 * (exact.abs() + 16 * 1.5 * (b.abs() @ a.abs()))
        assert bool((error <= nearest + float32_error).all())
        num_elements += error.numel()
        num_not_nearest += int((error > nearest).sum())
    assert num_elements > 50_000
    if dtype != torch.float32:
        assert num_not_nearest <= 1e-3 * num_elements


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_weights_of_several_tiles(large, tmp_path, quantization):
    adapter = make_adapter(large, tmp_path / "adapter", rank=16)
    merged = merge(large, adapter, tmp_path, base_quantization=quantization or "none")
    config = bitsandbytes(quantization) if quantization else None
    assert different(merged, merge_by_peft(large, adapter, tmp_path / "peft", quantization=config)) == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden_size=st.sampled_from([12, 40, 60, 64, 72, 96, 100]),
    intermediate_size=st.sampled_from([7, 48, 64, 96, 100, 129, 160]),
    rank=st.integers(1, 20),
    alpha=st.one_of(st.integers(-8, 64), st.floats(0.01, 40)),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    quantization=st.sampled_from([None, "nf4", "fp4"]),
)
@example(  # the order of a product of seven rows depends on the number of threads
    hidden_size=40, intermediate_size=7, rank=5, alpha=1, rslora=False, dtype=torch.float32, quantization=None
)
def test_any_shape_rank_and_scaling(
    tmp_path_factory, hidden_size, intermediate_size, rank, alpha, rslora, dtype, quantization
):
    directory = tmp_path_factory.mktemp("any")
    base = build_llama(
        directory / "base",
        dtype=dtype,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        tokenizer=False,
    )
    adapter = make_adapter(base, directory / "adapter", rank=rank, alpha=alpha, rslora=rslora)
    merged = merge(base, adapter, directory, base_quantization=quantization or "none")
    config = bitsandbytes(quantization) if quantization else None
    assert different(merged, merge_by_peft(base, adapter, directory / "peft", quantization=config)) == []


@pytest.mark.parametrize("limit", ["60KB", "150KB"])
def test_smaller_shards_hold_the_same_tensors(llama, adapters, tmp_path, limit):
    planned = plan_pass(llama, {"job": adapters["plain"]}, tmp_path, max_shard_size=limit)
    artifacts = [file.artifact for file in planned.run().files["job"]]
    output = planned.output("job")
    expected = merge_by_peft(llama, adapters["plain"], tmp_path / "peft", max_shard_size=limit)
    assert different(read_tensors(output), expected) == []
    assert [artifact.path for artifact in artifacts] == sorted(path.name for path in output.iterdir())
    for path in output.iterdir():
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= planned.plans[0].request.max_shard_size


def digests(planned, **how):
    result = planned.run(**how)
    assert result.errors == {}
    return {name: [file.artifact.sha256 for file in files] for name, files in result.files.items()}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_many_in_one_pass_are_as_one_at_a_time(llama, adapters, tmp_path, quantization):
    together = digests(plan_pass(llama, adapters, tmp_path / "all", base_quantization=quantization))
    config = bitsandbytes(quantization) if quantization != "none" else None
    for name, adapter in adapters.items():
        alone = digests(plan_pass(llama, {name: adapter}, tmp_path / name, base_quantization=quantization))
        assert together[name] == alone[name]
        expected = merge_by_peft(llama, adapter, tmp_path / "peft" / name, quantization=config)
        assert different(read_tensors(tmp_path / "all" / "outputs" / name), expected) == []


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_threads_and_repetition_change_no_byte(large, tmp_path, quantization):
    adapters = {
        "one": make_adapter(large, tmp_path / "one", rank=16),
        "two": make_adapter(large, tmp_path / "two", rank=7, targets=QV, seed=5),
    }
    runs = [
        digests(plan_pass(large, adapters, tmp_path / str(n), base_quantization=quantization), num_threads=num_threads)
        for n, num_threads in enumerate([1, 4, 4])
    ]
    assert runs[0] == runs[1] == runs[2]


def bytes_read_by_this_process():
    """Return the bytes of all read and copy calls so far, as the kernel counts them."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def test_the_base_is_read_once_for_all(large, tmp_path, monkeypatch):
    read_back, of_shard = [], ShardWriter._read_back

    def reading_back(shard, target, offset):
        read_back.append(target.numel())
        of_shard(shard, target, offset)

    monkeypatch.setattr(ShardWriter, "_read_back", reading_back)
    adapters = {str(n): make_adapter(large, tmp_path / f"a{n}", seed=n) for n in range(4)}
    # A process's first pass also reads the compiled kernels and what loads them.
    assert plan_pass(large, adapters, tmp_path / "first").run().errors == {}
    planned = plan_pass(large, adapters, tmp_path / "pass")
    read_back.clear()
    before = bytes_read_by_this_process()
    result = planned.run()
    # Some of what is written too early to be hashed is read back for that.
    really_read = bytes_read_by_this_process() - before - sum(read_back)
    num_base_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    num_adapter_bytes = sum((adapter / ADAPTER_WEIGHTS).stat().st_size for adapter in adapters.values())
    assert result.bytes.of_base <= num_base_bytes
    assert result.bytes.of_adapters <= num_adapter_bytes
    assert num_base_bytes < really_read < 1.1 * num_base_bytes + num_adapter_bytes


def test_every_byte_written_is_told(llama, adapters, tmp_path):
    planned = plan_pass(llama, adapters, tmp_path)
    told, lock = [], threading.Lock()

    def on_bytes(count):
        with lock:
            told.append(count)

    result = planned.run(on_bytes=on_bytes)
    expected = sum(t.nbytes for name in adapters for t in read_tensors(planned.output(name)).values())
    assert sum(told) == result.bytes.written == expected


def test_files_are_told_as_they_close_with_their_digests(llama, adapters, tmp_path):
    planned = plan_pass(llama, adapters, tmp_path)
    told, lock = [], threading.Lock()

    def on_file(job, file):
        with lock:
            told.append((job, file.artifact))

    result = planned.run(on_file=on_file)
    for job, files in result.files.items():
        assert sorted((each for name, each in told if name == job), key=lambda each: each.path) == [
            file.artifact for file in files
        ]


def assert_others_are_right(llama, adapters, planned, result, tmp_path, failed):
    assert set(result.errors) == {failed}
    assert set(result.files) == set(adapters) - {failed}
    for name in result.files:
        expected = merge_by_peft(llama, adapters[name], tmp_path / "peft" / name)
        assert different(read_tensors(planned.output(name)), expected) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_a_number_that_is_none_fails_its_job_alone(llama, adapters, tmp_path, half, value):
    damaged = shutil.copytree(adapters["plain"], tmp_path / "damaged")
    name = f"base_model.model.model.layers.1.self_attn.o_proj.{half}.weight"

    def change(tensors):
        tensors[name][1, 2] = value

    change_tensors(damaged, change)
    jobs = adapters | {"damaged": damaged}
    planned = plan_pass(llama, jobs, tmp_path / "pass")
    result = planned.run()
    assert_others_are_right(llama, jobs, planned, result, tmp_path, "damaged")
    error = result.errors["damaged"]
    assert isinstance(error, BadInputError)
    assert f"tensor {name}: expected finite numbers" in str(error)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_cancelled_job_stops_alone(llama, adapters, tmp_path, num_threads):
    planned = plan_pass(llama, adapters, tmp_path / "pass")
    calls = itertools.count()

    def check(job):
        if job == "stable" and next(calls) >= 7:
            raise CancelledError("job stable was cancelled")

    result = planned.run(check=check, num_threads=num_threads)
    assert_others_are_right(llama, adapters, planned, result, tmp_path, "stable")
    assert isinstance(result.errors["stable"], CancelledError)


def test_a_disk_that_fills_up_fails_its_job_alone(llama, adapters, tmp_path, monkeypatch):
    planned = plan_pass(llama, adapters, tmp_path / "pass")
    full, pwrite, calls = str(planned.output("qv")), os.pwrite, itertools.count()

    def write(descriptor, data, offset):
        if str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(full) and next(calls) >= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    result = planned.run()
    assert_others_are_right(llama, adapters, planned, result, tmp_path, "qv")
    assert isinstance(result.errors["qv"], NoCapacityError)
    assert full in str(result.errors["qv"])


def test_a_limit_of_the_system_fails_its_job_alone(llama, adapters, tmp_path):
    """Jobs of one pass may want shards of different sizes; the large one is more than this process may write."""
    small = plan_pass(llama, {"small": adapters["plain"]}, tmp_path, max_shard_size="60KB")
    large = plan_pass(llama, {"large": adapters["qv"]}, tmp_path, max_shard_size="1GB")
    planned = type(small)(small.base, None, None, (*small.plans, *large.plans), tmp_path / "outputs")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        result = planned.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jobs = {"small": adapters["plain"], "large": adapters["qv"]}
    assert_others_are_right(llama, jobs, planned, result, tmp_path, "large")
    assert "File too large" in str(result.errors["large"])


def test_a_place_that_goes_away_fails_its_job_alone(llama, adapters, tmp_path):
    planned = plan_pass(llama, adapters, tmp_path / "pass")

    def check(job):
        if job == "qv":
            shutil.rmtree(planned.output("qv"), ignore_errors=True)

    result = planned.run(check=check)
    assert_others_are_right(llama, adapters, planned, result, tmp_path, "qv")
    assert isinstance(result.errors["qv"], NotFoundError)


def test_an_adapter_that_goes_away_fails_its_job_alone(llama, adapters, tmp_path):
    gone = shutil.copytree(adapters["plain"], tmp_path / "gone")
    jobs = adapters | {"gone": gone}
    planned = plan_pass(llama, jobs, tmp_path / "pass")
    (gone / ADAPTER_WEIGHTS).unlink()
    result = planned.run()
    assert_others_are_right(llama, jobs, planned, result, tmp_path, "gone")
    assert isinstance(result.errors["gone"], NotFoundError)


def test_an_error_of_the_listener_fails_its_job_alone(llama, adapters, tmp_path):
    planned = plan_pass(llama, adapters, tmp_path / "pass")

    def on_file(job, file):
        if job == "patterns":
            raise TransientIOError(f"{file.artifact.path} cannot be shipped")

    result = planned.run(on_file=on_file)
    assert_others_are_right(llama, adapters, planned, result, tmp_path, "patterns")
    assert "cannot be shipped" in str(result.errors["patterns"])


def test_a_pass_without_jobs_left_stops_early(large, tmp_path):
    adapter = make_adapter(large, tmp_path / "adapter")

    def check(job):
        raise CancelledError(job)

    result = plan_pass(large, {"one": adapter, "two": adapter}, tmp_path).run(check=check, num_threads=2)
    assert set(result.errors) == {"one", "two"}
    assert result.bytes.written == 0
    assert result.bytes.of_base < 0.5 * sum(path.stat().st_size for path in large.glob("*.safetensors"))


def single_file(base, directory):
    """Copy a base into one file, so that its tensors can be changed."""
    save_file(read_tensors(base), directory / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", directory)
    return directory


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_overflow_of_a_sum_is_named(llama, tmp_path, quantization):
    adapter = make_adapter(llama, tmp_path / "adapter", targets=QV, alpha=1e8)
    planned = plan_pass(llama, {"job": adapter}, tmp_path, dtype="float16", base_quantization=quantization)
    error = planned.run().errors["job"]
    assert isinstance(error, BadInputError)
    assert "_proj.weight: merging gives" in str(error)
    assert "which torch.float16 cannot hold" in str(error)


def test_overflow_of_a_sum_that_took_the_place_of_its_weight_is_named(llama, tmp_path):
    (tmp_path / "base").mkdir()
    base = single_file(llama, tmp_path / "base")
    in_float16 = {name: tensor.half() for name, tensor in read_tensors(base).items()}
    save_file(in_float16, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(llama, tmp_path / "adapter", targets=QV, alpha=1e8)
    error = plan_pass(base, {"job": adapter}, tmp_path).run(num_threads=1).errors["job"]
    assert isinstance(error, BadInputError)
    name, value = re.search("tensor (.*): merging gives (.*), which torch.float16 cannot hold", str(error)).groups()
    factors = load_file(adapter / ADAPTER_WEIGHTS)
    left, right = (factors[f"base_model.model.{name.replace('weight', each)}.weight"] for each in ("lora_B", "lora_A"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    sums = in_float16[name].float() + left @ right * (config["lora_alpha"] / config["r"])
    assert float(value) == pytest.approx(float(sums.abs().max()))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_overflow_of_a_cast_is_named(llama, adapters, tmp_path, name, value):
    (tmp_path / "base").mkdir()
    base = single_file(llama, tmp_path / "base")
    change_tensors(base, lambda tensors: tensors[name].view(-1)[:1].fill_(value))
    planned = plan_pass(base, {"a": adapters["qv"], "b": adapters["qv"]}, tmp_path, dtype="float16")
    errors = planned.run().errors
    assert set(errors) == {"a", "b"}
    for error in errors.values():
        assert isinstance(error, BadInputError)
        assert f"tensor {name}: merging gives" in str(error)


def test_a_base_with_a_number_that_is_none_is_named(llama, adapters, tmp_path):
    (tmp_path / "base").mkdir()
    base = single_file(llama, tmp_path / "base")
    name = "model.layers.1.self_attn.v_proj.weight"
    change_tensors(base, lambda tensors: tensors[name].view(-1)[7:8].fill_(float("nan")))
    error = plan_pass(base, {"job": adapters["qv"]}, tmp_path).run().errors["job"]
    assert f"tensor {name}: merging gives nan" in str(error)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("damage", ["truncate", "unlink"])
def test_a_base_that_changes_meanwhile_fails_the_pass_and_leaves_nothing_open(
    llama, adapters, tmp_path, damage, num_threads
):
    base = shutil.copytree(llama, tmp_path / "base")
    planned = plan_pass(base, {"job": adapters["plain"]}, tmp_path)
    shard, spec = planned.base.layout.tensors["model.layers.1.mlp.up_proj.weight"]
    if damage == "truncate":
        os.truncate(base / shard.name, spec.end - 1)
    else:
        (base / shard.name).unlink()
    before = open_descriptors()
    with pytest.raises(BadInputError if damage == "truncate" else NotFoundError, match=f"base/{shard.name}"):
        planned.run(num_threads=num_threads)
    assert open_descriptors() <= before


def test_a_base_cut_short_where_it_is_only_copied_fails_the_pass(llama, adapters, tmp_path):
    base = shutil.copytree(llama, tmp_path / "base")
    planned = plan_pass(base, adapters, tmp_path)
    shard, spec = planned.base.layout.tensors["model.embed_tokens.weight"]
    alone = plan_pass(base, {"alone": adapters["qv"]}, tmp_path / "alone")
    os.truncate(base / shard.name, spec.end - 1)
    for each in (planned, alone):
        with pytest.raises(BadInputError, match=rf"{re.escape(shard.name)}: .* truncated meanwhile"):
            each.run(num_threads=1)


@pytest.mark.parametrize("names", [["qv"], ["qv", "plain"]])
@pytest.mark.parametrize(
    "extra",
    [
        torch.arange(12).view(3, 4),
        torch.tensor([True, False, True]),
        torch.tensor([1, 2, 255], dtype=torch.uint8),
        torch.tensor([1.0, -2.0, 0.5]).to(torch.float8_e4m3fn),
        torch.tensor([-torch.inf, 1.0, torch.nan], dtype=torch.bfloat16),
        torch.randn(2, 3000, 500).to(torch.float16),  # rows of more than a tile is copied at once
    ],
    ids=["int64", "bool", "uint8", "float8", "not finite", "wide rows"],
)
def test_what_nobody_changes_is_copied_whatever_it_is(llama, adapters, tmp_path, extra, names):
    (tmp_path / "base").mkdir()
    base = single_file(llama, tmp_path / "base")
    change_tensors(base, lambda tensors: tensors.update({"extra": extra}))
    planned = plan_pass(base, {name: adapters[name] for name in names}, tmp_path / "pass")
    result = planned.run(checked=True)
    assert result.errors == {}
    for name in names:
        copied = read_tensors(planned.output(name))["extra"]
        assert copied.dtype == extra.dtype
        assert copied.view(torch.uint8).tolist() == extra.view(torch.uint8).tolist()
        (check,) = [each for each in result.checks[name] if each.tensor == "extra"]
        assert (check.num_bad_elements, check.rounding_excess) == (0, 0)


def test_a_stored_4_bit_weight_of_another_shape_is_refused(llama, adapters, tmp_path):
    base = build_bnb_4bit(llama, tmp_path / "bnb")
    name = "model.layers.0.self_attn.k_proj.weight"

    def transpose(tensors):
        key = f"{name}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key].tolist())) | {"shape": [64, 32]}
        tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    change_tensors(base, transpose)
    planned = plan_pass(base, {"job": adapters["qv"]}, tmp_path, base_quantization="nf4")
    with pytest.raises(BadInputError, match=rf"tensor {name} is stored as \[64, 32\]"):
        planned.run()


def test_no_descriptor_is_left_and_few_are_open_meanwhile(llama, adapters, tmp_path):
    planned = plan_pass(llama, adapters, tmp_path, max_shard_size="10KB")
    before, open_meanwhile = open_descriptors(), []
    planned.run(on_file=lambda *_: open_meanwhile.append(len(open_descriptors())), num_threads=1)
    assert open_descriptors() <= before
    num_files = sum(1 for job in adapters for _ in planned.output(job).iterdir())
    assert num_files > 60
    # Hashing may lag behind on a busy machine; what it has finished is closed all the same, long before the end.
    assert max(open_meanwhile) - len(before) < num_files
    assert min(open_meanwhile[len(open_meanwhile) // 2 :]) - len(before) < num_files // 2


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), ()])
@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", ["a.first", "z.last"])
def test_tensors_without_elements_or_dimensions_are_carried_along(llama, adapters, tmp_path, name, dtype, shape):
    (tmp_path / "base").mkdir()
    base = single_file(llama, tmp_path / "base")
    extra = torch.ones(shape, dtype=torch.bfloat16)
    change_tensors(base, lambda tensors: tensors.update({name: extra}))
    how = {"dtype": dtype} if dtype else {}
    merged = merge(base, adapters["plain"], tmp_path, **how)
    target = getattr(torch, dtype) if dtype else torch.bfloat16
    assert different({name: merged.pop(name)}, {name: extra.to(target)}) == []
    assert different(merged, merge(llama, adapters["plain"], tmp_path / "without", **how)) == []


@given(
    num_rows=st.integers(1, 10_000),
    num_columns=st.integers(1, 5_000),
    blocks=st.sampled_from([1, 2, 4, 16, 64]),
    tile_elements=st.sampled_from([1 << 12, 1 << 18]),
)
def test_tiles_are_aligned_even_and_no_larger_than_they_must_be(num_rows, num_columns, blocks, tile_elements):
    step = rows_per_tile(num_rows, num_columns, blocks, tile_elements)
    assert step % blocks == 0
    assert step * num_columns <= max(tile_elements, blocks * num_columns)
    last = num_rows - (num_rows - 1) // step * step
    # All but the last tile are `step` rows; the last one lacks less than one block of rows for each tile.
    assert step - last < blocks * -(-num_rows // step) + -(-num_rows // step)
