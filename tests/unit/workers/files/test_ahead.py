"""Reading ahead: whole pages of a base come into the system's cache, and what cannot be read is left alone."""

import ctypes
import mmap
import os
import threading
import time

import pytest

from workers.files.ahead import reading_ahead

NUM_BYTES = 64 << 20  # more than the system reads for one request
NUM_PAGES = NUM_BYTES // mmap.PAGESIZE


def num_cached_pages(path):
    """Return how many pages of a file are in the page cache, as mincore(2) says."""
    pages = (ctypes.c_ubyte * NUM_PAGES)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), NUM_BYTES, access=mmap.ACCESS_COPY) as mapped:
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(NUM_BYTES), pages
        )
        del begin
    assert failed == 0, os.strerror(ctypes.get_errno())
    return sum(page & 1 for page in pages)


@pytest.fixture
def base(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "optimizer.bin"):
        with (tmp_path / name).open("wb") as file:
            file.write(os.urandom(NUM_BYTES))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if num_cached_pages(tmp_path / name):
            pytest.skip("files here are in memory only")
    return tmp_path


def test_weights_are_in_the_cache_before_anybody_reads_them(base):
    num_threads = threading.active_count()
    end = time.monotonic() + 60
    with reading_ahead(base):
        while any(num_cached_pages(path) < NUM_PAGES for path in base.glob("*.safetensors")):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert threading.active_count() == num_threads
    assert num_cached_pages(base / "optimizer.bin") == 0


def test_no_more_is_read_than_half_of_the_memory_that_is_free(base, monkeypatch):
    monkeypatch.setattr("workers.files.ahead.available_main_memory", lambda: NUM_BYTES)
    with reading_ahead(base):
        time.sleep(1)
    assert 0 < num_cached_pages(base / "model-00001-of-00002.safetensors") < NUM_PAGES
    assert num_cached_pages(base / "model-00002-of-00002.safetensors") == 0


def test_what_cannot_be_read_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "other.safetensors").symlink_to("/etc/passwd")
    for place in (tmp_path, tmp_path / "nothing"):
        with reading_ahead(place):
            time.sleep(0.1)
