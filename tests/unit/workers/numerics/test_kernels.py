"""The compiled loops: bit for bit what torch makes of the same operations, and sums that agree with float64."""

import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.numerics.kernels import merging
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.rounding import BITS, precision_for

DTYPES = tuple(ARRAY_DTYPES)
SIZES = (1, 7, 8, 63, 1023, 1024, 1025, 5000)


def bits(tensor):
    return tensor.view(BITS[tensor.itemsize])


def values_around(dtype, size, seed):
    """Random values of every magnitude that a dtype has, zeros and denormals included; all finite."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2 ** (8 * dtype.itemsize - 1)
    patterns = torch.randint(-limit, limit, (size,), generator=generator)
    drawn = patterns.to(BITS[dtype.itemsize]).view(dtype)
    return torch.where(drawn.isfinite(), drawn, torch.zeros_like(drawn))


NO_OPERANDS = np.empty(0, np.float32)
NO_PLACES = np.empty(0, np.int64)


def add(weight, delta, scaling, dtype):
    """Round W + scaling * delta; in its own dtype both beside W and in its place."""
    rounded, in_place, scale = torch.empty(weight.shape, dtype=dtype), weight.clone(), np.float32(scaling)
    product = merging.Product(0, NO_OPERANDS, NO_OPERANDS, weight.numel(), array(delta))
    nothing = array(weight)[:0]
    no_comparison = merging.Known(nothing, scale, scale[None], scale[None], NO_PLACES)
    beside = merging.Sums(scaling=scale, weight=array(weight), in_place=False, merged=array(rounded))
    finite, *_ = merging.merge(product, beside, no_comparison)
    if weight.dtype == dtype:
        in_its_place = merging.Sums(scaling=scale, weight=nothing, in_place=True, merged=array(in_place))
        also_finite, *_ = merging.merge(product, in_its_place, no_comparison)
        assert also_finite == finite
        assert torch.equal(bits(in_place), bits(rounded))
    return bool(finite), rounded


def compare(weight, merged, product, scaling, factors, projections, places):
    """Compare with a product that is at hand; all tensors, [rows, columns] or of a single row."""
    num_columns, scale = factors.numel(), array(product).dtype.type(scaling)
    known, *arrays = (array(each) for each in (weight, factors, projections))
    finite, *found = merging.merge(
        merging.Product(0, NO_OPERANDS, NO_OPERANDS, num_columns, array(product)),
        merging.Sums(scaling=scale, weight=known[:0], in_place=False, merged=array(merged)),
        merging.Known(known, scale, *arrays, places.numpy()),
    )
    assert finite
    return found


@settings(max_examples=100, deadline=None)
@given(
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(SIZES),
    scaling=st.sampled_from([1.0, 2.0, 0.1, -1.7, 0.0]),
    seed=st.integers(0, 2**32),
)
def test_sums_are_rounded_as_by_torch(stored, dtype, size, scaling, seed):
    weight = values_around(stored, size, seed)
    # Of the weight's own magnitude, so that sums cancel, or of any.
    delta = values_around(torch.float32, size, seed + 1)
    delta = torch.where(delta > 0, delta, weight.float() * delta.sign() * 0.37)
    expected = (delta * scaling + weight).to(dtype)
    finite, rounded = add(weight, delta, scaling, dtype)
    assert finite == bool(expected.isfinite().all())
    where = ~expected.isnan()
    assert torch.equal(bits(rounded)[where], bits(expected)[where])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_middle_and_its_neighbours_are_rounded_as_by_torch(dtype):
    """Ties go to the even value, on either side of zero and down to the denormals."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    every = every[every.isfinite()].sort().values.float()
    middles = (every[1:].double() + every[:-1].double()).div(2).float()
    sums = torch.cat([middles, middles.nextafter(torch.tensor(torch.inf)), middles.nextafter(torch.tensor(-torch.inf))])
    finite, rounded = add(torch.zeros_like(sums), sums, 1.0, dtype)
    assert finite
    assert torch.equal(bits(rounded), bits(sums.to(dtype)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
@pytest.mark.parametrize("place", [0, 1000, 4999])
def test_what_the_dtype_cannot_hold_is_noticed(value, place):
    weight = torch.ones(5000, dtype=torch.bfloat16)
    delta = torch.zeros(5000)
    delta[place] = value
    assert not add(weight, delta, 1.0, torch.bfloat16)[0]
    assert add(weight, torch.zeros(5000), 1.0, torch.bfloat16)[0]


@settings(max_examples=100, deadline=None)
@given(
    stored=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from(SIZES),
    num_wrong=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_a_comparison_finds_the_wrong_elements_and_measures_in_float64(stored, dtype, size, num_wrong, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, generator=generator).to(stored)
    delta = torch.randn(size, generator=generator).mul_(0.1).to(precision_for(dtype))
    total = weight.to(delta.dtype) + delta
    merged = total.to(dtype)
    wrong = torch.randperm(size, generator=generator)[:num_wrong].sort().values
    bits(merged)[wrong] ^= 1
    places = torch.full((10,), -1)
    signs = torch.ones(size, dtype=delta.dtype)
    signs[::3] = -1
    projections = torch.empty(math.ceil(size / merging.CHUNK), dtype=delta.dtype)
    weight_square, delta_square, error_delta, largest, num_different = compare(
        weight, merged, delta, 1, signs, projections, places
    )
    size_of_sum = float(delta.double().abs().sum())
    assert float(projections.sum()) == pytest.approx(float((delta * signs).double().sum()), abs=1e-6 * size_of_sum)
    assert num_different == len(wrong)
    assert places[: len(wrong)].tolist() == wrong[:10].tolist()
    error = merged.double() - total.double()
    assert weight_square == pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert delta_square == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
    size_of_sum = float((error * delta.double()).abs().sum())
    assert error_delta == pytest.approx(float((error * delta.double()).sum()), abs=1e-4 * size_of_sum + 1e-300)
    assert largest == pytest.approx(float(error.abs().max()), rel=1e-6)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.3])
@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (3, 1), (7, 5), (4, 1024), (5, 2500)])
def test_a_product_is_scaled_as_by_torch_and_projected_row_by_row(num_rows, num_columns, scaling):
    generator = torch.Generator().manual_seed(num_columns)
    weight = torch.randn(num_rows, num_columns, generator=generator).bfloat16()
    product = torch.randn(num_rows, num_columns, generator=generator).mul_(0.1)
    merged = (product * scaling).add_(weight).bfloat16()
    bits(merged)[num_rows // 2, num_columns // 2] ^= 1
    signs = torch.randint(2, (num_columns,), generator=generator).mul_(2).sub_(1).float()
    num_chunks = math.ceil(num_columns / merging.CHUNK)
    projections, places = torch.empty(num_rows, num_chunks), torch.empty(10, dtype=torch.int64)
    *_, num_different = compare(weight, merged, product, scaling, signs, projections, places)
    assert num_different == 1
    assert places[0] == num_rows // 2 * num_columns + num_columns // 2
    weighted = (product.double() * signs.double()).split(merging.CHUNK, dim=1)
    assert torch.allclose(projections.double(), torch.stack([part.sum(1) for part in weighted], 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_comparison_does_not_lose_what_is_no_number(dtype, value):
    for place in (0, 1500, 2999):
        merged = torch.zeros(3000, dtype=dtype)
        merged[place] = value
        delta = torch.zeros(3000, dtype=precision_for(dtype))
        projections = torch.empty(math.ceil(3000 / merging.CHUNK), dtype=delta.dtype)
        places = torch.empty(10, dtype=torch.int64)
        found = compare(torch.zeros(3000), merged, delta, 1, torch.ones_like(delta), projections, places)
        assert not math.isfinite(found[3])


@pytest.mark.parametrize(("left", "right"), [*itertools.product(DTYPES, DTYPES)])
@pytest.mark.parametrize("size", SIZES)
def test_squares_are_those_of_float64(left, right, size):
    generator = torch.Generator().manual_seed(size)
    a, b = (torch.randn(size, generator=generator).to(dtype) for dtype in (left, right))
    difference = (a.double() - b.double()).square().sum()
    assert merging.square_difference(array(a), array(b)) == pytest.approx(float(difference), rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_an_unchanged_weight_has_the_same_bits_everywhere(dtype, size):
    generator = torch.Generator().manual_seed(size)
    weight = torch.randn(size, generator=generator).to(dtype)
    square = pytest.approx(float(weight.double().square().sum()), rel=1e-5)
    assert merging.compare_unchanged(array(weight), array(weight.clone())) == (square, True)
    for place in {0, size // 2, size - 1}:
        for bit in (0, 8 * dtype.itemsize - 1):
            merged = weight.clone()
            bits(merged)[place] ^= -1 << bit if bit else 1
            assert merging.compare_unchanged(array(weight), array(merged)) == (square, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_is_compared_by_its_bits_too(dtype):
    weight = torch.tensor([math.nan, math.inf, -0.0, 1.0]).to(dtype)
    assert merging.compare_unchanged(array(weight), array(weight.clone()))[1]
    assert not merging.compare_unchanged(array(weight), array(weight.abs()))[1]  # -0.0 is not 0.0


def test_kernels_are_plain_where_another_processor_is_compiled_for():
    """As where machines of several kinds share what was compiled: LLVM ends the process on an instruction it lacks."""
    program = (
        "import torch\n"
        "from workers.bases.four_bit import quantize_rows\n"
        "weight = torch.randn(8, 64).bfloat16()\n"
        "codes, absmax = quantize_rows(weight, 'nf4')\n"
        "print(codes.shape[0])\n"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": "generic"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300, env=environment
    )
    assert run.stdout.split() == ["256"]


def test_kernels_work_where_no_compiled_code_can_be_kept():
    """As in an image whose file system is read-only: they are compiled anew."""
    program = (
        "import numba.core.caching as c\n"
        "c.CacheImpl._locator_classes = []\n"
        "import numpy as np\n"
        "from workers.numerics.kernels import merging\n"
        "print(merging.square_difference(np.full(3, 2, np.float32), np.zeros(3, np.float32)))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert run.stdout.split() == ["12.0"]
