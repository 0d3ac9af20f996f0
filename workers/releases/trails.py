"""Trails: notes, one for each attempt of this machine, of where it publishes to.

An attempt that dies leaves files or uploads at its destination. The next attempt there clears them. Where there is no
next one (another machine has published, the job was cancelled), workers read the dead attempt's trail and clear them.
"""

import logging
import time
from pathlib import Path

from jobs.errors import MergefleetError
from jobs.locations import Location, parse_location
from jobs.places import place_of
from workers.files.local import file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.sinks import open_sink

_log = logging.getLogger(__name__)

TRAILS = "attempts"
"""Name, in a scratch directory, of what holds trails."""
KEPT_SECONDS = 7 * 24 * 3600.0
"""How long finished shards wait at a destination for the next attempt, which may wait for a person's word."""
_DESTINATION, _ATTEMPT, _LOOKED = "destination", "attempt", "looked"
_AGAIN_SECONDS = 20.0
"""How long what is of use to a later attempt is left alone at least; an eighth of its age where that is more."""


class Trail:
    """What leads to all that one attempt has outside of its process; held by the process, as a staging is."""

    def __init__(self, owned: OwnedDirectory) -> None:
        self._owned = owned

    @classmethod
    def begin(cls, scratch: Path, destination: Location) -> "Trail":
        """Begin one, before anything is made at the destination.

        Raises:
            TransientIOError, NoCapacityError, BadInputError: by kind of fault of the scratch directory.
        """
        with file_errors(f"noting an attempt at {destination} in {scratch}", scratch):
            trail = cls(OwnedDirectory.make(scratch / TRAILS, "attempt-"))
            try:
                trail._write(_DESTINATION, str(destination))
            except OSError:
                trail.end(left=False)
                raise
        return trail

    def name(self, attempt: str) -> None:
        """Note the attempt by the name that its ticket has."""
        with file_errors(f"noting an attempt in {self._owned.path}", self._owned.path):
            self._write(_ATTEMPT, attempt)

    def end(self, *, left: bool) -> None:
        """End it with the attempt, or leave it to be followed. Idempotent.

        Args:
            left: whether there may be something of the attempt still.
        """
        if left:
            self._owned.abandon()
        else:
            self._owned.leave()

    def _write(self, name: str, text: str) -> None:
        (self._owned.path / name).write_text(text, encoding="utf-8")


def follow_trails(scratch: Path) -> None:
    """Clear what attempts of this machine have left that are dead, where no later attempt will use it.

    That is all of it where the release is there by now, else what is no finished shard, and after a week that, too. A
    place that does not answer is asked again later.
    """
    silent: set[str] = set()
    sweep(scratch / TRAILS, spare=lambda trail: _leads_on(trail, scratch, silent))


def _leads_on(trail: Path, scratch: Path, silent: set[str]) -> bool:
    """Clear what a trail leads to; return whether it is to be followed again."""
    destination, attempt = _read(trail / _DESTINATION), _read(trail / _ATTEMPT)
    if not destination:
        return False
    now = time.time()
    age = now - (trail / _DESTINATION).stat().st_mtime
    looked = trail / _LOOKED
    if looked.exists() and 0 <= now - looked.stat().st_mtime < max(_AGAIN_SECONDS, age / 8):
        return True
    is_unused = age > KEPT_SECONDS
    location = parse_location(destination)
    if place_of(location) in silent:
        return True
    try:
        is_clear = open_sink(location, scratch).clear(attempt, unused=is_unused)
    except (MergefleetError, OSError):
        silent.add(place_of(location))
        is_clear = is_unused
        said = {"place": destination, "attempt": attempt}
        _log.warning("what a dead attempt left could not be cleared", extra=said, exc_info=True)
    looked.touch()
    return not is_clear


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") or None
    except FileNotFoundError:
        return None
