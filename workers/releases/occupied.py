"""Destinations that are taken: by other files, or by releases above and below."""

from collections.abc import Callable, Sequence

from jobs.errors import DestinationOccupiedError
from jobs.locations import Location


def occupied(location: Location, names: Sequence[str], what: str) -> DestinationOccupiedError:
    """Return the error for a destination that holds something else.

    Args:
        location: the destination.
        names: what is there; the first three are named in the message.
        what: what these are, in a few words.
    """
    shown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return DestinationOccupiedError(f"{location} holds {what}: {shown}; choose another destination or empty it first")


def lies_inside(location: Location, outer: Location) -> DestinationOccupiedError:
    """Return the error for a destination inside of a release."""
    return DestinationOccupiedError(
        f"{location} lies inside the release at {outer}, which would hold more than its manifest says; "
        "choose a destination beside it"
    )


def holds_below(location: Location, inner: Location) -> DestinationOccupiedError:
    """Return the error for a destination that another release lies below."""
    return DestinationOccupiedError(
        f"{location} has the release at {inner} below it, which is no part of this one; choose a destination beside it"
    )


def is_taken(look: Callable[[], object | None]) -> bool:
    """Whether no attempt will publish at a destination any more: a release is there, or something else.

    Args:
        look: returns the release that is there, or None; raises DestinationOccupiedError for something else.
    """
    try:
        return look() is not None
    except DestinationOccupiedError:
        return True
