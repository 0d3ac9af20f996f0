"""Releases that begin as clones of the base's files, where blocks can be shared: the same bytes, fewer written."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import workers.files.shard
from tests.merges import plan_pass
from tests.models import build_llama, make_adapter
from workers.files.local import sha256_of
from workers.files.shard import ShardWriter

SIZE = 512 << 20


def make_xfs(place: Path) -> Path:
    """Mount an empty XFS, or skip the test where that cannot be done."""
    image, mounted = place / "image", place / "xfs"
    if os.geteuid() != 0 or shutil.which("mkfs.xfs") is None:
        pytest.skip("making an XFS takes root and mkfs.xfs")
    with image.open("wb") as file:
        file.truncate(SIZE)
    mounted.mkdir()
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], check=False).returncode != 0:
        pytest.skip("nothing can be mounted here")
    return mounted


def copy_instead(descriptor: int, request: int, source: int) -> int:
    """Do what a file system does that shares blocks, as far as it can be seen in the bytes."""
    assert request == workers.files.shard._FICLONE
    size = os.fstat(source).st_size
    assert os.pwrite(descriptor, os.pread(source, size, 0), 0) == size
    return 0


@pytest.fixture(params=["xfs", "copied"])
def place(request, tmp_path, monkeypatch):
    """Where files can be cloned, or seem so."""
    if request.param == "copied":
        monkeypatch.setattr(fcntl, "ioctl", copy_instead)
        yield tmp_path
        return
    mounted = make_xfs(tmp_path)
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.fixture
def base(place):
    """Three fifths of it are the embedding and its twin, which no adapter here changes."""
    return build_llama(place / "base", hidden_size=256, vocab_size=4096, tokenizer=False)


def test_what_stays_is_not_written_and_every_byte_is_as_ever(place, base):
    adapters = {"one": make_adapter(base, place / "one"), "two": make_adapter(base, place / "two", seed=5)}
    plain, cloned = (plan_pass(base, adapters, place / name) for name in ("plain", "cloned"))
    before = plain.run()
    after = cloned.run(direct=True, checked=True)
    assert before.errors == after.errors == {}
    for name, plan in zip(adapters, cloned.plans, strict=True):
        assert plan.kept
        assert plan.kept.isdisjoint(plan.changed)
        assert [file.artifact for file in after.files[name]] == [file.artifact for file in before.files[name]]
        assert all(check.num_bad_elements == 0 for check in after.checks[name])
        for shard in plan.output.shards:
            left, right = (each.output(name) / shard.name for each in (plain, cloned))
            assert left.read_bytes() == right.read_bytes()
    num_kept = sum(plan.output.tensors[name][1].num_bytes for plan in cloned.plans for name in plan.kept)
    assert after.bytes.written == before.bytes.written - num_kept
    assert 2 * num_kept > before.bytes.written


def test_an_adapter_that_changes_most_of_a_file_has_it_written(place):
    small = build_llama(place / "small", vocab_size=64, tokenizer=False)
    planned = plan_pass(small, {"one": make_adapter(small, place / "one")}, place / "out")
    assert planned.plans[0].kept == frozenset()
    assert planned.run(direct=True).errors == {}


def test_another_dtype_keeps_nothing(place, base):
    planned = plan_pass(base, {"one": make_adapter(base, place / "one")}, place / "out", dtype="float32")
    assert planned.plans[0].kept == frozenset()


@pytest.mark.parametrize("when", ["before the clone", "after it"])
@pytest.mark.parametrize("by", ["writing", "renaming"])
def test_of_a_base_that_changes_meanwhile_nothing_is_taken_on_trust(place, base, monkeypatch, when, by):
    planned = plan_pass(base, {"one": make_adapter(base, place / "one")}, place / "out")
    path = base / "model.safetensors"
    assert path.stat().st_size > 4 << 20  # of smaller files no state is told
    changed = path.read_bytes()[:-4] + b"\x12\x34\x56\x78"
    left = [True]

    def change(clone, *arguments):
        if when == "after it":
            clone(*arguments)
        if left:
            left.pop()
            target = path if by == "writing" else base / "new"
            target.write_bytes(changed)
            target.rename(path)
        if when == "before the clone":
            clone(*arguments)

    clone = ShardWriter._clone
    monkeypatch.setattr(ShardWriter, "_clone", lambda *arguments: change(clone, *arguments))
    (file,) = planned.run(direct=True, num_threads=1).files["one"]  # one thread reads the last tile after the first
    directory = planned.output("one")
    whole = sha256_of(directory / file.artifact.path) == file.artifact.sha256
    assert whole or not file.is_as_it_was(directory)  # and what is not as it was is read again before it is shipped
    assert when == "after it" or whole
    if (when, by) == ("after it", "writing"):
        assert not whole


def test_a_base_that_is_only_linked_meanwhile_is_no_fault(place, base, monkeypatch):
    planned = plan_pass(base, {"one": make_adapter(base, place / "one")}, place / "out")
    finish = ShardWriter._finish

    def link_and_finish(shard):
        os.link(base / "model.safetensors", base / "link")
        finish(shard)

    monkeypatch.setattr(ShardWriter, "_finish", link_and_finish)
    result = planned.run(direct=True)
    assert result.errors == {}
    (file,) = result.files["one"]
    assert sha256_of(planned.output("one") / file.artifact.path) == file.artifact.sha256


def test_without_clones_all_is_written(place, base, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    planned = plan_pass(base, {"one": make_adapter(base, place / "one")}, place / "out")
    result = planned.run(direct=True, checked=True)
    assert result.errors == {}
    assert result.bytes.written == planned.plans[0].output.total_size
    assert planned.check()["one"]
