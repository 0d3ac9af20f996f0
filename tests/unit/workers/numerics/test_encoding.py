"""Loops that make codes, and that tell what they leave: against torch's own operations, and against float64."""

import itertools

import pytest
import torch

from workers.numerics.kernels.differences import num_different
from workers.numerics.kernels.elements import ARRAY_DTYPES, array
from workers.numerics.kernels.encoding import extremes
from workers.numerics.kernels.remains import remains

DTYPES = tuple(ARRAY_DTYPES)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.float8_e4m3fn, torch.int64, torch.float64])
def test_what_differs_in_any_bit_is_counted(dtype):
    """Zeros of either sign as well as NaN; elements lie where no word begins, and not one after the other."""
    one = torch.randint(0, 256, (9, 24), dtype=torch.uint8).view(dtype)[1:]
    other = one.clone()
    assert num_different(one, other) == 0
    other.view(torch.uint8)[2, 7] ^= 128
    other.view(torch.uint8)[7, 23] ^= 1
    assert num_different(one, other) == num_different(one.T, other.T) == 2
    assert num_different(one, other[:-1]) == one.numel()
    assert num_different(one, other.view(torch.int8)) == max(one.numel(), other.view(torch.int8).numel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 100, 128])
def test_extremes_are_those_of_torch(dtype, width):
    """Groups of one sign, of zeros of either sign and of infinities; the last one of a row is cut."""
    torch.manual_seed(1)
    rows = torch.randn(6, 100).to(dtype)
    rows[1], rows[2], rows[3, :40], rows[4, 17], rows[5, 60] = (
        rows[1].abs(),
        -rows[2].abs(),
        -0.0,
        torch.inf,
        -torch.inf,
    )
    lowest, highest = torch.empty(2, 6, -(-100 // width))
    extremes(array(rows), 100, width, array(lowest), array(highest))
    groups = rows.float().split(width, dim=1)
    assert torch.equal(lowest, torch.stack([group.amin(1) for group in groups], 1))
    assert torch.equal(highest, torch.stack([group.amax(1) for group in groups], 1))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan])
def test_a_group_with_nan_has_nan_for_one_of_its_extremes(value):
    rows = torch.randn(3, 64)
    rows[1, 40] = torch.copysign(torch.tensor(torch.nan), torch.tensor(value))
    lowest, highest = torch.empty(2, 3, 2)
    extremes(array(rows), 64, 32, array(lowest), array(highest))
    is_nan = lowest.isnan() | highest.isnan()
    assert is_nan.tolist() == [[False, False], [False, True], [False, False]]


@pytest.mark.parametrize(("shipped", "merged", "before"), list(itertools.product(DTYPES, repeat=3)))
@pytest.mark.parametrize("size", [1, 255, 256, 5000])
def test_what_is_left_of_a_delta_is_that_of_float64(shipped, merged, before, size):
    torch.manual_seed(size)
    w = (torch.randn(size) * 0.02).to(before)
    m = (w.double() + torch.randn(size) * 0.002).to(merged)
    s = (m.double() + torch.randn(size) * 0.005).to(shipped)
    found = remains(array(s), array(m), array(w))
    error, delta = s.double() - m.double(), m.double() - w.double()
    expected = [float(error @ error), float(error @ delta), float(delta @ delta)]
    # Sums of products of either sign cancel: they are as exact as those of their magnitudes.
    scales = [expected[0], float(error.abs() @ delta.abs()), expected[2]]
    for value, true, scale in zip(found, expected, scales, strict=True):
        assert abs(value - true) <= 1e-5 * scale


def test_without_what_was_before_there_is_no_delta():
    s, m = torch.randn(2, 300)
    error_square, *others = remains(array(s), array(m), array(m[:0]))
    assert others == [0, 0]
    assert error_square == pytest.approx(float((s.double() - m.double()).square().sum()), rel=1e-6)
