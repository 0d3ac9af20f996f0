"""What several forms refuse, in one wording."""

from jobs.errors import BadInputError, UnsupportedError


def nothing_stored(place: str, words: str, looked_for: str) -> BadInputError:
    """Return the error for a declared form that no tensor has.

    Args:
        place: of the declaration.
        words: for the form.
        looked_for: what a tensor in it would be.
    """
    return BadInputError(
        f"{place}: declares weights in {words}, and no tensor is {looked_for}: weights that are plain numbers by now "
        "need no declaration, take it away"
    )


def stored_twice(name: str, code: str, codes: str) -> BadInputError:
    """Return the error for a weight that is there as numbers and as codes.

    Args:
        name: of the weight.
        code: what it is stored as, as headers say it.
        codes: the tensor with its codes.
    """
    return BadInputError(
        f"tensor {name} is stored twice, as {code} and as codes ({codes}); the checkpoint was put together from two"
    )


def transpose_in_codes(name: str, words: str) -> UnsupportedError:
    """Return the error for the weight of a Conv1D, which is the transpose of a linear one.

    Args:
        name: of the weight.
        words: for the form.
    """
    return UnsupportedError(f"{name}: codes of a Conv1D in {words} are not merged; name a base in 16 bits")


def nothing_wider(name: str, words: str) -> UnsupportedError:
    """Return the error for a weight that was to be kept in 8 bits, and has as many, or whose form has no such.

    Args:
        name: of the weight.
        words: for the form.
    """
    return UnsupportedError(
        f"tensor {name} is stored in {words}: keep: 8bit says nothing for it, as no group of 8-bit integers goes with "
        "that; request keep: 16bit"
    )


def unread_wider(name: str, scales: str) -> UnsupportedError:
    """Return the error for a weight that was to be kept in more bits in a base that transformers does not read.

    Args:
        name: of the weight.
        scales: the tensor that holds its scales.
    """
    return UnsupportedError(
        f"tensor {name} is stored with scales under {scales}: transformers reads no such base, so that nothing proves "
        "a release with keep; leave keep out, or request output: fp8_dynamic with it"
    )
