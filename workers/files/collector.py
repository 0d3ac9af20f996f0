"""Loading the libraries quickly, and the garbage collector kept from what they bring: half a million objects stay."""

import contextlib
import functools
import gc
from collections.abc import Iterator

from jobs.collecting import uncollected


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Have libraries imported without what takes time and is not needed.

    Collections would find next to nothing, in a fifth of the time that importing takes; later ones pass over what the
    libraries brought. Nor is torch's compiler loaded, which bitsandbytes wraps functions with that are for other
    devices than a CPU or a GPU: they run as they are written.
    """
    with uncollected():
        try:
            import torch.compiler  # noqa: PLC0415 - one of them

            torch.compiler.set_default_backend("eager")
            yield
        finally:
            gc.freeze()


@functools.cache
def pass_over_modules() -> None:
    """Have collections pass over all there is by now, once in a process: when it holds nothing but modules yet.

    Looking through these takes longer than planning a merge, and in a fork it copies the memory they share.
    """
    gc.collect()  # quick after `loading`; elsewhere there may be more than modules
    gc.freeze()
