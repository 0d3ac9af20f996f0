"""Directories outlive neither their owner nor the next sweep, and living ones are never swept."""

import fcntl
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from workers.files import scratch
from workers.files.scratch import OwnedDirectory, exclusive, sweep

_OWNER = """
import sys
from pathlib import Path
from workers.files import scratch
from workers.files.scratch import OwnedDirectory

owned = OwnedDirectory.make(Path(sys.argv[1]), sys.argv[2])
(owned.path / "nested").mkdir()
(owned.path / "nested" / "file").write_text("x")
print(owned.path, flush=True)
sys.stdin.read()
"""


def start_owner(parent: Path, prefix: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _OWNER, str(parent), prefix],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_remove_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    owned = OwnedDirectory.make(tmp_path / "made", "job-")
    (owned.path / "file").write_text("x")
    owned.leave()
    owned.leave()
    assert list((tmp_path / "made").iterdir()) == []


def test_a_directory_lives_as_long_as_one_of_its_owners(tmp_path: Path) -> None:
    process, theirs = start_owner(tmp_path, "job-")
    joined = OwnedDirectory.join(theirs)
    also = OwnedDirectory.join(theirs)
    assert joined is not None
    assert also is not None
    stop(process)
    assert sweep(tmp_path, "job-") == []
    joined.leave()
    assert (theirs / "nested" / "file").read_text() == "x"
    also.leave()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_here_cannot_be_joined(tmp_path: Path) -> None:
    process, theirs = start_owner(tmp_path, "job-")
    stop(process)
    sweep(tmp_path, "job-")
    assert OwnedDirectory.join(theirs) is None
    assert OwnedDirectory.join(tmp_path / "another-machine" / "job-1") is None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_being_swept_cannot_be_joined(tmp_path: Path) -> None:
    process, theirs = start_owner(tmp_path, "job-")
    stop(process)
    sweeper = os.open(theirs.with_name(f"{theirs.name}.lock"), os.O_RDWR)
    fcntl.flock(sweeper, fcntl.LOCK_EX)
    assert OwnedDirectory.join(theirs) is None
    os.close(sweeper)


def test_only_directories_of_the_dead_are_swept(tmp_path: Path) -> None:
    process, theirs = start_owner(tmp_path, "job-")
    ours = OwnedDirectory.make(tmp_path, "job-")
    assert sweep(tmp_path, "job-") == []

    stop(process)

    assert sweep(tmp_path, "job-") == [theirs]
    assert sorted(path.name for path in tmp_path.iterdir()) == [ours.path.name, f"{ours.path.name}.lock"]
    ours.leave()


@pytest.mark.parametrize(
    ("prefix", "others"),
    [("job-1-", "job-1-0-"), ("*-", "x-"), ("[ab]", "a"), (".r.staging-", ".r.staging-x.staging-")],
)
def test_prefixes_are_taken_to_the_letter(tmp_path: Path, prefix: str, others: str) -> None:
    process, theirs = start_owner(tmp_path, others)
    stop(process)
    assert sweep(tmp_path, prefix) == []
    assert sweep(tmp_path, others) == [theirs]


def test_sweeping_where_there_is_nothing(tmp_path: Path) -> None:
    assert sweep(tmp_path / "missing", "job-") == []


def test_what_cannot_be_removed_stays_for_a_later_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process, theirs = start_owner(tmp_path, "job-")
    stop(process)
    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", lambda *_, **__: None)
        assert sweep(tmp_path, "job-") == []
    assert sweep(tmp_path, "job-") == [theirs]


@pytest.mark.parametrize("finished", [True, False], ids=["swept", "being-swept"])
def test_sweeper_between_the_making_and_the_locking_of_a_lock_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: bool
) -> None:
    try_lock = scratch._try_lock
    sweeper = []

    def interrupted(lock: int, kind: int) -> bool:
        if not sweeper:
            sweeper.append(os.open(next(tmp_path.iterdir()), os.O_RDWR))
            assert try_lock(sweeper[0], fcntl.LOCK_EX)
            if finished:
                next(tmp_path.iterdir()).unlink()
                os.close(sweeper[0])
        return try_lock(lock, kind)

    monkeypatch.setattr(scratch, "_try_lock", interrupted)
    owned = OwnedDirectory.make(tmp_path, "job-")

    assert owned.path.with_name(f"{owned.path.name}.lock").exists()
    assert sweep(tmp_path, "job-") == []
    owned.leave()
    if not finished:
        os.close(sweeper[0])
        sweep(tmp_path, "job-")
    assert list(tmp_path.iterdir()) == []


def _own_and_check(parent: str, num_rounds: int) -> None:
    for _ in range(num_rounds):
        owned = OwnedDirectory.make(Path(parent), "job-")
        (owned.path / "file").write_text("x")
        time.sleep(0)
        assert (owned.path / "file").read_text() == "x"
        owned.leave()


def test_owners_and_a_sweeper_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    owners = [context.Process(target=_own_and_check, args=(str(tmp_path), 200)) for _ in range(2)]
    for owner in owners:
        owner.start()
    while any(owner.is_alive() for owner in owners):
        sweep(tmp_path, "job-")
    for owner in owners:
        owner.join()
        assert owner.exitcode == 0
    sweep(tmp_path, "job-")
    assert list(tmp_path.iterdir()) == []


def test_one_at_a_time_in_one_process_too(tmp_path: Path) -> None:
    inside, most = 0, 0

    def enter() -> None:
        nonlocal inside, most
        with exclusive(tmp_path / "deep" / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
