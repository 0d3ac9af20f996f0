"""Bytes of tensors: positioned reads and writes, whole whatever the system gives at a time."""

import os

import pytest
import torch
from safetensors.torch import save_file

from jobs.errors import BadInputError, NoCapacityError, NotFoundError
from tests.merges import open_descriptors
from workers.files.checkpoint import read_shard
from workers.files.tensor_io import opened, read_into, read_rows, tensor_bytes, write_all

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
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    spec = next(spec for spec in read_shard(path).tensors if spec.name == "matrix")
    assert torch.equal(read_rows(path, spec, 0, 7), TENSORS["matrix"])
    descriptor = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    write_all(descriptor, tmp_path / "out", tensor_bytes(TENSORS["matrix"]), 10)
    os.close(descriptor)
    assert (tmp_path / "out").read_bytes() == bytes(10) + TENSORS["matrix"].numpy().tobytes()


def test_a_file_that_ends_early_is_refused(tmp_path):
    (tmp_path / "source").write_bytes(bytes(1000))
    with (
        opened(tmp_path / "source") as descriptor,
        pytest.raises(BadInputError, match="source: expected 16 bytes at 990, found 10"),
    ):
        read_into(descriptor, tmp_path / "source", torch.empty(4), 990)


def test_a_full_disk_is_no_capacity(tmp_path):
    descriptor = os.open("/dev/full", os.O_WRONLY)
    try:
        with pytest.raises(NoCapacityError, match=r"out\.safetensors"):
            write_all(descriptor, tmp_path / "out.safetensors", b"data", 0)
    finally:
        os.close(descriptor)


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
    assert open_descriptors() <= before
