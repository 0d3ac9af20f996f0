"""Faults of Ray itself, told from those of jobs."""

import contextlib
import traceback
from collections.abc import Iterator

from jobs.errors import MergefleetError


class SessionLostError(BaseException):
    """Ray's own services are gone, and this process cannot go on; a new one can. No error of any job."""


@contextlib.contextmanager
def lost_sessions() -> Iterator[None]:
    """Tell what Ray itself raises inside from other faults.

    Raises:
        SessionLostError: an exception came out of Ray.
    """
    try:
        yield
    except MergefleetError:
        raise
    except Exception as error:  # Ray's own functions raise errors of any class
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_globals.get("__name__", "").partition(".")[0] == "ray" for frame, _ in frames):
            raise SessionLostError(str(error)) from error
        raise
