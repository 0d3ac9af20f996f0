"""Which of the forms that are read a base is stored in, by what it declares."""

from collections.abc import Callable, Mapping
from pathlib import Path

from workers.bases.declarations import Declaration, declaration
from workers.bases.forms import StoredForm
from workers.bases.forms.awq import Awq
from workers.bases.forms.bitsandbytes_4bit import BITSANDBYTES_4BIT
from workers.bases.forms.compressed.form import CompressedTensors
from workers.bases.forms.fp8_blocks import Fp8Blocks
from workers.bases.forms.modelopt import ModelOpt
from workers.bases.forms.mxfp4 import Mxfp4

_FORMS: Mapping[str, Callable[[Declaration], StoredForm | None]] = {
    "awq": lambda declared: Awq.declared(declared.place, declared.content),
    "bitsandbytes": lambda _: BITSANDBYTES_4BIT,
    "compressed-tensors": lambda declared: CompressedTensors.declared(declared.place, declared.content),
    "fp8": lambda declared: Fp8Blocks.declared(declared.place, declared.content),
    "modelopt": lambda declared: ModelOpt.declared(declared.place, declared.content),
    "fbgemm_fp8": lambda declared: Fp8Blocks(None, declared.content),
    "mxfp4": lambda declared: Mxfp4(declared.content),
}
"""By the method that a base declares."""


def declared(directory: Path) -> Declaration | None:
    """Return what a base declares of the form of its weights; raises as `declared_form`."""
    return declaration(directory, read=_FORMS.keys())


def declared_form(directory: Path) -> StoredForm | None:
    """Return the form that a base declares for its weights, or None where they are plain numbers.

    Raises:
        UnsupportedError: it declares one that is not read; the message names it, where it is declared, and what to do.
            Or it declares several, or in a place where nothing takes it away from a release.
        NotFoundError, BadInputError: `config.json`, or a file that declares a form, cannot be read.
    """
    found = declared(directory)
    return None if found is None else form_of(found)


def form_of(found: Declaration) -> StoredForm | None:
    """Return the form of a declaration; raises as `declared_form`."""
    return _FORMS[found.method](found)
