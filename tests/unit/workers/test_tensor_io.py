"""Bytes of tensors: positioned reads and writes, whole whatever the system gives at a time."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from jobs.errors import BadInputError, NoCapacityError, NotFoundError, TransientIOError
from tests.merges import open_descriptors
from workers.checkpoint import read_shard
from workers.tensor_io import copy_range, read_into, read_rows, tensor_bytes, write_all

TENSORS = {
    "matrix": torch.randn(7, 5, dtype=torch.float32),
    "brain": torch.randn(6, 3).to(torch.bfloat16),
    "cube": torch.randn(4, 2, 3).to(torch.float16),
    "vector": torch.arange(9),
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 4),
    "flat": torch.zeros(4, 0),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


@pytest.fixture
def files(tmp_path):
    """A source of 1000 bytes and an empty target, as descriptors."""
    (tmp_path / "source").write_bytes(bytes(range(250)) * 4)
    source = os.open(tmp_path / "source", os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, target
    os.close(source)
    os.close(target)


@pytest.mark.parametrize("name", TENSORS)
def test_rows_are_those_of_the_tensor(path, name):
    spec = next(spec for spec in read_shard(path).tensors if spec.name == name)
    num_rows = spec.shape[0] if spec.shape else 1
    for start in range(num_rows + 1):
        for stop in range(start, num_rows + 1):
            expected = TENSORS[name][start:stop] if spec.shape else TENSORS[name]
            rows = read_rows(path, spec, start, stop)
            assert rows.dtype == expected.dtype
            assert torch.equal(rows, expected)


def test_reads_and_writes_go_on_where_the_system_stops(path, tmp_path, monkeypatch):
    preadv, pwrite, copy_file_range = os.preadv, os.pwrite, os.copy_file_range
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, i, o: copy_file_range(a, b, min(n, 7), i, o))
    spec = next(spec for spec in read_shard(path).tensors if spec.name == "matrix")
    assert torch.equal(read_rows(path, spec, 0, 7), TENSORS["matrix"])
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    write_all(descriptor, tmp_path / "out", tensor_bytes(TENSORS["matrix"]), 10)
    copy_range(descriptor, descriptor, tmp_path / "out", begin=10, target_begin=200, num_bytes=140)
    os.close(descriptor)
    data = (tmp_path / "out").read_bytes()
    assert data[10:150] == data[200:340] == TENSORS["matrix"].numpy().tobytes()


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_copies_are_the_same_bytes_with_and_without_the_kernel(files, tmp_path, monkeypatch, refusal):
    if refusal is not None:

        def refuse(*_):
            raise OSError(refusal, os.strerror(refusal))

        monkeypatch.setattr(os, "copy_file_range", refuse)
    copy_range(*files, tmp_path / "target", begin=3, target_begin=50, num_bytes=900)
    assert (tmp_path / "target").read_bytes() == bytes(50) + (bytes(range(250)) * 4)[3:903]


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_ends_early_is_refused(files, tmp_path, monkeypatch, in_kernel):
    if not in_kernel:

        def refuse(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    with pytest.raises(BadInputError, match="truncated meanwhile, at byte 1000"):
        copy_range(*files, tmp_path / "target", begin=900, target_begin=0, num_bytes=101)


def test_a_file_that_ends_early_is_refused(files, tmp_path):
    with pytest.raises(BadInputError, match="source: expected 16 bytes at 990, found 10"):
        read_into(files[0], tmp_path / "source", torch.empty(4), 990)


def test_a_full_disk_is_no_capacity(tmp_path):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(NoCapacityError, match=r"out\.safetensors"):
            write_all(descriptor, tmp_path / "out.safetensors", b"data", 0)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, NoCapacityError), (errno.EIO, TransientIOError)])
def test_faults_of_a_copy_say_what_can_be_done(files, tmp_path, monkeypatch, number, expected):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", fail)
    with pytest.raises(expected, match="target"):
        copy_range(*files, tmp_path / "target", begin=0, target_begin=0, num_bytes=10)


def test_a_file_that_is_gone_is_named(path):
    spec = read_shard(path).tensors[0]
    path.unlink()
    with pytest.raises(NotFoundError, match=r"t\.safetensors"):
        read_rows(path, spec, 0, 1)


def test_no_descriptor_is_left(path):
    before = open_descriptors()
    specs = read_shard(path).tensors
    for spec in specs:
        read_rows(path, spec, 0, spec.shape[0] if spec.shape else 1)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadInputError):
        read_rows(path, specs[-1], 0, specs[-1].shape[0])
    assert open_descriptors() == before
