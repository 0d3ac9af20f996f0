"""Three kinds of destination, seen with other eyes than the sink's: the file system, plain boto3, the Hub's state."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from jobs.release import MANIFEST_NAME
from tests.servers.hub import Hub
from tests.servers.s3 import S3Server
from workers.releases.sinks import Sink, open_sink
from workers.releases.trails import TRAILS


class Place(Protocol):
    """A destination that is free at first."""

    location: Location
    scratch: Path

    def visible(self) -> dict[str, bytes]:
        """Return what a reader sees there."""
        ...

    def leftovers(self) -> list[str]:
        """Return what a staging has left anywhere."""
        ...

    def is_busy(self) -> bool:
        """Whether bytes of a file that is being put have gone to where the place keeps them."""
        ...

    def write(self, name: str, data: bytes | None) -> None:
        """Change one file behind the sink's back; None removes it."""
        ...


class DirectoryPlace:
    """A directory."""

    def __init__(self, directory: Path) -> None:
        self.location = LocalPath(directory / "releases" / "r1")
        self.scratch = directory / "scratch"

    def visible(self) -> dict[str, bytes]:
        root = self.location.path
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def leftovers(self) -> list[str]:
        parent = self.location.path.parent
        return [path.name for path in parent.iterdir() if path != self.location.path] if parent.exists() else []

    def is_busy(self) -> bool:
        return any(path.stat().st_size for path in self.location.path.parent.glob(".*/*"))

    def write(self, name: str, data: bytes | None) -> None:
        path = self.location.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink() if data is None else path.write_bytes(data)


class S3Place:
    """A prefix of a bucket; its neighbours have names that begin alike, and must be left alone."""

    def __init__(self, directory: Path, server: S3Server, prefix: str) -> None:
        self.location = S3Prefix(server.bucket, prefix)
        self.scratch = directory / "scratch"
        self.server = server
        self.client = server.client()
        self._at = {"Bucket": server.bucket}

    def visible(self) -> dict[str, bytes]:
        start = f"{self.location.prefix}/"
        listed = self.client.list_objects_v2(**self._at, Prefix=start).get("Contents", [])
        keys = [entry["Key"] for entry in listed]
        return {key.removeprefix(start): self.client.get_object(**self._at, Key=key)["Body"].read() for key in keys}

    def uploads(self) -> list[tuple[str, str]]:
        found = self.client.list_multipart_uploads(**self._at, Prefix=f"{self.location.prefix}/").get("Uploads", [])
        return [(entry["Key"], entry["UploadId"]) for entry in found]

    def begin_upload(self, name: str) -> tuple[str, str]:
        """Begin an upload as another program would: key and id."""
        key = f"{self.location.prefix}/{name}"
        upload = self.client.create_multipart_upload(**self._at, Key=key)["UploadId"]
        self.client.upload_part(**self._at, Key=key, UploadId=upload, PartNumber=1, Body=b"theirs")
        return key, upload

    def leftovers(self) -> list[str]:
        return [key for key, _ in self.uploads()] + _names(self.scratch)

    def is_busy(self) -> bool:
        parts = (self.client.list_parts(**self._at, Key=key, UploadId=upload) for key, upload in self.uploads())
        return any("Parts" in listed for listed in parts)

    def write(self, name: str, data: bytes | None) -> None:
        key = f"{self.location.prefix}/{name}"
        if data is None:
            self.client.delete_object(**self._at, Key=key)
        else:
            self.client.put_object(**self._at, Key=key, Body=data)


class HubPlace:
    """A repository that does not exist yet."""

    def __init__(self, directory: Path, hub: Hub, name: str) -> None:
        self.location = HubRepo(f"org/{name}")
        self.scratch = directory / "scratch"
        self.hub = hub
        self._old_stores = frozenset(hub.xet.directory.iterdir())

    def visible(self) -> dict[str, bytes]:
        import huggingface_hub

        if self.location.repo_id not in self.hub.repos:
            return {}
        names = self.hub.repos[self.location.repo_id][-1].files.keys() - {".gitattributes"}
        if not names:
            return {}
        target = self.scratch.parent / "seen"
        huggingface_hub.snapshot_download(
            self.location.repo_id, endpoint=self.hub.endpoint, local_dir=target, cache_dir=target
        )
        seen = {name: (target / name).read_bytes() for name in names}
        shutil.rmtree(target)
        return seen

    def leftovers(self) -> list[str]:
        return _names(self.scratch)

    def is_busy(self) -> bool:
        stores = frozenset(self.hub.xet.directory.iterdir()) - self._old_stores
        return any(path.is_file() for store in stores for path in store.rglob("*"))

    def write(self, name: str, data: bytes | None) -> None:
        if self.location.repo_id not in self.hub.repos:
            self.hub.create(self.location.repo_id)
        commit = self.hub.commit(self.location.repo_id, "by hand", {} if data is None else {name: self.hub.keep(data)})
        if data is None:
            del commit.files[name]


def sink_of(place: Place) -> Sink:
    """Return a sink for a place, with a client of its own."""
    return open_sink(place.location, place.scratch)


def content(place: Place) -> dict[str, bytes]:
    """Return what a reader sees there, without the manifest."""
    return {name: data for name, data in place.visible().items() if name != MANIFEST_NAME}


def trails(place: Place) -> list[str]:
    """Return the names of trails, without those of their locks."""
    return [path.name for path in (place.scratch / TRAILS).glob("*") if path.suffix != ".lock"]


def _names(directory: Path) -> list[str]:
    """Return what a directory holds, but trails."""
    return [path.name for path in directory.iterdir() if path.name != TRAILS] if directory.exists() else []


_PUTTING = """
import sys
from pathlib import Path
from jobs.locations import parse_location
from jobs.release import Artifact
from workers.releases.sinks import open_sink

staging = open_sink(parse_location(sys.argv[1]), Path(sys.argv[2])).open("a" * 64)
with (staging.directory / "model.safetensors").open("wb") as file:
    file.truncate(1 << 30)
staging.put(Artifact(path="model.safetensors", num_bytes=1 << 30, sha256="0" * 64))
"""


@contextlib.contextmanager
def putting_process(place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process that takes seconds to put one large file."""
    command = [sys.executable, "-c", _PUTTING, str(place.location), str(place.scratch)]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


_DYING = """
import sys
from pathlib import Path
from jobs.locations import parse_location
from tests.releases import FILES, KEY, fill, record_of
from workers.releases.sinks import open_sink, s3_objects
from workers.releases.trails import Trail

s3_objects.MIN_PART_BYTES = 5 << 20
location, scratch = parse_location(sys.argv[1]), Path(sys.argv[2])
trail = Trail.begin(scratch, location) if sys.argv[3] == "True" else None
staging = open_sink(location, scratch).open(KEY)
if trail is not None:
    trail.name(staging.ticket.attempt)
fill(staging, FILES)
for name in sys.argv[4:]:
    staging.records.keep(record_of(name))
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def dying_process(place: Place, *names: str, trail: bool = False) -> Iterator[Callable[[], None]]:
    """Run an attempt that has put everything, and recorded some shards; yield what kills it.

    Args:
        place: where it is on its way to.
        names: of the shards.
        trail: whether it leaves a trail.
    """
    command = [sys.executable, "-c", _DYING, str(place.location), str(place.scratch), str(trail), *names]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def kill() -> None:
        process.kill()
        assert process.wait() == -signal.SIGKILL

    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield kill
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)
