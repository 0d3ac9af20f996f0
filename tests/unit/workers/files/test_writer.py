"""Shard files: written in any order by several threads, past the page cache or not, hashed, and nothing left open."""

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import os
import random
import resource
import shutil
import threading
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import workers.files.hashing
import workers.files.shard
from jobs.errors import BadInputError, CancelledError, InternalError, NoCapacityError, TransientIOError
from jobs.release import Artifact
from tests.merges import open_descriptors
from workers.files.buffers import PAGE_BYTES, BufferPool
from workers.files.conveyor import Conveyor
from workers.files.layout import CheckpointLayout, lay_out
from workers.files.shard import WrittenFile
from workers.files.writer import CheckpointWriter


@dataclasses.dataclass
class Checkpoint:
    """A checkpoint that is written, and the threads that do it."""

    directory: Path
    layout: CheckpointLayout
    num_buffers: int = 6
    num_spare: int = 2
    direct: bool = False
    on_file: Callable[[WrittenFile], None] | None = lambda _: None

    def __post_init__(self):
        self.threads = ThreadPoolExecutor(3)
        self.buffers = BufferPool(self.num_buffers)
        conveyor = Conveyor(self.buffers, self.threads, self.num_spare)
        self.writer = CheckpointWriter(self.directory, self.layout, conveyor, direct=self.direct, on_file=self.on_file)

    def write(self, name, data, begin=0):
        shard, spec = self.writer.locate(name)
        shard.write_copy(
            spec.begin + begin, torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
        )

    def write_all(self, contents, *, pieces=1, seed=0, num_threads=3):
        """Write all tensors, each in some pieces, in random order by several threads."""
        work = []
        for shard in self.layout.shards:
            for spec in shard.tensors:
                cuts = [spec.num_bytes * piece // pieces for piece in range(pieces + 1)]
                work += [(spec.name, begin, end) for begin, end in itertools.pairwise(cuts)]
        random.Random(seed).shuffle(work)
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(lambda item: self.write(item[0], contents[item[0]][item[1] : item[2]], item[1]), work))

    def finish(self):
        """Return the artifacts; every buffer is free again."""
        self.threads.shutdown()
        try:
            return tuple(file.artifact for file in self.writer.finished())
        finally:
            self.writer.close()
            assert self.buffers.num_free == self.num_buffers


@pytest.fixture
def small(tmp_path):
    """Ten bytes on their way."""
    return Checkpoint(tmp_path, lay_out([("t", torch.uint8, (10,))], None))


def true_artifacts(directory):
    return tuple(
        Artifact(path=path.name, num_bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.iterdir())
    )


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300) | st.integers(60_000, 400_000), min_size=1, max_size=8),
    limit=st.none() | st.integers(1, 900_000),
    pieces=st.integers(1, 5),
    seed=st.integers(0, 1000),
    direct=st.booleans(),
    num_spare=st.sampled_from([1, 6]),  # with 6 of 6 buffers to spare, whatever comes early is read back
)
def test_files_and_digests_are_right_in_any_order(tmp_path_factory, sizes, limit, pieces, seed, direct, num_spare):
    directory = tmp_path_factory.mktemp("shards")
    layout = lay_out([(f"t{n}", torch.uint8, (size,)) for n, size in enumerate(sizes)], limit)
    contents = {f"t{n}": random.Random(seed + n).randbytes(size) for n, size in enumerate(sizes)}
    told = []
    written = Checkpoint(directory, layout, num_spare=num_spare, direct=direct, on_file=told.append)
    written.write_all(contents, pieces=pieces, seed=seed)
    artifacts = written.finish()
    assert artifacts == true_artifacts(directory)
    assert sorted((file.artifact for file in told), key=lambda artifact: artifact.path) == list(artifacts)
    for shard in layout.shards:
        expected = shard.header + b"".join(contents[spec.name] for spec in shard.tensors)
        assert (directory / shard.name).read_bytes() == expected
    shutil.rmtree(directory)


@pytest.fixture
def writes(monkeypatch):
    """What is written: offset, size, and whether it goes past the page cache."""
    seen, pwrite = [], os.pwrite

    def write(descriptor, data, offset):
        seen.append((offset, len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    return seen


@pytest.mark.parametrize("offset", [0, 1, 8, 4095])
@pytest.mark.parametrize("size", [100, 65_536, 3 * 4096 + 65_536, 1_000_003])
def test_whole_pages_go_past_the_page_cache(tmp_path, writes, offset, size):
    layout = lay_out([("before", torch.uint8, (4096 + offset,)), ("t", torch.uint8, (size,))], None)
    contents = {"before": bytes(4096 + offset), "t": random.Random(size).randbytes(size)}
    written = Checkpoint(tmp_path, layout, direct=True)
    written.write_all(contents)
    assert written.finish() == true_artifacts(tmp_path)
    past = [(begin, begin + length) for begin, length, direct in writes if direct]
    assert all(begin % PAGE_BYTES == end % PAGE_BYTES == 0 for begin, end in past)
    _, spec = layout.tensors["t"]
    if size > 100_000:
        assert sum(end - begin for begin, end in past) >= (size - 2 * PAGE_BYTES if spec.begin % 8 == 0 else 0)
    pages = [offset // PAGE_BYTES for offset, _, direct in writes if not direct]
    assert not {page for begin, end in past for page in range(begin // PAGE_BYTES, end // PAGE_BYTES)} & set(pages)


def test_a_file_system_without_a_way_past_the_page_cache_is_written_all_the_same(tmp_path, writes, monkeypatch):
    opened = os.open

    def refuse(path, flags, *arguments):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    written = Checkpoint(tmp_path, lay_out([("t", torch.uint8, (1_000_000,))], None), direct=True)
    written.write_all({"t": bytes(1_000_000)})
    assert written.finish() == true_artifacts(tmp_path)
    assert not any(direct for _, _, direct in writes)


def test_a_file_system_that_wants_larger_pages_is_written_all_the_same(tmp_path, monkeypatch):
    pwrite, refused = os.pwrite, []

    def write(descriptor, data, offset):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    content = random.Random(0).randbytes(9 << 20)
    written = Checkpoint(tmp_path, lay_out([("t", torch.uint8, (len(content),))], None), direct=True)
    written.write_all({"t": content}, pieces=3)
    assert written.finish() == true_artifacts(tmp_path)
    assert 1 <= len(refused) <= 3


@pytest.mark.parametrize("direct", [True, False])
def test_a_large_file_is_hashed_while_it_is_written(tmp_path, direct):
    num_bytes = 48 << 20
    layout = lay_out([("large", torch.uint8, (num_bytes,))], None)
    content = random.Random(0).randbytes(num_bytes)
    told = []
    written = Checkpoint(tmp_path, layout, direct=direct, on_file=told.append)
    written.write("large", content[: 40 << 20])
    deadline = time.monotonic() + 30
    while written.buffers.num_free < written.num_buffers:  # they are released when they are hashed
        assert time.monotonic() < deadline
        time.sleep(0.001)
    written.write("large", content[40 << 20 :], 40 << 20)
    assert written.finish() == true_artifacts(tmp_path)
    assert told[0].is_as_it_was(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:  # the very next write shows
        file.write(b"x")
    assert not told[0].is_as_it_was(tmp_path)


def test_files_for_this_process_alone_are_not_hashed(tmp_path):
    contents = {"a": random.Random(1).randbytes(5_000_000), "b": b"12345678"}
    layout = lay_out([(name, torch.uint8, (len(data),)) for name, data in contents.items()], None)
    checkpoint = Checkpoint(tmp_path, layout, on_file=None)
    checkpoint.write_all(contents, pieces=7)
    checkpoint.threads.shutdown()
    (file,) = checkpoint.writer.finished()
    assert (file.sha256, checkpoint.buffers.num_free) == (None, checkpoint.num_buffers)
    assert {name: bytes(tensor.tolist()) for name, tensor in load_file(tmp_path / file.name).items()} == contents
    assert file.is_as_it_was(tmp_path)
    with (tmp_path / file.name).open("ab") as opened:
        opened.write(b"more")
    assert not file.is_as_it_was(tmp_path)


def test_a_small_file_is_read_again(small):
    """Its times may not have moved on."""
    told = []
    small.writer._on_file = told.append
    small.write("t", bytes(10))
    small.finish()
    path = small.directory / "model.safetensors"
    status = path.stat()
    assert told[0].is_as_it_was(small.directory)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert not told[0].is_as_it_was(small.directory)


def test_a_file_is_finished_once_though_an_empty_tensor_comes_last(tmp_path):
    layout = lay_out([("full", torch.uint8, (10,)), ("empty", torch.uint8, (0,))], None)
    finished = threading.Event()
    told = []

    def on_file(file):
        told.append(file.artifact.path)
        finished.set()

    written = Checkpoint(tmp_path, layout, on_file=on_file)
    written.write("full", bytes(10))
    assert finished.wait(10)
    written.write("empty", b"")
    assert written.finish() == true_artifacts(tmp_path)
    assert told == ["model.safetensors"]


def test_a_finished_file_holds_no_descriptor(tmp_path):
    layout = lay_out([(f"t{n}", torch.uint8, (10,)) for n in range(30)], 10)
    before = open_descriptors()
    finished = threading.Semaphore(0)
    written = Checkpoint(tmp_path, layout, direct=True, on_file=lambda _: finished.release())
    for shard in layout.shards:
        written.write(shard.tensors[0].name, bytes(10))
        assert finished.acquire(timeout=10)
        assert open_descriptors() <= before
    assert len(written.finish()) == 30


def test_threads_that_hold_a_buffer_find_a_second_one(tmp_path):
    """However many buffers wait for bytes before theirs: as many stay free as all threads hold together."""
    num_threads, num_pieces = 3, 40
    layout = lay_out([("t0", torch.uint8, (num_pieces,)), ("t1", torch.uint8, (num_pieces,))], num_pieces)
    written = Checkpoint(tmp_path, layout, num_buffers=8, num_spare=2 * num_threads)
    for piece in range(1, 12):  # all too early
        written.write("t0", bytes([piece]), piece)
    (first, at_first), (second, at_second) = (written.writer.locate(name) for name in ("t0", "t1"))
    all_hold_one = threading.Barrier(num_threads)

    def write(piece):
        with first.buffer(at_first.begin + piece, 1) as one:
            one.values.fill_(piece)
            if piece >= num_pieces - num_threads:
                all_hold_one.wait()
            first.write(at_first.begin + piece, one)
            with second.buffer(at_second.begin + piece, 1) as two:
                two.values.copy_(one.values)
                second.write(at_second.begin + piece, two)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(write, [*reversed(range(12, num_pieces)), 0]))
    for piece in range(1, 12):
        written.write("t1", bytes([piece]), piece)
    assert written.finish() == true_artifacts(tmp_path)
    assert all((tmp_path / shard.name).read_bytes().endswith(bytes(range(num_pieces))) for shard in layout.shards)


@pytest.mark.parametrize("num_spare", [1, 6])
def test_an_unfinished_checkpoint_is_closed_as_it_is(tmp_path, num_spare):
    layout = lay_out([(f"t{n}", torch.uint8, (10,)) for n in range(4)], 20)
    before = open_descriptors()
    written = Checkpoint(tmp_path, layout, num_spare=num_spare, direct=True)
    for name in ("t1", "t2"):
        written.write(name, bytes(10))
    written.writer.fail(CancelledError("stop"))
    assert written.finish() == ()
    written.writer.close()
    assert open_descriptors() <= before


def test_an_error_of_the_listener_fails_the_job(small):
    def refuse(file):
        raise NoCapacityError(f"no room for {file.artifact.path}")

    small.writer._on_file = refuse
    small.write("t", bytes(10))
    small.finish()
    assert str(small.writer.error) == "no room for model.safetensors"


def test_a_fault_of_the_disk_fails_the_job(small, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    small.write("t", bytes(10))
    assert small.finish() == ()
    assert isinstance(small.writer.error, TransientIOError)


def test_a_fault_of_ours_comes_up_at_the_end(small):
    def fail(_):
        raise ZeroDivisionError("surprise")

    small.writer._on_file = fail
    small.write("t", bytes(10))
    with pytest.raises(ZeroDivisionError, match="surprise"):
        small.finish()


@pytest.mark.parametrize("error", [TransientIOError("the disk"), ZeroDivisionError("surprise")])
def test_nobody_waits_for_buffers_of_a_file_that_cannot_be_hashed(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(workers.files.shard, "read_into", fail)
    num_pieces = 40
    layout = lay_out([("t", torch.uint8, (100 * num_pieces,))], None)
    written = Checkpoint(tmp_path, layout, num_spare=6)
    for piece in (1, 0, *range(2, num_pieces)):  # the first too early: it is to be read back
        written.write("t", bytes(100), 100 * piece)
    if isinstance(error, TransientIOError):
        assert written.finish() == ()
        assert written.writer.error is error
    else:
        with pytest.raises(ZeroDivisionError, match="surprise"):
            written.finish()


def test_the_first_error_is_kept(small):
    small.writer.fail(BadInputError("first"))
    small.writer.fail(BadInputError("second"))
    assert str(small.writer.error) == "first"


@pytest.mark.parametrize("num_threads", [1, 4])
def test_a_full_disk_is_found_out_before_anything_is_written(small, monkeypatch, num_threads):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = open_descriptors()

    def locate(_):
        with pytest.raises(NoCapacityError, match=r"model\.safetensors"):
            small.writer.locate("t")

    # Every thread that wants the file meets the same fault: not a file that is in its way.
    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(locate, range(8)))
    assert open_descriptors() <= before
    assert list(small.directory.iterdir()) == []


def test_a_limit_of_the_system_is_named(tmp_path):
    before = open_descriptors()
    written = Checkpoint(tmp_path, lay_out([("t", torch.uint8, (100_000,))], None))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(BadInputError, match=r"model\.safetensors: File too large"):
            written.writer.locate("t")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert open_descriptors() <= before


def test_a_digest_that_cannot_begin_leaves_no_file(small, monkeypatch):
    def refuse():
        raise InternalError("other digests")

    before = open_descriptors()
    monkeypatch.setattr(workers.files.hashing.hashlib, "sha256", refuse)
    with pytest.raises(InternalError, match="other digests"):
        small.writer.locate("t")
    assert open_descriptors() <= before
    assert list(small.directory.iterdir()) == []


def test_nothing_is_written_over_another_file(small):
    (small.directory / "model.safetensors").write_text("somebody else's")
    with pytest.raises(BadInputError, match="File exists"):
        small.writer.locate("t")
    assert (small.directory / "model.safetensors").read_text() == "somebody else's"


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_where_no_device_is_below_the_free_space_is_asked(small, monkeypatch, writes, free):
    """As in a tmpfs: making room would be writing everything, and there is no cache to go past."""
    monkeypatch.setattr(os, "major", lambda _: 0)
    space = types.SimpleNamespace(f_bavail=free // 4096, f_frsize=4096)
    monkeypatch.setattr(os, "fstatvfs", lambda _: space)
    monkeypatch.setattr(os, "posix_fallocate", None)
    layout = lay_out([("t", torch.uint8, (1 << 20,))], None)
    written = Checkpoint(small.directory, layout, direct=True)
    if not free:
        with pytest.raises(NoCapacityError, match=r"model\.safetensors: No space left"):
            written.writer.locate("t")
        assert list(small.directory.iterdir()) == []
        return
    written.write("t", bytes(1 << 20))
    assert written.finish() == true_artifacts(small.directory)
    assert not any(direct for _, _, direct in writes)
