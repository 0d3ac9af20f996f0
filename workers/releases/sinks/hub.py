"""Releases in a Hub repository: large files are uploaded as they come, and one commit makes all of them visible."""

import hashlib
import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from jobs.errors import BadInputError, InternalError, NotFoundError, TransientIOError
from jobs.locations import HubRepo
from jobs.release import MANIFEST_NAME, Artifact, Manifest, Release
from workers.files.local import FileState, file_errors
from workers.files.scratch import OwnedDirectory, sweep
from workers.releases.occupied import is_taken, occupied
from workers.releases.released import (
    MAX_MANIFEST_BYTES,
    ManifestFile,
    changed,
    check_all_put,
    decode_existing,
    encode_manifest,
)
from workers.releases.sinks import Receipt, Ticket
from workers.releases.sinks.local_records import LocalRecords, sweep_unused
from workers.sources.belongings import CARD_NAME
from workers.sources.hub_client import HubStore

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEW = frozenset({".gitattributes", CARD_NAME})
"""What a fresh repository holds. A card that is there is a person's, and stays: the release then has none."""
_MEMORY_BYTES = 4 << 20
_NUM_TRIES = 3


class HubSink:
    """A branch of a model repository: missing, fresh, or holding a release."""

    def __init__(self, location: HubRepo, scratch: Path) -> None:
        if _COMMIT.fullmatch(location.revision):
            raise BadInputError(f"{location} names a commit, which cannot change; publish to a branch")
        self._store = HubStore(location)
        self._scratch = scratch

    def existing(self) -> Manifest | None:
        """Return the manifest of the release that is there, or None when the branch is free."""
        head = self._store.head()
        found = _find(self._store, head, self._store.sizes(head)) if head else None
        return found.manifest if found else None

    def open(self, merge_key: str) -> "HubStaging":
        """Start a release. Makes the repository when it is missing: private, and empty until the release is there."""
        with self._store.errors():
            self._store.api.create_repo(self._store.place.repo_id, private=True, exist_ok=True)
        return self._stage(None, merge_key, secrets.token_hex(8))

    def join(self, ticket: Ticket) -> "HubStaging":
        """Take part, in the same scratch directory where this process sees it, else in one of its own."""
        with file_errors(f"joining the staging directory of {self._store.place}"):
            owned = OwnedDirectory.join(ticket.directory)
        return self._stage(owned, ticket.merge_key, ticket.attempt)

    def clear(self, attempt: str | None, *, unused: bool) -> bool:  # noqa: ARG002 - the Hub tells of no attempt
        """Remove the scratch directories of the dead, but those with finished shards while nothing is published."""
        is_over = is_taken(self.existing)
        with file_errors(f"sweeping staging directories for {self._store.place}"):
            is_clear = sweep_unused(self._scratch, self._prefix, over=is_over)
        return is_clear or unused  # what waits in the scratch directory goes with the sweep of that

    @property
    def _prefix(self) -> str:
        return f"hub-{hashlib.sha256(str(self._store.place).encode()).hexdigest()[:16]}-"

    def _stage(self, owned: OwnedDirectory | None, merge_key: str, attempt: str) -> "HubStaging":
        head = self._store.head()
        if head is None:
            raise _deleted(self._store)
        sizes = self._store.sizes(head)
        existing = _find(self._store, head, sizes)
        is_new = owned is None
        with file_errors(f"making a staging directory for {self._store.place}"):
            owned = owned or OwnedDirectory.make(self._scratch, self._prefix)
        staging = HubStaging(
            self._store,
            owned,
            merge_key=merge_key,
            attempt=attempt,
            parent=head,
            existing=existing,
            has_card=CARD_NAME in sizes,
        )
        if is_new:
            with file_errors(f"sweeping staging directories for {self._store.place}"):
                sweep(self._scratch, self._prefix, gather=staging.records.gather)
        return staging


class HubStaging:
    """Files in a scratch directory; those too large for git are at the Hub already, in no commit."""

    in_place = False

    def __init__(
        self,
        store: HubStore,
        owned: OwnedDirectory,
        *,
        merge_key: str,
        attempt: str,
        parent: str,
        existing: ManifestFile | None,
        has_card: bool,
    ) -> None:
        """Take what `HubSink` has found.

        Args:
            store: the destination.
            owned: the scratch directory.
            merge_key: of the release.
            attempt: marks the commit of this release on its way.
            parent: the branch's newest commit.
            existing: the release it holds.
            has_card: whether it holds a model card.
        """
        self._store = store
        self._owned = owned
        self._merge_key = merge_key
        self._attempt = attempt
        self._parent = parent
        self._existing = existing
        self._has_card = has_card
        self.directory = owned.path
        self._put: dict[str, Artifact] = {}
        self._additions: dict[str, CommitOperationAdd] = {}
        self.records = LocalRecords(self.directory, merge_key, take=self._claim, drop=self._drop)

    @property
    def ticket(self) -> Ticket:
        """What another process needs to take part."""
        return Ticket(directory=self.directory, attempt=self._attempt, merge_key=self._merge_key)

    def put(self, artifact: Artifact, hashed_as: FileState | None = None) -> Receipt:  # noqa: ARG002 - it reads the file
        """Upload a file that is too large for git; keep a small one for the commit."""
        path = self.directory / artifact.path
        with file_errors(f"reading {path}", path):
            content = path.read_bytes() if path.stat().st_size <= _MEMORY_BYTES else path
        addition = CommitOperationAdd(artifact.path, content)
        with self._store.errors():
            self._store.api.preupload_lfs_files(
                self._store.place.repo_id, [addition], revision=self._store.place.revision
            )
            # Computed by the uploader from the very bytes it sent, or here from the bytes in memory.
            sha256 = addition.upload_info.sha256.hex()
        if (sha256, addition.upload_info.size) != (artifact.sha256, artifact.num_bytes):
            raise changed(path, sha256, artifact)
        receipt = Receipt(artifact=artifact, stored=addition)
        self.take(receipt)
        return receipt

    def take(self, receipt: Receipt) -> None:
        """Keep an addition for the commit: what it says of a large file is at the Hub already."""
        assert isinstance(receipt.stored, CommitOperationAdd)
        self._additions[receipt.artifact.path] = receipt.stored
        self._put[receipt.artifact.path] = receipt.artifact

    def publish(self, manifest: Manifest) -> Release:
        """Commit every file and `manifest.json` at once, on top of the commit that was looked at.

        A model card that the branch has already stays; the manifest that is committed, and returned, names none then.
        """
        check_all_put(manifest, self._put)
        if self._existing:
            return self._existing.settle(self._store.place, self._merge_key)
        num_tries = 0
        while True:
            encoded = encode_manifest(self._without_card(manifest) if self._has_card else manifest)
            try:
                return self._commit(encoded)
            except TransientIOError:  # another client has committed, or the answer was lost: what is there decides
                num_tries += 1
                if settled := self._look_again(encoded):
                    return settled
                if num_tries == _NUM_TRIES:
                    raise

    def discard(self, *, keep: bool = False) -> bool:
        """Leave the scratch directory. Uploaded files that are in no commit are the Hub's to collect."""
        return self.records.let_go(self._owned, keep=keep)

    def _claim(self, artifact: Artifact) -> Receipt | None:
        """Put a file once more: it is read and hashed as it was, and the Hub takes nothing that it has."""
        try:
            return self.put(artifact)
        except (InternalError, NotFoundError):
            return None

    def _drop(self, name: str) -> None:
        self._additions.pop(name, None)
        self._put.pop(name, None)

    def _commit(self, manifest: ManifestFile) -> Release:
        named = [self._additions[artifact.path] for artifact in manifest.manifest.files]
        additions = [*named, CommitOperationAdd(MANIFEST_NAME, manifest.data)]
        with self._store.errors():
            self._store.api.create_commit(
                self._store.place.repo_id,
                additions,
                commit_message=f"Release {manifest.manifest.request_id}",
                commit_description=f"merge key {self._merge_key}, attempt {self._attempt}",
                revision=self._store.place.revision,
                parent_commit=self._parent,
            )

        return manifest.release(self._store.place, created=True)

    @staticmethod
    def _without_card(manifest: Manifest) -> Manifest:
        files = tuple(artifact for artifact in manifest.files if artifact.path != CARD_NAME)
        return manifest.model_copy(update={"files": files})

    def _look_again(self, manifest: ManifestFile) -> Release | None:
        """Return the release that is there now, or None when the branch is still free."""
        head = self._store.head()
        if head is None:
            raise _deleted(self._store)
        self._parent = head
        sizes = self._store.sizes(head)
        found = _find(self._store, head, sizes)
        self._has_card = CARD_NAME in sizes
        if found is None:
            return None
        with self._store.errors():
            history = self._store.api.list_repo_commits(self._store.place.repo_id, revision=self._store.place.revision)
        if any(self._attempt in commit.message for commit in history):
            return manifest.release(self._store.place, created=True)
        return found.settle(self._store.place, self._merge_key)


def _deleted(store: HubStore) -> NotFoundError:
    return NotFoundError(f"{store.place} was deleted while it was published")


def _find(store: HubStore, commit: str, sizes: Mapping[str, int]) -> ManifestFile | None:
    if MANIFEST_NAME in sizes:
        if sizes[MANIFEST_NAME] > MAX_MANIFEST_BYTES:
            raise occupied(store.place, [MANIFEST_NAME], "a file too large to be the manifest of a release")
        return decode_existing(store.content(commit, MANIFEST_NAME), store.place)
    if foreign := sorted(sizes.keys() - _NEW):
        raise occupied(store.place, foreign, f"files, but no {MANIFEST_NAME}")
    return None
