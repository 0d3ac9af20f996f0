"""Whose fault it is when a model does not run."""

from pathlib import Path

import pytest
import torch

from jobs.errors import BadInputError, InvalidValueError
from workers.parity.foreign_models import model_of


def test_what_the_libraries_raise_is_told_of_the_files():
    words = r"/b: transformers cannot run the model .*: ValueError: relu\\x1b"
    with pytest.raises(BadInputError, match=words), model_of(Path("/b"), BadInputError):
        raise ValueError("relu\x1b")
    with pytest.raises(MemoryError), model_of(Path("/b"), BadInputError):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    with pytest.raises(MemoryError), model_of(Path("/b"), BadInputError):
        raise torch.OutOfMemoryError("CUDA")
    with pytest.raises(InvalidValueError), model_of(Path("/b"), BadInputError):
        raise InvalidValueError("a", "b")
