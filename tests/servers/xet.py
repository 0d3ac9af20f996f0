"""The large files of the loopback Hub, in `hf_xet`'s own local stores.

A local store admits one process at a time. Every upload and every reader therefore gets a directory of its own, and
nothing is deduplicated between uploads.
"""

import shutil
import struct
import threading
from dataclasses import dataclass, field
from pathlib import Path

_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_ENTRY_BYTES = 48
"""Header and entries of a Xet metadata shard all have this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class XetFile:
    """A file in a store."""

    store: str
    hash: str
    """Xet's own name for it, which readers ask for."""


@dataclass(slots=True, kw_only=True)
class XetStores:
    """The stores below one directory."""

    directory: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fresh(self) -> str:
        """Make an empty store, for one upload."""
        with self._lock:
            name = f"{len(list(self.directory.iterdir())):04d}"
            (self.directory / name).mkdir()
        return name

    def copy(self, store: str) -> str:
        """Copy a store, for one reader."""
        name = self.fresh()
        shutil.copytree(self.directory / store, self.directory / name, dirs_exist_ok=True)
        return name

    def url(self, store: str) -> str:
        """Return what a client is told to connect to."""
        return f"local://{self.directory / store}"

    def find(self, sha256: str) -> XetFile | None:
        """Return the file with this SHA-256, when one has been uploaded."""
        for shard in self.directory.glob("*/xet/xorbs/shards/*.mdb"):
            if found := _files(shard.read_bytes()).get(sha256):
                return XetFile(store=shard.relative_to(self.directory).parts[0], hash=found)
        return None


def _files(shard: bytes) -> dict[str, str]:
    """Return the Xet hash of every file of a metadata shard, by SHA-256."""
    files = {}
    offset = _ENTRY_BYTES
    while (raw := shard[offset : offset + 32]) != b"\xff" * 32:
        flags, num_entries = struct.unpack_from("<II", shard, offset + 32)
        offset += _ENTRY_BYTES * (1 + num_entries * (2 if flags & _WITH_VERIFICATION else 1))
        if flags & _WITH_SHA256:
            files[_hex(shard[offset : offset + 32])] = _hex(raw)
            offset += _ENTRY_BYTES
    return files


def _hex(digest: bytes) -> str:
    """Write a digest as Xet does: four little-endian 64-bit words."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", digest))
