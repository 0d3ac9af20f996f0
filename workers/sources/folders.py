"""What lies at a place of any kind, one level at a time: how patterns of request files are looked up."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from jobs.errors import NotFoundError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from jobs.request_files.local_folders import LocalFolders

if TYPE_CHECKING:
    from workers.sources.s3_client import S3Store


class Folders:
    """A `Listing` of directories, prefixes, and folders of repositories.

    A repository is listed once, at the commit that its revision means then: for one reading of a file, not for longer.
    """

    def __init__(self) -> None:
        self._local = LocalFolders()
        self._stores: dict[str, S3Store] = {}
        self._commits: dict[HubRepo, Mapping[str, int]] = {}

    def folders(self, place: Location) -> Collection[str]:
        """Return the names of the folders right below a place; see `Listing`."""
        match place:
            case LocalPath():
                return self._local.folders(place)
            case S3Prefix():
                return self._store(place).level()[0]
            case HubRepo():
                return {name.partition("/")[0] for name in self._below(place) if "/" in name}

    def files(self, place: Location) -> Mapping[str, int]:
        """Return names and sizes in bytes of the files right below a place; see `Listing`."""
        match place:
            case LocalPath():
                return self._local.files(place)
            case S3Prefix():
                return {entry.name: entry.num_bytes for entry in self._store(place).level()[1]}
            case HubRepo():
                return {name: size for name, size in self._below(place).items() if "/" not in name}

    def start(self, place: Location, name: str, num_bytes: int) -> bytes | None:
        """Return the first bytes of a file; see `Listing`. A commit on the Hub holds whole files."""
        match place:
            case LocalPath():
                return self._local.start(place, name, num_bytes)
            case S3Prefix():
                return self._store(place).content(name, num_bytes) or b""
            case HubRepo():
                return None

    def _store(self, place: S3Prefix) -> "S3Store":
        from workers.sources.s3_client import S3Store  # noqa: PLC0415 - loads boto3 only where there is S3

        if place.bucket not in self._stores:
            self._stores[place.bucket] = S3Store(place)
        return self._stores[place.bucket].at(place)

    def _below(self, place: HubRepo) -> Mapping[str, int]:
        whole = HubRepo(place.repo_id, place.revision)
        if whole not in self._commits:
            self._commits[whole] = _listed(whole)
        start = f"{place.path}/" if place.path else ""
        return {name.removeprefix(start): size for name, size in self._commits[whole].items() if name.startswith(start)}


def _listed(repo: HubRepo) -> Mapping[str, int]:
    from workers.sources.hub_client import HubStore  # noqa: PLC0415 - loads huggingface_hub only where there is a Hub

    store = HubStore(repo)
    commit = store.head()
    if commit is None:
        raise NotFoundError(f"{repo} does not exist, or HF_TOKEN may not see it")
    return store.sizes(commit)
