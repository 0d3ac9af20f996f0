"""Products of matrices inside of compiled loops, by the BLAS that torch brings, so with the bits of `torch.mm`."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from workers.numerics.kernels.compiled import Kernel, primitive
from workers.numerics.kernels.vectors import data_pointer

_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
_POINTER = ir.IntType(8).as_pointer()
_SHAPES = [(1, 1, 1), (2, 3, 5), (64, 8, 96), (256, 16, 2048), (31, 64, 333), (8, 200, 1024)]
"""Rows, inner dimension and columns of the products that have to be those of torch."""


@primitive
def multiply(  # noqa: PLR0917 - compiled code passes by position
    _context: Any, _sgemm: Any, left: Any, right: Any, product: Any, num_rows: Any, num_inner: Any, num_columns: Any
) -> Any:
    """Multiply matrices [rows, inner] and [inner, columns], float32, which lie row by row in flat arrays.

    First comes the address of the SGEMM of a BLAS with integers of 32 bits.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place_of(value: Any) -> Any:
            return builder.bitcast(cgutils.alloca_once_value(builder, value), _POINTER)

        def elements_of(number: int) -> Any:
            pointer = data_pointer(context, builder, signature.args[number], arguments[number])
            return builder.bitcast(pointer, _POINTER)

        as_it_is = place_of(ir.Constant(ir.IntType(8), ord("N")))
        rows, inner, columns = (place_of(builder.trunc(value, ir.IntType(32))) for value in arguments[4:])
        one, zero = (place_of(ir.Constant(ir.FloatType(), number)) for number in (1.0, 0.0))
        # BLAS goes by columns: what lies row by row is the transpose to it, and that of a product is right by left.
        shape = (as_it_is, as_it_is, columns, rows, inner)
        factors = (one, elements_of(2), columns, elements_of(1), inner)
        kind = ir.FunctionType(ir.VoidType(), [_POINTER] * 13)
        function = builder.inttoptr(arguments[0], kind.as_pointer())
        builder.call(function, [*shape, *factors, zero, elements_of(3), columns])
        return context.get_dummy_value()

    return types.void(types.int64, left, right, product, num_rows, num_inner, num_columns), generate


@Kernel
def _multiplied(  # noqa: PLR0917 - compiled code passes by position
    sgemm: Any, left: Any, right: Any, product: Any, num_rows: Any, num_columns: Any
) -> Any:
    multiply(sgemm, left, right, product, num_rows, left.size // num_rows, num_columns)


@functools.cache
def sgemm_address() -> int:
    """Return where the SGEMM is that `torch.mm` calls; 0 if it cannot be found, or has other bits than that."""
    try:
        function = ctypes.CDLL(str(_LIBRARY)).SGEMM
    except (OSError, AttributeError):  # torch was built with another BLAS than MKL, or without one
        return 0
    address = int(ctypes.cast(function, ctypes.c_void_p).value or 0)
    return address if all(_is_that_of_torch(address, *shape) for shape in _SHAPES) else 0


def _is_that_of_torch(address: int, num_rows: int, num_inner: int, num_columns: int) -> bool:
    generator = torch.Generator().manual_seed(num_columns)
    left = torch.randn(num_rows, num_inner, generator=generator)
    right = torch.randn(num_inner, num_columns, generator=generator)
    product = torch.empty(num_rows, num_columns)
    _multiplied(address, *(part.view(-1).numpy() for part in (left, right, product)), num_rows, num_columns)
    return torch.equal(product, torch.mm(left, right))
