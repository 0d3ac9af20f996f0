"""Places: what many jobs depend on and none of them can mend. A bucket, the Hub, a file system, a node."""

from collections.abc import Iterator
from pathlib import Path

from jobs.errors import InvalidValueError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix, parse_location
from jobs.request import MergeRequest

HUB = "hf://"
_FILES = "file://"
_NODE = "node:"
_EXPECTED = "a place: s3://bucket, hf://, a directory or node:NAME"


def bucket_place(bucket: str) -> str:
    """Return the place that a bucket is."""
    return f"s3://{bucket}"


def file_place(path: Path) -> str:
    """Return the place that a file system is, or a directory on it: `file:///mnt/releases`."""
    return f"{_FILES}{path}"


def node_place(node: str) -> str:
    """Return the place that a machine is: its own disks, and what runs there."""
    return f"{_NODE}{node}"


def place_of(location: Location) -> str:
    """Return the place that a location is in."""
    match location:
        case S3Prefix():
            return bucket_place(location.bucket)
        case HubRepo():
            return HUB
        case LocalPath():
            return file_place(location.path)


def is_covered(location: Location, place: str) -> bool:
    """Whether a location is in a place."""
    if place.startswith(_FILES):
        return isinstance(location, LocalPath) and location.path.is_relative_to(place.removeprefix(_FILES))
    return not isinstance(location, LocalPath) and place_of(location) == place


def locations_of(request: MergeRequest) -> Iterator[Location]:
    """Yield everything that a request reads from or writes to."""
    yield request.destination
    yield request.base
    for each in request.weighted:
        yield each.adapter


def parse_place(text: str) -> str:
    """Return a place as people write it: a bucket, `hf://`, a directory, `node:NAME`, or a location that is in it.

    Raises:
        InvalidValueError: it is none of these.
    """
    if text in (HUB, HUB.removesuffix("://")):
        return HUB
    if text == _NODE:
        raise InvalidValueError(_EXPECTED, repr(text))
    if text.startswith(_NODE):
        return text
    text = text.removeprefix(_FILES)
    if text.startswith("s3://") and "/" not in text.removeprefix("s3://").rstrip("/"):
        text = text.rstrip("/") + "/any"  # a bucket alone is no location
    try:
        return place_of(parse_location(text))
    except InvalidValueError as error:
        raise InvalidValueError(_EXPECTED, error.found) from error
