"""What lies around a destination and belongs to others: published releases, files, and on S3 unfinished uploads."""

from jobs.locations import HubRepo, LocalPath
from tests.contract.places import DirectoryPlace, HubPlace, Place, S3Place, sink_of
from tests.releases import SHARD, fill, make_files
from workers.releases.delivery import verify_release

KEY = "a" * 64
FILES = make_files()
SMALL_FILES = {name: data for name, data in FILES.items() if name != SHARD}


def publish(place: Place, files: dict[str, bytes] = SMALL_FILES, merge_key: str = KEY) -> None:
    """Publish a release there."""
    staging = sink_of(place).open(merge_key)
    try:
        assert staging.publish(fill(staging, files, merge_key)).created
    finally:
        staging.discard()


def beside(place: Place, suffix: str) -> Place:
    """Return a place whose name begins as this one's does."""
    match place:
        case DirectoryPlace():
            other = DirectoryPlace(place.scratch.parent)
            other.location = LocalPath(place.location.path.with_name(place.location.name + suffix))
            return other
        case S3Place():
            return S3Place(place.scratch.parent, place.server, f"{place.location.prefix}{suffix}")
        case HubPlace():
            return HubPlace(place.scratch.parent, place.hub, f"{place.location.name}{suffix}")
    raise TypeError(place)


def below(place: Place, name: str) -> Place:
    """Return a place inside of this one."""
    match place:
        case DirectoryPlace():
            other = DirectoryPlace(place.scratch.parent)
            other.location = LocalPath(place.location.path / name)
            return other
        case S3Place():
            return S3Place(place.scratch.parent, place.server, f"{place.location.prefix}/{name}")
    raise TypeError(place)


class Neighbours:
    """Releases of the very same merge key, files and uploads of others, beside a place and above it."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._releases = [beside(place, suffix) for suffix in ("-other", "2")]
        for neighbour in self._releases:
            publish(neighbour)
        self._files = beside(place, ".bak")
        self._files.write("model.safetensors", b"theirs")
        self.uploads: list[tuple[str, str]] = []
        if isinstance(place, S3Place):
            # Below the prefix as well, even for a file that the release will have.
            self.uploads = [place.begin_upload(name) for name in (SHARD, "deeper/weights.bin")]
            self.uploads += [near.begin_upload(SHARD) for near in self._releases if isinstance(near, S3Place)]
            place.client.put_object(Bucket=place.location.bucket, Key=f"{place.location.prefix}.txt", Body=b"theirs")
        self._seen = self._look()

    def check(self) -> None:
        """Check that all of it is as it was."""
        assert self._look() == self._seen
        for neighbour in self._releases:
            verify_release(neighbour.location, neighbour.scratch)

    def _look(self) -> list[object]:
        seen: list[object] = [near.visible() for near in (*self._releases, self._files)]
        match self._place:
            case DirectoryPlace():
                around = {near.location.path for near in (*self._releases, self._files, self._place)}  # type: ignore[attr-defined]
                parent = self._place.location.path.parent
                return [*seen, [path for path in parent.iterdir() if path not in around and path.name[0] != "."]]
            case S3Place():
                at = {"Bucket": self._place.location.bucket}
                text = self._place.client.get_object(**at, Key=f"{self._place.location.prefix}.txt")["Body"].read()
                parts = [
                    self._place.client.list_parts(**at, Key=key, UploadId=upload)["Parts"][0]["Size"]
                    for key, upload in self.uploads
                ]
                return [*seen, text, parts]
            case HubPlace():
                ids = [near.location.repo_id for near in self._releases if isinstance(near.location, HubRepo)]
                return [*seen, [[commit.oid for commit in self._place.hub.repos[repo_id]] for repo_id in ids]]
        return seen
