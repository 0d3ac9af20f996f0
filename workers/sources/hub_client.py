"""The one place where a Hub client is made, repositories are listed and read, and its many errors become ours.

The token is huggingface_hub's own business: `HF_TOKEN`, or the file that `hf auth login` writes. The endpoint is read
from `HF_ENDPOINT` when a client is made, not when huggingface_hub is imported.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, get_cached_repo_tree, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff
from huggingface_hub.utils.tqdm import disable_progress_bars

from jobs.errors import AuthError, BadInputError, MergefleetError, NoCapacityError, NotFoundError, TransientIOError
from jobs.locations import HubRepo
from jobs.places import HUB
from workers.files.local import translate_os_error

_QUERY = re.compile(r"\?[^\s'\")]+")
"""Signed URLs carry their signature there; no message may."""

_RANGE_SECONDS = 60.0
"""That a part of a file may let wait."""

_RAISED = (httpx2.HTTPError, OSError, RuntimeError, ValueError, EntryNotFoundError)
"""What huggingface_hub and hf_xet raise, HfHubHTTPError and Xet's ConnectionError among them."""

_BY_STATUS: dict[int, type[MergefleetError]] = {
    401: AuthError,
    403: AuthError,
    404: NotFoundError,
    408: TransientIOError,
    409: TransientIOError,
    412: TransientIOError,  # another client has committed
    429: TransientIOError,
    507: NoCapacityError,
}
_BY_TYPE: tuple[tuple[type[Exception], type[MergefleetError], str], ...] = (
    (GatedRepoError, AuthError, "is gated: ask for access on its page, and set HF_TOKEN"),
    (RepositoryNotFoundError, NotFoundError, "does not exist, or HF_TOKEN may not see it"),
    (RevisionNotFoundError, NotFoundError, "has no such revision: create it, or use main"),
    (OfflineModeIsEnabled, NotFoundError, "cannot be asked, as HF_HUB_OFFLINE is set, and is not in the cache"),
    (EntryNotFoundError, NotFoundError, "has no such file"),
    (PermissionError, AuthError, "refused the token: check HF_TOKEN, and what it is allowed to do"),
    (httpx2.HTTPError, TransientIOError, "did not answer: check HF_ENDPOINT and the network"),
    (ConnectionError, TransientIOError, "did not answer: check HF_ENDPOINT and the network"),
    (ValueError, BadInputError, "refused what was asked"),
)
"""The first that fits."""


class HubStore:
    """A client for one repository, or for a folder in one: names are then taken from there. For several threads."""

    def __init__(self, place: HubRepo) -> None:
        self.place = place
        disable_progress_bars()  # they would fill the logs of the workers
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, library_name="mergefleet")

    def file(self, name: str) -> str:
        """Return what the repository calls a file at this place."""
        return f"{self.place.path}/{name}" if self.place.path else name

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what huggingface_hub raises inside into our errors.

        Raises:
            NotFoundError, AuthError, NoCapacityError, TransientIOError, BadInputError, InternalError: by fault.
        """
        try:
            yield
        except _RAISED as error:
            raise self._translate(error) from error

    def head(self) -> str | None:
        """Return the commit that the revision means now, or None when there is no such repository.

        Raises:
            NotFoundError: there is the repository, but not the revision.
        """
        with self.errors():
            try:
                return self.api.repo_info(self.place.repo_id, revision=self.place.revision).sha
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return None

    def sizes(self, commit: str) -> dict[str, int]:
        """Return names and sizes in bytes of all files of a commit that are at this place or below it."""
        with self.errors():
            tree = self.api.list_repo_tree(self.place.repo_id, revision=commit, recursive=True)
            return self._below((entry.path, entry.size) for entry in tree if isinstance(entry, RepoFile))

    def content(self, commit: str, name: str) -> bytes:
        """Return the bytes of a small file, through huggingface_hub's cache."""
        with self.errors():
            path = self.api.hf_hub_download(self.place.repo_id, self.file(name), revision=commit)
            return Path(path).read_bytes()

    def read_start(self, commit: str, name: str, num_bytes: int) -> bytes:
        """Return the first bytes of a file, by one request for a range, past all caches."""
        url = hf_hub_url(self.place.repo_id, name, revision=commit, endpoint=self.api.endpoint)
        headers = {**build_hf_headers(library_name="mergefleet"), "Range": f"bytes=0-{num_bytes - 1}"}
        with self.errors():
            data = bytearray()
            with http_stream_backoff("GET", url, headers=headers, timeout=_RANGE_SECONDS) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_bytes():  # an answer may be the whole file, of which the rest is not read
                    data += chunk
                    if len(data) >= num_bytes:
                        break
            return bytes(data[:num_bytes])

    def fetch(self, commit: str, name: str, directory: Path) -> Path:
        """Download one file into a directory, past all caches.

        Returns:
            Where it is: `<directory>/<name>`, below the folder of this place.
        """
        with self.errors():
            return Path(
                self.api.hf_hub_download(
                    self.place.repo_id, self.file(name), revision=commit, local_dir=directory, force_download=True
                )
            )

    def snapshot(self, allow: list[str], ignore: list[str]) -> Path:
        """Bring files of the revision into huggingface_hub's cache; offline, find them there.

        Args:
            allow: patterns of the files to bring, named from the top of the repository.
            ignore: patterns of files to leave out all the same.

        Returns:
            The directory of the snapshot; its name is the commit.
        """
        with self.errors():
            return Path(
                snapshot_download(
                    self.place.repo_id,
                    revision=self.place.revision,
                    endpoint=self.api.endpoint,
                    allow_patterns=allow,
                    ignore_patterns=ignore,
                )
            )

    def listed(self, commit: str) -> dict[str, int]:
        """Return what `sizes` does, of a commit that was brought into the cache, without asking the Hub."""
        try:
            tree = get_cached_repo_tree(self.place.repo_id, revision=commit)
        except CachedRepoTreeNotFoundError:
            return {}
        return self._below((entry.path, entry.size) for entry in tree)

    def _below(self, entries: Iterable[tuple[str, int]]) -> dict[str, int]:
        """Return entries of the repository that are at this place or below it, named from here."""
        start = self.file("")
        return {path.removeprefix(start): size for path, size in entries if path.startswith(start)}

    def _translate(self, error: Exception) -> MergefleetError:
        if isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, _RAISED):
            return self._translate(error.__cause__)  # these say only that something else went wrong
        if isinstance(error, OSError) and error.errno is not None:
            return translate_os_error(error, str(self.place))
        kind, hint = next(
            ((kind, hint) for known, kind, hint in _BY_TYPE if isinstance(error, known)), (TransientIOError, "failed")
        )
        if isinstance(error, HfHubHTTPError) and kind is TransientIOError:
            status = error.response.status_code
            kind = _BY_STATUS.get(status) or (TransientIOError if status >= 500 else BadInputError)
            hint = f"answered {status}" + (
                "; check HF_TOKEN, and what it is allowed to do" if kind is AuthError else ""
            )
        text = " ".join(_QUERY.sub("", str(error)).split())
        ours = kind(f"{self.place} at {self.api.endpoint} {hint} ({text})")
        return ours.at(HUB) if _is_of_the_hub(error, ours) else ours


def _is_of_the_hub(error: Exception, ours: MergefleetError) -> bool:
    """Whether an error is the Hub's, and not that of one repository."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    is_of_the_repository = isinstance(error, GatedRepoError) or status in (
        HTTPStatus.CONFLICT,
        HTTPStatus.PRECONDITION_FAILED,
    )
    return isinstance(ours, AuthError | NoCapacityError | TransientIOError) and not is_of_the_repository
