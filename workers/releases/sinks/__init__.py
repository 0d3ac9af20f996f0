"""Where releases go. One Protocol, three kinds; what is written is invisible until it is published.

Extend: write a module with a class that implements `Sink`, add it to the table in `open_sink`, and run the contract
suite (`tests/contract/test_sinks.py`, `test_records.py`) over it.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from jobs.release import Artifact, Manifest, Release
from workers.files.local import FileState
from workers.releases.records import ShardRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """With it, another process takes part in a release on its way. Can be pickled."""

    directory: Path
    """Of the staging that the release was started with."""
    attempt: str
    """Marks what is stored of this release on its way."""
    merge_key: str
    """Of the release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a sink knows of a file that was put; with it, another process publishes the file. Can be pickled."""

    artifact: Artifact
    stored: object
    """Of the sink's own kind, and for it alone."""


class Records(Protocol):
    """What makes finished shards of one staging outlive the processes that take part in it (decision 24)."""

    def keep(self, record: ShardRecord) -> None:
        """Leave a record of a shard that was put here, is checked, and right. May run in a thread.

        Raises:
            TransientIOError, AuthError, NoCapacityError: by kind of fault; the release does not need the record.
        """
        ...

    def left(self) -> tuple[ShardRecord, ...]:
        """Return what dead attempts at this release have recorded here. Of their files nothing is believed yet.

        Raises:
            TransientIOError, AuthError, NoCapacityError: by kind of fault.
        """
        ...

    def claim(self, record: ShardRecord, *, whole: bool) -> Receipt | None:
        """Take over the shard of a record, as if it had been put here, if its bytes are what the record says.

        May run in a thread, several at a time for different shards.

        Args:
            record: one that was left.
            whole: whether the file has to be in the staging's directory.

        Returns:
            None when the bytes are others, or not there.

        Raises:
            TransientIOError, AuthError, NoCapacityError: by kind of fault.
        """
        ...

    def clear(self, besides: Collection[str] = ()) -> None:
        """Remove what was left, claimed or not, but some shards. Until then, what was not claimed outlives `discard`.

        Args:
            besides: names of the shards that the release takes.

        Raises:
            TransientIOError, AuthError: by kind of fault.
        """
        ...


class Staging(Protocol):
    """One release on its way. It ends with the last process that takes part in it, and leaves nothing visible."""

    directory: Path
    """Where the files of the release are written, under the names they will have. Empty at first; another process of
    the release may have the same one, where it sees it."""

    in_place: bool
    """Whether what is written there stays there, so that `put` has no reason to read it."""

    @property
    def ticket(self) -> Ticket:
        """What another process needs to take part."""
        ...

    @property
    def records(self) -> Records:
        """Records of finished shards: its own, and those that dead attempts left."""
        ...

    def put(self, artifact: Artifact, hashed_as: FileState | None = None) -> Receipt:
        """Ship one finished file of `directory` to where readers cannot see it yet. The file stays until `discard`.

        May run in a thread, several at a time for different files, and again after an error: it starts over.

        Args:
            artifact: its name, size and SHA-256. The bytes that arrive are checked against what was computed here.
            hashed_as: the state of the file in which its digest was taken. Where the file has it still, a sink that has
                no other reason to read the file need not do so; None has it read in any case.

        Returns:
            What another process needs to publish it.

        Raises:
            TransientIOError, AuthError, NotFoundError, NoCapacityError: by kind of fault.
            InternalError: the file is not what the artifact says.
        """
        ...

    def take(self, receipt: Receipt) -> None:
        """Take over a file that another process has put, as if it had been put here."""
        ...

    def publish(self, manifest: Manifest) -> Release:
        """Make the release visible. The files of the manifest are those that were put; `manifest.json` comes last.

        Atomicity: create-only. Either the whole release becomes visible or nothing does; where the store cannot show
        many files at once, a reader who asks for `manifest.json` first sees nothing or everything.

        Returns:
            The release. `created` is False when the same merge key was there already, and nothing was written.

        Raises:
            DestinationOccupiedError: something else is there.
            TransientIOError, AuthError, NoCapacityError: by kind of fault; may be called again.
            InternalError: the manifest does not name what was put, or a file changed since.
        """
        ...

    def discard(self, *, keep: bool = False) -> bool:
        """Let go of everything this staging has put or taken, here and at the store. Idempotent.

        What others of this release have put stays theirs; after `publish` the release stays.

        Args:
            keep: leave shards that have records to a later attempt, as a process does that dies.

        Returns:
            Whether there may be something that was left to a later attempt.
        """
        ...


class Sink(Protocol):
    """A destination that can hold one release."""

    def existing(self) -> Manifest | None:
        """Return the manifest of the release that is there, or None when the destination is free.

        Raises:
            DestinationOccupiedError: something is there that is not a release of mergefleet.
            AuthError, NotFoundError, TransientIOError: by kind of fault; a missing bucket is NotFoundError.
        """
        ...

    def open(self, merge_key: str) -> Staging:
        """Start a release. First clears away what dead processes left on their way to this destination.

        Shards that they have recorded under this merge key stay: they are in the `records` of the staging.

        One destination has one live staging at a time: the ledger sees to that. A second one may make the first send
        its files again, but no two of them can make anything visible that is not one whole release.

        Args:
            merge_key: of the release to come; marks what is staged, so that a later attempt knows its own.

        Raises:
            DestinationOccupiedError: what is there belongs to something else.
            AuthError, NotFoundError, TransientIOError, NoCapacityError: by kind of fault.
        """
        ...

    def join(self, ticket: Ticket) -> Staging | None:
        """Take part in a release that another process has started.

        Args:
            ticket: of the staging it was started with.

        Returns:
            None when this process cannot: it does not see what the others write, and the sink needs that.

        Raises:
            AuthError, NotFoundError, TransientIOError, NoCapacityError: by kind of fault.
        """
        ...

    def clear(self, attempt: str | None, *, unused: bool) -> bool:
        """Remove what dead attempts left that no later one will use: all of it, where something is published here.

        Args:
            attempt: a dead one, by its ticket's name; None for one that ended before it had any.
            unused: whether its finished shards are of no use to a later attempt.

        Returns:
            Whether nothing is left of it that a later attempt could use.

        Raises:
            AuthError, NotFoundError, TransientIOError: by kind of fault.
        """
        ...


def open_sink(location: Location, scratch: Path) -> Sink:
    """Return the sink for a destination.

    Args:
        location: where the release goes.
        scratch: local directory for files on their way to a remote store.
    """
    from workers.releases.sinks.directory import DirectorySink  # noqa: PLC0415 - each kind loads its client only when used
    from workers.releases.sinks.hub import HubSink  # noqa: PLC0415
    from workers.releases.sinks.s3 import S3Sink  # noqa: PLC0415

    match location:
        case LocalPath():
            return DirectorySink(location)
        case S3Prefix():
            return S3Sink(location, scratch)
        case HubRepo():
            return HubSink(location, scratch)
