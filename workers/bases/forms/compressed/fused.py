"""Codes of several experts in one tensor, which no form of compressed-tensors or ModelOpt is read with."""

from collections.abc import Mapping

from jobs.errors import UnsupportedError
from workers.bases.forms.compressed.group import PLAIN, WEIGHT
from workers.files.layout import TensorSpec


def refuse_fused(specs: Mapping[str, TensorSpec], words: str) -> None:
    """Refuse codes of several experts in one tensor.

    Args:
        specs: of all tensors of a checkpoint, by name.
        words: for the form.

    Raises:
        UnsupportedError: there are such; names one.
    """
    for name, spec in specs.items():
        if spec.code not in PLAIN and name.rpartition(".")[2] != WEIGHT and f"{name}_scale" in specs:
            raise UnsupportedError(
                f"tensor {name} is stored as {spec.code} of shape {list(spec.shape)}, with scales beside it: weights "
                f"of several experts in one tensor are not read in {words}; name a base that has them one by one"
            )
