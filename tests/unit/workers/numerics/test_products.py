"""B @ A by compiled loops: the bits of torch, whoever multiplies."""

import ctypes
import math

import pytest
import torch

from workers.numerics import products
from workers.numerics.kernels import blas, merging
from workers.numerics.tiles import TileBuffers

SHAPES = [
    (1, 1, 1),
    (1, 48, 1),
    (48, 7, 1),
    (1, 16, 900),
    (3, 1, 7),
    (2, 2048, 2),
    (700, 16, 1000),
    (512, 64, 2048),
    (4096, 8, 128),
    (96, 256, 14336),
]


@pytest.fixture(params=["compiled", "torch"])
def multiplier(request, monkeypatch):
    """Whether products are made inside of compiled loops, or by torch where those cannot."""
    if request.param == "torch":
        monkeypatch.setattr(products, "sgemm_address", lambda: 0)
    elif not blas.sgemm_address():
        pytest.skip("torch comes without the BLAS that compiled loops call")


def operands(num_rows, rank, num_columns):
    generator = torch.Generator().manual_seed(num_columns)
    shapes = ((num_rows, num_columns), (num_rows, rank), (rank, num_columns))
    return (torch.randn(shape, generator=generator) for shape in shapes)


def found_by(comparison):
    return (
        comparison.num_different,
        comparison.doubtful.tolist(),
        pytest.approx(comparison.weight_square, rel=1e-6),
        pytest.approx(comparison.delta_square, rel=1e-6),
        comparison.max_abs_error,
    )


@pytest.mark.usefixtures("multiplier")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_sums_and_what_is_found_are_those_of_torch(shape, stored, scaling):
    weight, b, a = operands(*shape)
    weight, dtype = weight.to(stored), torch.bfloat16 if stored is torch.float64 else stored
    product = torch.mm(b, a)
    expected = product.mul(scaling).add_(weight.float()).to(dtype)
    merged, buffers = torch.empty(weight.shape, dtype=dtype), TileBuffers(torch.device("cpu"))
    factors = torch.ones(shape[2])
    on_the_way = products.Comparison.of(weight, factors.numpy(), scaling)
    assert products.merge(b, a, scaling, merged, buffers, weight_OI=weight, comparison=on_the_way)
    assert torch.equal(merged, expected)
    assert on_the_way.num_different == 0
    if dtype is stored:
        in_place = weight.clone()
        as_well = products.Comparison.of(weight, factors.numpy(), scaling)
        assert products.merge(b, a, scaling, in_place, buffers, weight_OI=in_place, comparison=as_well)
        assert torch.equal(in_place, expected)
        assert found_by(as_well) == found_by(on_the_way)
    sums = [chunk.double().sum(1) for chunk in product.split(merging.CHUNK, dim=1)]
    projections = torch.from_numpy(on_the_way.projections_OC).double()
    assert torch.allclose(projections, torch.stack(sums, dim=1), rtol=1e-5, atol=1e-3)

    afterwards = products.Comparison.of(weight, factors.numpy(), scaling)
    assert products.merge(b, a, scaling, merged, buffers, comparison=afterwards)
    assert found_by(on_the_way) == found_by(afterwards)
    assert torch.equal(merged, expected)

    last = merged.numel() - 1
    merged.view(-1)[[0, last]] += 1
    afterwards = products.Comparison.of(weight, factors.numpy(), scaling)
    products.merge(b, a, scaling, merged, buffers, comparison=afterwards)
    assert afterwards.doubtful.tolist() == sorted({0, last})

    # Whoever compares has a scaling of its own.
    products.merge(b, a, scaling * 2, merged, buffers, weight_OI=weight)
    on_the_way = products.Comparison.of(weight, factors.numpy(), scaling)
    products.merge(b, a, scaling * 2, merged, buffers, weight_OI=weight, comparison=on_the_way)
    assert on_the_way.num_different > merged.numel() / 3


@pytest.mark.usefixtures("multiplier")
def test_more_doubt_than_places_is_doubt_of_all():
    weight, b, a = operands(128, 4, 2048)
    comparison = products.Comparison.of(weight, torch.ones(2048).numpy(), 1.0)
    products.merge(b, a, 1.0, weight.clone(), TileBuffers(torch.device("cpu")), comparison=comparison)
    assert comparison.num_different > len(comparison.places)
    assert comparison.doubtful is None


@pytest.mark.usefixtures("multiplier")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_in_one_piece_is_not_forgotten_in_the_next(value):
    weight, b, a = operands(4096, 4, 1024)
    merged, buffers = torch.mm(b, a).add_(weight), TileBuffers(torch.device("cpu"))
    merged[0, 0] = value
    comparison = products.Comparison.of(weight, torch.ones(1024).numpy(), 1.0)
    products.merge(b, a, 1.0, merged, buffers, comparison=comparison)
    assert not math.isfinite(comparison.max_abs_error)
    assert comparison.doubtful is None


@pytest.mark.usefixtures("multiplier")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_cannot_be_held_is_told(value):
    weight, b, a = operands(700, 4, 1000)
    merged, buffers = torch.empty(weight.shape, dtype=torch.float16), TileBuffers(torch.device("cpu"))
    assert products.merge(b, a, 1.0, merged, buffers, weight_OI=weight)
    weight[-1, -1] = value
    assert not products.merge(b, a, 1.0, merged, buffers, weight_OI=weight)


def test_another_blas_than_that_of_torch_is_not_called(monkeypatch):
    """One that multiplies otherwise, or none at all: torch multiplies then."""
    address = blas.sgemm_address()
    if not address:
        pytest.skip("torch comes without the BLAS that compiled loops call")
    kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)
    right = kind(address)

    @kind
    def off_by_little(*pointers):
        right(*pointers)
        first = (ctypes.c_float * 1).from_address(pointers[11])
        first[0] *= 1 + 2**-23

    class Library:
        def __init__(self, *functions):
            for function in functions:
                self.SGEMM = function

    for library in (Library(off_by_little), Library()):
        monkeypatch.setattr(ctypes, "CDLL", lambda _, library=library: library)
        blas.sgemm_address.cache_clear()
        assert blas.sgemm_address() == 0
    monkeypatch.undo()
    blas.sgemm_address.cache_clear()
    assert blas.sgemm_address() == address
