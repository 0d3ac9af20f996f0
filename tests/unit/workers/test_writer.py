"""Shard files: written in any order by several threads, hashed on the way, and nothing left open."""

import errno
import hashlib
import itertools
import os
import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import BadInputError, CancelledError, NoCapacityError
from jobs.release import Artifact
from tests.merges import open_descriptors
from workers.checkpoint import lay_out
from workers.files import FileState
from workers.writer import CheckpointWriter


@pytest.fixture
def hashing():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def write_tensors(writer, layout, contents, *, pieces=1, seed=0, num_threads=3):
    """Write all tensors, each in some pieces, in random order by several threads."""
    work = []
    for shard in layout.shards:
        for spec in shard.tensors:
            cuts = [spec.num_bytes * piece // pieces for piece in range(pieces + 1)]
            work += [(spec.name, begin, end) for begin, end in itertools.pairwise(cuts)]
    random.Random(seed).shuffle(work)

    def write(item):
        name, begin, end = item
        shard, spec = writer.locate(name)
        shard.write(spec.begin + begin, contents[name][begin:end])

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(write, work))


def finish(writer, hashing):
    hashing.shutdown()
    artifacts = writer.finished()
    writer.close()
    return artifacts


def true_artifacts(directory):
    return tuple(
        Artifact(path=path.name, num_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.iterdir())
    )


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=8),
    limit=st.none() | st.integers(1, 600),
    pieces=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_files_and_digests_are_right_in_any_order(tmp_path_factory, sizes, limit, pieces, seed):
    directory = tmp_path_factory.mktemp("shards")
    layout = lay_out([(f"t{n}", torch.uint8, (size,)) for n, size in enumerate(sizes)], limit)
    contents = {f"t{n}": random.Random(seed + n).randbytes(size) for n, size in enumerate(sizes)}
    told = []
    hashing = ThreadPoolExecutor(2)
    writer = CheckpointWriter(directory, layout, hashing, told.append)
    write_tensors(writer, layout, contents, pieces=pieces, seed=seed)
    artifacts = finish(writer, hashing)
    assert artifacts == true_artifacts(directory)
    assert sorted((file.artifact for file in told), key=lambda artifact: artifact.path) == list(artifacts)
    for shard in layout.shards:
        expected = shard.header + b"".join(contents[spec.name] for spec in shard.tensors)
        assert (directory / shard.name).read_bytes() == expected


def test_a_large_file_is_hashed_while_it_is_written(tmp_path):
    num_bytes = 48 << 20
    layout = lay_out([("large", torch.uint8, (num_bytes,))], None)
    content = random.Random(0).randbytes(num_bytes)
    hashing = ThreadPoolExecutor(1)
    told = []
    writer = CheckpointWriter(tmp_path, layout, hashing, told.append)
    shard, spec = writer.locate("large")
    shard.write(spec.begin, content[: 40 << 20])
    deadline = time.monotonic() + 30
    while shard._num_hashed < 40 << 20:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    shard.write(spec.begin + (40 << 20), content[40 << 20 :])
    assert finish(writer, hashing) == true_artifacts(tmp_path)
    path = tmp_path / "model.safetensors"
    assert told[0].state == FileState.of(path.stat())
    with path.open("r+b") as file:  # the very next write shows
        file.write(b"x")
    assert told[0].state != FileState.of(path.stat())


def test_a_file_is_finished_once_though_an_empty_tensor_comes_last(tmp_path, hashing):
    layout = lay_out([("full", torch.uint8, (10,)), ("empty", torch.uint8, (0,))], None)
    finished = threading.Event()
    told = []

    def on_file(file):
        told.append(file.artifact.path)
        finished.set()

    writer = CheckpointWriter(tmp_path, layout, hashing, on_file)
    shard, spec = writer.locate("full")
    shard.write(spec.begin, bytes(10))
    assert finished.wait(10)
    shard, spec = writer.locate("empty")
    shard.write(spec.begin, b"")
    assert finish(writer, hashing) == true_artifacts(tmp_path)
    assert told == ["model.safetensors"]


def test_a_finished_file_holds_no_descriptor(tmp_path, hashing):
    layout = lay_out([(f"t{n}", torch.uint8, (10,)) for n in range(30)], 10)
    before = open_descriptors()
    finished = threading.Semaphore(0)
    writer = CheckpointWriter(tmp_path, layout, hashing, lambda _: finished.release())
    for shard in layout.shards:
        file, spec = writer.locate(shard.tensors[0].name)
        file.write(spec.begin, bytes(10))
        assert finished.acquire(timeout=10)
        assert open_descriptors() == before
    assert len(finish(writer, hashing)) == 30


def test_an_unfinished_checkpoint_is_closed_as_it_is(tmp_path, hashing):
    layout = lay_out([(f"t{n}", torch.uint8, (10,)) for n in range(4)], 20)
    before = open_descriptors()
    writer = CheckpointWriter(tmp_path, layout, hashing, lambda _: None)
    for name in ("t0", "t2"):
        shard, spec = writer.locate(name)
        shard.write(spec.begin, bytes(10))
    writer.fail(CancelledError("stop"))
    hashing.shutdown()
    assert writer.finished() == ()
    writer.close()
    writer.close()
    assert open_descriptors() == before


def test_an_error_of_the_listener_fails_the_job(tmp_path, hashing):
    layout = lay_out([("t", torch.uint8, (10,))], None)

    def refuse(file):
        raise NoCapacityError(f"no room for {file.artifact.path}")

    writer = CheckpointWriter(tmp_path, layout, hashing, refuse)
    shard, spec = writer.locate("t")
    shard.write(spec.begin, bytes(10))
    finish(writer, hashing)
    assert str(writer.error) == "no room for model.safetensors"


def test_the_first_error_is_kept(tmp_path, hashing):
    writer = CheckpointWriter(tmp_path, lay_out([("t", torch.uint8, (1,))], None), hashing, lambda _: None)
    writer.fail(BadInputError("first"))
    writer.fail(BadInputError("second"))
    assert str(writer.error) == "first"


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path, hashing, monkeypatch, num_threads):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_descriptors()
    writer = CheckpointWriter(tmp_path, lay_out([("t", torch.uint8, (10,))], None), hashing, lambda _: None)

    def locate(_):
        with pytest.raises(NoCapacityError, match=r"model\.safetensors"):
            writer.locate("t")

    # Every thread that wants the file meets the same fault: not a file that is in its way.
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(locate, range(8)))
    assert open_descriptors() == before
    assert list(tmp_path.iterdir()) == []


def test_a_limit_of_the_system_is_named(tmp_path, hashing):
    before = open_descriptors()
    writer = CheckpointWriter(tmp_path, lay_out([("t", torch.uint8, (100_000,))], None), hashing, lambda _: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(BadInputError, match=r"model\.safetensors: File too large"):
            writer.locate("t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_descriptors() == before


def test_nothing_is_written_over_another_file(tmp_path, hashing):
    (tmp_path / "model.safetensors").write_text("somebody else's")
    writer = CheckpointWriter(tmp_path, lay_out([("t", torch.uint8, (10,))], None), hashing, lambda _: None)
    with pytest.raises(BadInputError, match="File exists"):
        writer.locate("t")
    assert (tmp_path / "model.safetensors").read_text() == "somebody else's"
