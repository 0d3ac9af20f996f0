"""Codes that are looked up: bit for bit what compressed-tensors' own compressors make of the same parts."""

import itertools

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme

from workers.bases.forms.compressed.codes import compress_rows
from workers.bases.forms.compressed.group import GLOBAL_SCALE, SCALE, WEIGHT, ZERO_POINT, Group

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = [16, 32]
FP8 = {"num_bits": 8, "type": "float"}
WAYS = {
    "fp8 by tensor": ("float-quantized", FP8 | {"strategy": "tensor"}),
    "fp8 by channel": ("float-quantized", FP8 | {"strategy": "channel"}),
    "fp8 by block": ("float-quantized", FP8 | {"strategy": "block", "block_structure": BLOCK}),
    "fp8 by group": ("naive-quantized", FP8 | {"strategy": "group", "group_size": 32}),
    "mxfp8": ("mxfp8-quantized", FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
    "int8 by channel": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8 asymmetric": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}),
} | {
    f"int{num_bits} packed by {name}": ("pack-quantized", {"num_bits": num_bits, "type": "int"} | strategy)
    for num_bits, (name, strategy) in itertools.product(
        (2, 3, 4, 8),
        {
            "channel": {"strategy": "channel"},
            "group": {"strategy": "group", "group_size": 32},
            "group, asymmetric": {"strategy": "group", "group_size": 32, "symmetric": False},
        }.items(),
    )
}


def grid_of(group, shape):
    """The shape of the scales of a weight, [O, G]."""
    num_rows, num_columns = shape
    return {
        "tensor": (1,),
        "channel": (num_rows, 1),
        "block": (-(-num_rows // BLOCK[0]), -(-num_columns // BLOCK[1])),
    }.get(group.strategy.value, (num_rows, num_columns // (group.group_size or 1)))


def parts_of(group, weight, scales):
    """What a compressor takes: a weight with scales, and zero points or a global scale where the group has them."""
    parts = {WEIGHT: weight, SCALE: scales}
    if group.format.value == "nvfp4-pack-quantized":
        parts |= {SCALE: scales.float().clamp(1, 448).to(torch.float8_e4m3fn).to(scales.dtype)}
        parts[GLOBAL_SCALE] = torch.tensor([37.0])
    if group.format.value.startswith("mx"):
        parts[SCALE] = torch.exp2(torch.log2(scales.float()).round()).to(scales.dtype)
    if not group.arguments.symmetric:
        limit = 2 ** (group.arguments.num_bits - 1)
        parts[ZERO_POINT] = torch.randint(-limit, limit, scales.shape).to(torch.int8)
    return parts


def group_of(way):
    format_, arguments = WAYS[way]
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": arguments})
    return Group.declared("here", scheme, format_)


def check(way, parts):
    group = group_of(way)
    expected = group.compressor.compress(dict(parts), group.scheme)
    codes = torch.empty(group.codes_shape(*parts[WEIGHT].shape), dtype=group.codes_dtype)
    found = compress_rows(dict(parts), group, codes) | {group.codes: codes}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("scales", DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_codes_are_those_of_the_compressor(way, scales, weights):
    """Weights from far below a step to beyond the last code; the last blocks are cut."""
    torch.manual_seed(3)
    group = group_of(way)
    columns = 72 if group.strategy.value in {"block", "channel"} else 64
    shape = (56, columns) if group.strategy.value == "block" else (64, columns)
    magnitudes = torch.exp2(torch.randint(-12, 3, shape).float())
    weight = (torch.randn(shape) * magnitudes).to(weights)
    steps = torch.exp2(torch.empty(grid_of(group, shape)).uniform_(-6, -1)).to(scales)
    check(way, parts_of(group, weight, steps))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", [way for way in WAYS if "tensor" in way or "channel" in way])
def test_every_number_of_16_bits_has_its_code(way, dtype):
    every = torch.arange(1 << 16).to(torch.uint16).view(dtype)
    finite = every[every.isfinite()]
    weight = finite[: finite.numel() // 64 * 64].view(64, -1)
    group = group_of(way)
    check(way, parts_of(group, weight, torch.ones(grid_of(group, tuple(weight.shape)), dtype=dtype)))


@pytest.mark.parametrize("way", ["fp8 by tensor", "fp8 by channel", "mxfp4", "nvfp4"])
def test_float32_beside_the_middle_of_two_codes_goes_to_the_nearer_one(way):
    """The middles themselves, and the float32 next to each on either side."""
    group = group_of(way)
    if "fp8" in way:
        values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        values = values[values.isfinite()].unique()
    else:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        values = torch.cat([-values, values]).unique()
    middles = (values[1:] + values[:-1]) / 2
    sides = [middles.nextafter(torch.tensor(side)) for side in (-torch.inf, torch.inf)]
    numbers = torch.cat([middles, *sides, values])
    weight = torch.nn.functional.pad(numbers, (0, -numbers.numel() % 64)).view(-1, 64)
    parts = parts_of(group, weight, torch.ones(grid_of(group, tuple(weight.shape))))
    if way == "nvfp4":
        parts[GLOBAL_SCALE] = torch.ones(1)
    check(way, parts)
