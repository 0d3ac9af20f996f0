"""What an errno means to somebody who has to act on it."""

import errno
import os
from pathlib import Path

import pytest

from jobs.errors import AuthError, BadInputError, MergefleetError, NoCapacityError, NotFoundError, TransientIOError
from jobs.places import file_place
from workers.files.local import file_errors, mount_point


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this machine")
def test_an_open_file_that_names_none_is_of_the_file_system_it_is_on() -> None:
    path = Path("/dev/full")
    with pytest.raises(NoCapacityError) as caught, file_errors(f"writing {path}", path), path.open("wb", 0) as file:
        file.write(b"x")
    assert caught.value.place == file_place(mount_point(path))


def test_what_was_copied_to_is_at_fault_where_two_files_are_named(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "full", "/proc/version", None, str(tmp_path / "copy"))
    with pytest.raises(NoCapacityError) as caught, file_errors("copying", Path("/proc")):
        raise error
    assert caught.value.place == file_place(mount_point(tmp_path))
