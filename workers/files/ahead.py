"""Reading ahead: the system brings weights into its cache while this process still loads its libraries."""

import contextlib
import itertools
import os
from pathlib import Path

from jobs.errors import MergefleetError
from workers.files.foreign import open_foreign

_MAX_FILES = 1_000


def read_ahead(directory: Path) -> None:
    """Have the system read the safetensors files of a directory in the background; returns within milliseconds.

    Not more than half of the memory that nothing uses: what is read must still be there when its turn comes. What
    cannot be read is left alone, and told by its reader.

    Args:
        directory: of a base on this machine.
    """
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    with contextlib.suppress(OSError):
        for path in sorted(itertools.islice(directory.glob("*.safetensors"), _MAX_FILES)):
            with contextlib.suppress(MergefleetError):
                file = open_foreign(path, any_size=True)
                try:
                    if left <= 0:
                        return
                    num_bytes = min(left, file.state.num_bytes)
                    os.posix_fadvise(file.descriptor, 0, num_bytes, os.POSIX_FADV_WILLNEED)
                    left -= num_bytes
                finally:
                    file.close()
