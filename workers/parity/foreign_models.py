"""Models made of files from outside, while they are loaded and run: what the libraries stumble over is the files'."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from jobs.errors import MergefleetError
from jobs.text import shown
from workers.numerics.device import raise_of_machine

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
    """Turn what the libraries raise on a model into an error about its files. Faults of the machine stay what they are.

    Args:
        path: of the model's files.
        refused: what is raised then.
    """
    try:
        yield
    except MergefleetError:
        raise
    except _REFUSALS as error:
        raise_of_machine(error)
        logger.warning("a model that does not run", extra={"path": shown(path)}, exc_info=True)
        raise refused(
            f"{shown(path)}: transformers cannot run the model as its configuration says: {type(error).__name__}: "
            f"{shown(error, _MAX_REASON)}; mend its configuration, or ask for parity level: arithmetic, which runs none"
        ) from error
