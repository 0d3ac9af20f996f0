"""Words of LLVM for loops that the compiler does not find vector instructions for by itself."""

from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils

INT64 = ir.IntType(64)
_config: Any = numba.config


def has_instructions(*features: str) -> bool:
    """Return whether Numba compiles for a processor with some groups of instructions, by LLVM's names for them.

    Where it is told to compile for another processor than this one, nothing is said about that.
    """
    if _config.CPU_NAME or _config.CPU_FEATURES:
        return False
    found = llvmlite.binding.get_host_cpu_features()
    return all(found.get(feature, False) for feature in features)


def data_pointer(context: Any, builder: Any, array_type: Any, value: Any) -> Any:
    """Return the address of the first element of an array that a primitive was given."""
    return context.make_array(array_type)(context, builder, value).data


def load(builder: Any, pointer: Any, index: Any, kind: Any) -> Any:
    """Return the vector that begins at an element; it may lie anywhere."""
    return builder.load(builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer()), align=1)


def store(builder: Any, value: Any, pointer: Any, index: Any) -> None:
    """Put a vector where an element begins; it may lie anywhere."""
    builder.store(value, builder.bitcast(builder.gep(pointer, [index]), value.type.as_pointer()), align=1)


def splat(builder: Any, value: Any, num_lanes: int) -> Any:
    """Return a vector of one value."""
    kind = ir.VectorType(value.type, num_lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return shuffle(builder, one, one, [0] * num_lanes)


def shuffle(builder: Any, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    """Return some lanes of two vectors, those of the second counted on."""
    places = [ir.Constant(ir.IntType(32), lane) for lane in lanes]
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), places))


def call(builder: Any, name: str, *arguments: Any) -> Any:
    """Call an intrinsic of LLVM that returns what its first argument is."""
    kind = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
