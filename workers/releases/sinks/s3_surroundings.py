"""What lies at, above and below a prefix of an S3 store: a release, what our own attempts left, or what others keep."""

import logging
from collections.abc import Callable, Collection

from jobs.errors import AuthError, DestinationOccupiedError
from jobs.release import MANIFEST_NAME
from workers.releases.occupied import holds_below, lies_inside, occupied
from workers.releases.released import MAX_MANIFEST_BYTES, ManifestFile, decode_existing, is_release
from workers.releases.sinks.s3_objects import StoredObject, destination_digest, look_at
from workers.sources.s3_client import S3Store

_log = logging.getLogger(__name__)


def find_release(store: S3Store) -> ManifestFile | None:
    """Return the manifest at a prefix, or None when there is none.

    Raises:
        DestinationOccupiedError: it is that of something else.
    """
    data = store.content(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    return None if data is None else decode_existing(data, store.place)


def refuse_above(store: S3Store) -> None:
    """Refuse a prefix inside of a release, as far as the credentials may look.

    Raises:
        DestinationOccupiedError: names the release.
    """
    for place in store.place.ancestors():
        above = store.at(place)
        try:
            data = above.content(MANIFEST_NAME, MAX_MANIFEST_BYTES)
        except AuthError:  # those for one prefix may not look above it, or not ask whether there is anything
            _log.info("whether there is a release cannot be told", extra={"place": str(place)})
            continue
        if data is not None and is_release(data):
            raise lies_inside(store.place, place)


def own_below(store: S3Store, besides: Collection[str] = ()) -> dict[str, StoredObject]:
    """Return what attempts at this destination left, by name.

    Args:
        store: the destination.
        besides: names that are known, and not looked at.

    Raises:
        DestinationOccupiedError: there is something else; a release is named first.
    """
    names = sorted(
        store.objects().keys() - set(besides), key=lambda name: (not name.endswith(f"/{MANIFEST_NAME}"), name)
    )
    digest = destination_digest(store)
    own = {}
    for path in names:
        found = look_at(store, path)
        if found is None:
            continue
        if found.mark is None or found.mark.destination != digest:
            if path.endswith(f"/{MANIFEST_NAME}"):
                data = store.content(path, MAX_MANIFEST_BYTES)
                if data is not None and is_release(data):
                    raise holds_below(store.place, store.place.child(path.removesuffix(f"/{MANIFEST_NAME}")))
            raise occupied(store.place, [path], f"files, but no {MANIFEST_NAME}")
        own[path] = found
    return own


def attempt_below(store: S3Store, attempt: str | None) -> dict[str, StoredObject]:
    """Return the objects that one attempt at this destination has made, by name; others are passed over."""
    digest = destination_digest(store)
    looked = {path: look_at(store, path) for path in store.objects()} if attempt else {}
    return {
        path: found
        for path, found in looked.items()
        if found and found.mark and (found.mark.destination, found.mark.attempt) == (digest, attempt)
    }


def delete_unnamed(store: S3Store, names: Collection[str], is_own: Callable[[str, StoredObject], bool]) -> None:
    """Delete objects of an attempt that no manifest names.

    Args:
        store: the destination.
        names: that the attempt may have made.
        is_own: says of a name, and what the store says of it, whether the attempt has made it.
    """
    try:
        found = find_release(store)
    except DestinationOccupiedError:  # a manifest that is not ours names nothing of ours
        found = None
    named = {artifact.path for artifact in found.manifest.files} if found else set()
    for path in set(names) - named:
        there = look_at(store, path)
        if there is not None and is_own(path, there):
            store.delete(path, there.etag)
