"""4-bit weights: tile by tile the same bits as bitsandbytes over the whole tensor and as transformers on disk."""

import itertools
import json

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import workers.numerics.kernels.four_bit
from jobs.errors import BadInputError
from tests.merges import dequantize_without_kernel
from tests.models import build_bnb_4bit, build_llama
from workers.bases.four_bit import (
    QuantizedWeight,
    _tables,
    quantize_rows,
    quantized_names,
    quantized_owner,
    restore,
    row_alignment,
    stored_tensors,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAME = "model.layers.1.mlp.down_proj.weight"

# Hidden sizes that are no multiple of a block, odd ones, single rows and columns.
shapes = st.tuples(st.integers(1, 24), st.sampled_from([1, 2, 3, 7, 16, 31, 48, 63, 64, 65, 96, 100, 128, 130]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", intermediate_size=100, tokenizer=False)


@pytest.fixture(scope="module", params=[("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)], ids=str)
def saved(request, base, tmp_path_factory):
    """Type, double quantization and tensors of a 4-bit checkpoint that transformers saved."""
    quant_type, double_quant = request.param
    directory = tmp_path_factory.mktemp("saved") / "bnb"
    build_bnb_4bit(base, directory, quant_type=quant_type, double_quant=double_quant)
    return quant_type, double_quant, load_file(directory / "model.safetensors")


def random_weight(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).mul_(0.1).to(dtype)


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def aligned_cuts(num_rows, alignment, seed):
    cuts = list(range(0, num_rows, alignment))
    generator = torch.Generator().manual_seed(seed)
    kept = [cut for cut in cuts[1:] if torch.rand(1, generator=generator) < 0.5]
    return [0, *kept, num_rows]


def parts_of(codes, absmax, *, quant_type, shape, dtype, double_quant=False):
    return stored_tensors(codes, absmax, quant_type=quant_type, double_quant=double_quant, shape=shape, dtype=dtype)


def extreme_weight(dtype, quant_type, scales, seed):
    """Blocks of values at the middles between two codes and beside them, of zeros of both signs, at many scales."""
    generator = torch.Generator().manual_seed(seed)
    code = bnb.get_4bit_type(quant_type, device="cpu").sort().values
    points = torch.cat([code, (code[1:] + code[:-1]) / 2, torch.tensor([0.0, -0.0, 1.0, -1.0])])
    points = torch.cat([points, points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0))])
    blocks = points[torch.randint(points.numel(), (len(scales), 64), generator=generator)]
    return (blocks.double() * torch.tensor(scales, dtype=torch.float64).unsqueeze(1)).to(dtype)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    scales=st.lists(
        st.sampled_from([0.0, 1e-45, 1e-38, 2e-38, 6e-8, 1e-3, 1.0, 3.0, 6e4, 3e38]), min_size=1, max_size=9
    ),
    seed=st.integers(0, 2**32),
)
def test_extremes_are_quantized_as_by_bitsandbytes(dtype, quant_type, scales, seed):
    weight = extreme_weight(dtype, quant_type, scales, seed)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    codes, absmax = quantize_rows(weight, quant_type)
    assert torch.equal(codes, expected)
    assert same_bits(absmax, state.absmax)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_is_no_number_is_quantized_as_by_bitsandbytes(quant_type, value):
    weight = random_weight((4, 64), torch.float32, 1)
    weight[2, 5] = value
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type)
    codes, absmax = quantize_rows(weight, quant_type)
    assert torch.equal(codes, expected)
    assert torch.equal(absmax.nan_to_num(7.0), state.absmax.nan_to_num(7.0))


def test_large_weights_are_quantized_as_by_bitsandbytes():
    """More than is quantized at once, and not a multiple of it."""
    weight = random_weight((1031, 576), torch.bfloat16, 2)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes, absmax = quantize_rows(weight, "nf4")
    assert torch.equal(codes, expected)
    assert same_bits(absmax, state.absmax)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), quant_type=st.sampled_from(["nf4", "fp4"]), seed=st.integers(0, 99))
def test_tiles_are_quantized_as_the_whole(shape, dtype, quant_type, seed):
    weight = random_weight(shape, dtype, seed)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=False)
    cuts = aligned_cuts(shape[0], row_alignment(shape[1]), seed)
    tiles = [quantize_rows(weight[a:b], quant_type) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([codes for codes, _ in tiles]), expected)
    assert same_bits(torch.cat([absmax for _, absmax in tiles]), state.absmax)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_aligned_slice_is_that_of_the_whole(shape, dtype, quant_type, double_quant, seed):
    weight = random_weight(shape, dtype, seed)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    stored = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    restored = restore("weight", stored)
    assert (restored.shape, restored.dtype, restored.quant_type) == (shape, dtype, quant_type)
    expected = restored.dequantize_rows(0, shape[0])
    # Equal, zeros of either sign: those of fp4 depend on the processor.
    assert torch.equal(expected, dequantize_without_kernel(codes, state))
    if shape[1] % 64 == 0:  # else the AVX-512 kernel of bitsandbytes 0.50.2 takes the scales of other blocks
        assert same_bits(expected, bnb.dequantize_4bit(codes, state))
    bounds = [*range(0, shape[0], restored.row_alignment), shape[0]]
    for start in bounds[:-1]:
        for stop in (bound for bound in bounds if bound > start):
            assert same_bits(restored.dequantize_rows(start, stop), expected[start:stop])


@pytest.mark.parametrize("looks_up", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 4096])
@pytest.mark.parametrize("num_more", [0, 2, 31])
def test_codes_come_back_as_by_bitsandbytes(monkeypatch, looks_up, dtype, quant_type, blocksize, num_more):
    """At scales of every kind, and with a last block that is cut short."""
    monkeypatch.setattr(
        workers.numerics.kernels.four_bit, "_LOOKS_UP", looks_up and workers.numerics.kernels.four_bit._LOOKS_UP
    )
    scales = [0.0, 1e-45, 1e-38, 6e-8, 1e-3, 1.0, 6e4, 3e38, float("inf"), -float("inf"), float("nan"), -2.5]
    absmax = torch.tensor([*scales, *([1.7] if num_more else [])])
    num_elements = blocksize * len(scales) + num_more
    generator = torch.Generator().manual_seed(blocksize)
    codes = torch.randint(256, ((num_elements + 1) // 2, 1), generator=generator).to(torch.uint8)
    weight = QuantizedWeight(
        codes=codes, absmax=absmax, blocksize=blocksize, quant_type=quant_type, shape=(1, num_elements), dtype=dtype
    )
    values = torch.tensor(_tables(quant_type).pairs[1:32:2].copy())
    every = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[:num_elements].long()
    expected = (values[every] * absmax.repeat_interleave(blocksize)[:num_elements]).to(dtype)
    found = weight.dequantize_rows(0, 1).view(-1)
    numbers = ~expected.isnan()
    assert torch.equal(found.isnan(), ~numbers)
    assert same_bits(found[numbers], expected[numbers])


@pytest.mark.parametrize("num_columns", [1, 2, 3, 63, 64, 65, 96, 100, 128, 192, 4096])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_alignment_is_the_smallest_number_of_rows_of_whole_blocks(num_columns, blocksize):
    whole = [rows for rows in range(1, blocksize + 1) if rows * num_columns % blocksize == 0]
    assert row_alignment(num_columns, blocksize) == whole[0]


def test_stored_tensors_are_those_that_transformers_saves(base, saved):
    quant_type, double_quant, tensors = saved
    weights = load_file(base / "model.safetensors")
    names = quantized_names(tensors)
    assert len(names) == 14
    assert set(names.values()) == {quant_type}
    for name in names:
        weight = weights[name]
        parts = parts_of(
            *quantize_rows(weight, quant_type),
            quant_type=quant_type,
            double_quant=double_quant,
            shape=tuple(weight.shape),
            dtype=weight.dtype,
        )
        expected = {stored.removeprefix(name): tensor for stored, tensor in tensors.items() if stored.startswith(name)}
        assert parts.keys() == expected.keys()
        for suffix, tensor in parts.items():
            assert tensor.shape == expected[suffix].shape, suffix
            assert same_bits(tensor, expected[suffix]), suffix


def test_a_stored_weight_is_dequantized_as_by_bitsandbytes(base, saved):
    quant_type, double_quant, tensors = saved
    weights = load_file(base / "model.safetensors")
    for name in quantized_names(tensors):
        codes, state = bnb.quantize_4bit(weights[name], quant_type=quant_type, compress_statistics=double_quant)
        stored = {stored.removeprefix(name): tensor for stored, tensor in tensors.items() if stored.startswith(name)}
        weight = restore(name, stored)
        assert torch.equal(weight.dequantize_rows(0, weight.shape[0]), dequantize_without_kernel(codes, state))


def test_codes_kept_as_another_dtype_are_the_same_weight():
    weight = random_weight((16, 64), torch.bfloat16, 0)
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", quant_storage=torch.bfloat16)
    assert codes.dtype == torch.bfloat16
    stored = {"": codes} | {f".{name}": part for name, part in state.as_dict(packed=True).items()}
    assert same_bits(restore("weight", stored).dequantize_rows(0, 16), bnb.dequantize_4bit(codes, state))


def test_names_lead_to_the_weight_they_are_part_of():
    weights = {"a.weight": "nf4"}
    assert quantized_owner("a.weight", weights) == "a.weight"
    assert quantized_owner("a.weight.absmax", weights) == "a.weight"
    assert quantized_owner("a.weight.quant_state.bitsandbytes__nf4", weights) == "a.weight"
    assert quantized_owner("a.weights", weights) is None
    assert quantized_owner("b.weight.absmax", weights) is None
    assert quantized_owner("a.bias", weights) is None


def test_a_weight_says_how_much_it_holds():
    weight = random_weight((8, 64), torch.bfloat16, 0)
    codes, absmax = quantize_rows(weight, "nf4")
    held = restore("w", parts_of(codes, absmax, quant_type="nf4", shape=(8, 64), dtype=torch.bfloat16))
    assert isinstance(held, QuantizedWeight)
    assert held.num_bytes == 8 * 64 // 2 + 8 * 4


def state_tensor(**changes):
    """Return the packed state of a weight of 8 x 64 with some fields changed."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 64]} | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


STATE = ".quant_state.bitsandbytes__nf4"
DAMAGE = {
    "no codes": {"": None},
    "too few codes": {"": torch.zeros(255, 1, dtype=torch.uint8)},
    "no scales": {".absmax": None},
    "too few scales": {".absmax": torch.zeros(7)},
    "scales of another dtype": {".absmax": torch.zeros(8, dtype=torch.uint8)},
    "no map": {".quant_map": None},
    "no state": {STATE: None},
    "state is no JSON": {STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)},
    "state is a list": {STATE: torch.tensor(list(b"[]"), dtype=torch.uint8)},
    "state is empty": {STATE: torch.tensor(list(b"{}"), dtype=torch.uint8)},
    "state of numbers": {STATE: torch.zeros(20)},
    "another shape": {STATE: state_tensor(shape=[8, 65])},
    "three dimensions": {STATE: state_tensor(shape=[8, 8, 8])},
    "shape of text": {STATE: state_tensor(shape="8x64")},
    "no shape": {STATE: state_tensor(shape=None)},
    "negative shape": {STATE: state_tensor(shape=[-8, -64])},
    "no blocks": {STATE: state_tensor(blocksize=0)},
    "negative blocks": {STATE: state_tensor(blocksize=-64)},
    "odd blocks": {STATE: state_tensor(blocksize=63)},
    "blocks of text": {STATE: state_tensor(blocksize="64")},
    "unknown type": {STATE: state_tensor(quant_type="int3")},
    "unknown dtype": {STATE: state_tensor(dtype="float128")},
    "dtype of integers": {STATE: state_tensor(dtype="int8")},
    "dtype is no dtype": {STATE: state_tensor(dtype="nn")},
    "a part nobody knows": {".surprise": torch.zeros(1)},
    "half of a nested scale": {".nested_absmax": torch.zeros(1)},
}


@pytest.mark.parametrize("case", DAMAGE)
def test_parts_that_make_no_weight_are_refused_by_name(case):
    weight = random_weight((8, 64), torch.bfloat16, 0)
    codes, absmax = quantize_rows(weight, "nf4")
    parts = parts_of(codes, absmax, quant_type="nf4", shape=(8, 64), dtype=torch.bfloat16) | DAMAGE[case]
    with pytest.raises(BadInputError, match=f"{NAME}: expected the parts of a bitsandbytes 4-bit weight"):
        restore(NAME, {suffix: tensor for suffix, tensor in parts.items() if tensor is not None})


NESTED_DAMAGE = {
    "too few nested scales": {".nested_absmax": torch.zeros(0)},
    "a short nested map": {".nested_quant_map": torch.zeros(16)},
    "flat scales": {".absmax": torch.zeros(8)},
}


@pytest.mark.parametrize("case", NESTED_DAMAGE)
def test_nested_parts_that_make_no_weight_are_refused_by_name(case):
    weight = random_weight((8, 64), torch.bfloat16, 0)
    codes, absmax = quantize_rows(weight, "nf4")
    parts = parts_of(codes, absmax, quant_type="nf4", double_quant=True, shape=(8, 64), dtype=torch.bfloat16)
    with pytest.raises(BadInputError, match=f"{NAME}: expected the parts of a bitsandbytes 4-bit weight"):
        restore(NAME, parts | NESTED_DAMAGE[case])
