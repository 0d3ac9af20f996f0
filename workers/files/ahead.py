"""Reading ahead: the system brings weights into its cache while this process still loads its libraries."""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from jobs.errors import MergefleetError
from workers.files.available import available_main_memory
from workers.files.foreign import open_foreign

_STEP_BYTES = 128 << 10
"""Of one request: Linux reads no more for it than the disk's window, which is this by default."""
_MAX_FILES = 1_000


@contextlib.contextmanager
def reading_ahead(directory: Path) -> Iterator[None]:
    """While this lasts, have the system read the safetensors files of a directory; no thread of it is left afterwards.

    Not more than half of the memory that this process may use: what is read must still be there when its turn comes.
    What cannot be read is left alone, and told by its reader.

    Args:
        directory: of a base on this machine.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_read, args=(directory, available_main_memory() // 2, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read(directory: Path, left: int, ended: threading.Event) -> None:
    with contextlib.suppress(OSError):
        for path in sorted(itertools.islice(directory.glob("*.safetensors"), _MAX_FILES)):
            with contextlib.suppress(MergefleetError):
                left -= _read_file(path, left, ended)


def _read_file(path: Path, most: int, ended: threading.Event) -> int:
    """Have at most so many bytes of a file read, and return how many."""
    file = open_foreign(path, any_size=True)
    try:
        num_bytes = min(most, file.state.num_bytes)
        for begin in range(0, num_bytes, _STEP_BYTES):
            if ended.is_set():
                break
            size = min(_STEP_BYTES, num_bytes - begin)
            os.posix_fadvise(file.descriptor, begin, size, os.POSIX_FADV_WILLNEED)
        return num_bytes
    finally:
        file.close()
