"""Files hashed as they are written: in order, by whichever thread brings bytes, and with nothing kept in vain."""

import hashlib
import itertools
import random
import threading

import pytest

import workers.files.hashing
from workers.files.buffers import BufferPool
from workers.files.hashing import FileHash


class File:
    """A file whose bytes are brought by hand."""

    def __init__(self, buffers, size, *, num_spare=2, seed=0):
        self.content = random.Random(seed).randbytes(size)
        self.buffers = buffers
        self.digest = None
        self.hash = FileHash(size, buffers, num_spare=num_spare, read=self.read)

    def read(self, target, offset):
        target.copy_(target.new_tensor(bytearray(self.content[offset : offset + len(target)])))

    def bring(self, begin, end):
        data = self.content[begin:end]
        with self.buffers.take(len(data), begin) as buffer:
            buffer.values.copy_(buffer.values.new_tensor(bytearray(data)))
            buffer.hold()
            if self.hash.add(begin, buffer):
                self.digest = self.hash.digest

    @property
    def right(self):
        return self.digest == hashlib.sha256(self.content).hexdigest()


@pytest.fixture
def buffers():
    return BufferPool(8)


def num_held(buffers):
    return 8 - buffers.num_free


def test_bytes_in_order_are_hashed_at_once(buffers):
    file = File(buffers, 1000)
    file.bring(0, 600)
    assert num_held(buffers) == 0
    assert file.digest is None
    file.bring(600, 1000)
    assert file.right
    assert num_held(buffers) == 0


def test_bytes_that_come_too_early_are_kept(buffers):
    file = File(buffers, 1000)
    file.bring(500, 1000)
    assert num_held(buffers) == 1
    file.bring(0, 500)
    assert file.right
    assert num_held(buffers) == 0


def test_nothing_is_kept_where_buffers_are_wanted(buffers):
    file = File(buffers, 1000, num_spare=9)
    file.bring(500, 1000)
    assert num_held(buffers) == 0
    file.bring(0, 500)  # the others are read back
    assert file.right


def test_large_pieces_are_read_back_in_small_ones(buffers, monkeypatch):
    monkeypatch.setattr(workers.files.hashing, "_PIECE_BYTES", 7)
    file = File(buffers, 1000, num_spare=9)
    file.bring(500, 1000)
    file.bring(0, 500)
    assert file.right


def test_bytes_that_cannot_be_read_back_fail_the_file_alone(buffers):
    fault = OSError("the disk")

    def fail(*_):
        raise fault

    file, other = File(buffers, 1000, num_spare=9), File(buffers, 900)
    file.hash._read = fail
    file.bring(500, 1000)
    with pytest.raises(OSError, match="the disk"):
        file.bring(0, 500)
    file.hash.close()
    other.bring(0, 900)
    assert other.right
    assert file.digest is None
    assert num_held(buffers) == 0


def test_bytes_of_a_closed_file_are_let_go_of(buffers):
    file = File(buffers, 1000)
    file.bring(500, 700)
    assert num_held(buffers) == 1
    file.hash.close()
    assert num_held(buffers) == 0
    file.bring(0, 500)
    assert num_held(buffers) == 0
    assert file.digest is None


def test_a_file_that_is_closed_while_it_is_hashed_has_no_digest(buffers):
    file = File(buffers, 1000, num_spare=9)

    def close(target, _):
        target.zero_()
        file.hash.close()

    file.hash._read = close
    file.bring(500, 1000)
    file.bring(0, 500)
    assert file.digest is None
    assert num_held(buffers) == 0


@pytest.mark.parametrize("num_spare", [1, 3, 9])
@pytest.mark.parametrize("seed", range(5))
def test_many_files_by_many_threads(buffers, num_spare, seed):
    generator = random.Random(seed)
    sizes = [generator.randint(1, 300_000) for _ in range(7)]
    files = [File(buffers, size, num_spare=num_spare, seed=number) for number, size in enumerate(sizes)]
    work = []
    for number, size in enumerate(sizes):
        cuts = sorted({0, size, *(generator.randint(0, size) for _ in range(20))})
        work += [(number, begin, end) for begin, end in itertools.pairwise(cuts)]
    # About in order, as a pass brings them.
    work = [
        each
        for _, each in sorted((begin / sizes[n] + generator.random() / 8, (n, begin, end)) for n, begin, end in work)
    ]
    lock = threading.Lock()

    def bring():
        while True:
            with lock:
                if not work:
                    return
                number, begin, end = work.pop(0)
            files[number].bring(begin, end)

    threads = [threading.Thread(target=bring, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert all(file.right for file in files)
    assert num_held(buffers) == 0
