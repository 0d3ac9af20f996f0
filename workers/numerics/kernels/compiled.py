"""How loops are compiled, and where their machine code is kept."""

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.extending import intrinsic

_SOURCES = sorted(Path(__file__).parent.glob("*.py"))
_SOURCE = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES) + numba.__version__.encode()).hexdigest()
_config: Any = numba.config
_KEPT_IN = Path(os.path.expanduser(_config.CACHE_DIR or "~/.cache/mergefleet"), _SOURCE[:16])  # noqa: PTH111 - it never raises
_config.CACHE_DIR = str(_KEPT_IN)


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """Compile a function for use inside of kernels."""
    return numba.njit(function, nogil=True, error_model="numpy", **options)


def primitive(typed: Callable[..., Any]) -> Any:
    """Return what compiled code can call, from a function of its arguments' types."""
    return intrinsic(typed)


class Kernel:
    """A compiled loop. Its machine code is kept for the next process, where that can be done safely.

    Numba writes an index and the code one after the other, and trusts what it finds: two processes that compile the
    same loop for other types at the same time could leave one's code under the other's name. So one process at a time
    compiles, in a directory that belongs to these very sources.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._seen: set[tuple[object, ...]] = set()
        try:
            self._loop = jit(function, cache=True)
        except RuntimeError:  # no directory can be written
            self._loop = jit(function)

    def __call__(self, *arguments: Any) -> Any:
        """Run it."""
        kinds = tuple(_kind(argument) for argument in arguments)
        if kinds in self._seen:
            return self._loop(*arguments)
        try:
            with _one_at_a_time():
                result = self._loop(*arguments)
        except OSError:  # the directory is full, or is gone
            self._loop = jit(self._function)
            result = self._loop(*arguments)
        self._seen.add(kinds)
        return result


def _kind(argument: Any) -> object:
    if isinstance(argument, tuple):
        return type(argument), *map(_kind, argument)
    return getattr(argument, "dtype", type(argument))


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Hold the lock of the directory with the machine code; raises OSError where there can be none."""
    _KEPT_IN.mkdir(parents=True, exist_ok=True)
    with (_KEPT_IN / "lock").open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
