"""The garbage collector, kept from looking at what stays anyway: half a million objects come with the libraries."""

import contextlib
import functools
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collections() -> Iterator[None]:
    """Have no collections while libraries are imported, and have later ones pass over what these brought.

    They would find next to nothing, in a fifth of the time that importing takes.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@functools.cache
def pass_over_modules() -> None:
    """Have collections pass over all there is by now, once in a process: when it holds nothing but modules yet.

    Looking through these takes longer than planning a merge, and in a fork it copies the memory they share.
    """
    gc.collect()  # quick after `paused_collections`; elsewhere there may be more than modules
    gc.freeze()
