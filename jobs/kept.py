"""What a release in a quantized form keeps in more bits: the words of `keep` in a request, and what came of it."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from jobs.errors import InvalidValueError
from jobs.frozen import Frozen
from jobs.output_form import OutputForm

_IN_8_BITS = frozenset({OutputForm.FP8_DYNAMIC, OutputForm.FP8_BLOCK, OutputForm.INT8_W8A16})


class Keep(StrEnum):
    """What weights are kept in whose delta the form of a release would lose."""

    IN_16_BITS = "16bit"
    """Plain numbers, in the dtype of the model."""
    IN_8_BITS = "8bit"
    """8-bit integers with a scale for each row; plain numbers where those lose the delta, too."""

    @property
    def words(self) -> str:
        """What people call it."""
        return "16 bits" if self is Keep.IN_16_BITS else "8 bits"


def check_keep(keep: Keep | None, output: OutputForm | None) -> None:
    """Check that a release in a form can keep weights in more bits.

    Args:
        keep: as a request has it.
        output: the form; None where that is wrong by itself.

    Raises:
        InvalidValueError: it says nothing for that form.
    """
    if keep is None or output is None:
        return
    if output is OutputForm.PLAIN:
        expected = "none beside output '16bit', which keeps all weights as numbers: request a form as output"
        raise InvalidValueError(expected, f"'{keep}'")
    if output.is_gguf:
        raise InvalidValueError(f"none beside output '{output}', whose weights are of one type", f"'{keep}'")
    if keep is Keep.IN_8_BITS and output in _IN_8_BITS:
        expected = f"16bit, as 8bit says nothing for output '{output}', which has 8 bits by itself"
        raise InvalidValueError(expected, f"'{keep}'")


class KeptWeight(Frozen):
    """A weight that is kept in more bits than the form of its release has."""

    weight: str
    """Its name, which is that of its tensor where it is kept in 16 bits."""
    kept_in: Keep
    survival: float | None = None
    """How much of the delta would be left in the form that was asked for. None where the adapter adds nothing to it:
    it is kept because of others that servers fuse it with, as those are whose survival is large enough."""


class KeptWeights(Frozen):
    """All of those of a release."""

    num_weights: Annotated[int, Field(ge=0)]
    """Weights that the form takes: the kept ones and those that are stored in it."""
    weights: tuple[KeptWeight, ...]
    """In the order of the release."""

    @property
    def words(self) -> str:
        """What people say of them: `3 of 28 weights kept in 16 bits`."""
        kept = [each.kept_in for each in self.weights]
        said = [f"{kept.count(keep)} in {keep.words}" for keep in (Keep.IN_8_BITS, Keep.IN_16_BITS) if keep in kept]
        if not said:
            return f"0 of {self.num_weights} weights kept in more bits"
        first, *more = said
        number, _, where = first.partition(" ")
        return f"{number} of {self.num_weights} weights kept {' and '.join((where, *more))}"
