"""Models made of files from outside, while they are loaded and run: what the libraries stumble over is the files'."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from jobs.errors import MergefleetError
from jobs.text import shown

logger = logging.getLogger(__name__)

_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_MAX_REASON = 500


@contextlib.contextmanager
def model_of(path: Path, refused: type[MergefleetError]) -> Iterator[None]:
    """Turn what the libraries raise on a model into an error about its files. Running out of memory stays what it is.

    Args:
        path: of the model's files.
        refused: what is raised then.
    """
    try:
        yield
    except (MergefleetError, torch.OutOfMemoryError):
        raise
    except _REFUSALS as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):  # of torch on the CPU
            raise MemoryError(shown(error, _MAX_REASON)) from error
        logger.warning("a model that does not run", extra={"path": shown(path)}, exc_info=True)
        raise refused(
            f"{shown(path)}: transformers cannot run the model as its configuration says: {type(error).__name__}: "
            f"{shown(error, _MAX_REASON)}; mend its configuration, or ask for parity level: arithmetic, which runs none"
        ) from error
