"""What an errno means to somebody who has to act on it."""

import errno
import os
from pathlib import Path

import pytest

from jobs.errors import AuthError, BadInputError, MergefleetError, NoCapacityError, NotFoundError, TransientIOError
from workers.files.local import file_errors


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFoundError),
        (errno.EACCES, AuthError),
        (errno.EPERM, AuthError),
        (errno.EROFS, TransientIOError),
        (errno.ENOSPC, NoCapacityError),
        (errno.EDQUOT, NoCapacityError),
        (errno.EIO, TransientIOError),
        (errno.ESTALE, TransientIOError),
        (errno.EMFILE, TransientIOError),
        (errno.ENOTDIR, BadInputError),
        (errno.EISDIR, BadInputError),
        (errno.ENAMETOOLONG, BadInputError),
    ],
)
def test_errno_decides(number: int, kind: type[MergefleetError]) -> None:
    with (
        pytest.raises(MergefleetError, match=r"reading base /b: .*: /b/config\.json") as caught,
        file_errors("reading base /b"),
    ):
        raise OSError(number, os.strerror(number), "/b/config.json")
    assert type(caught.value) is kind


def test_full_disk() -> None:
    with pytest.raises(NoCapacityError, match="free some space"), file_errors("writing /dev/full"):
        Path("/dev/full").write_bytes(b"x")
