"""Files hashed two at a time: which one waits for which, and that nothing is waited for in vain."""

import hashlib
import itertools
import random
import threading

import pytest
import torch

import workers.files.hashing
import workers.files.sha256
from workers.files.buffers import BufferPool
from workers.files.hashing import FileHash, Hasher


class Held:
    """Bytes that are in nobody's pool."""

    def __init__(self, data):
        self.values = torch.frombuffer(bytearray(data), dtype=torch.uint8)

    def release(self):
        """Nothing to give back."""


class Files:
    """Files whose bytes are brought by hand."""

    def __init__(self, sizes, *, num_buffers=8, num_spare=2, num_threads=1):
        self.contents = [random.Random(number).randbytes(size) for number, size in enumerate(sizes)]
        self.buffers = BufferPool(num_buffers)
        self.hasher = Hasher(self.buffers, num_spare=num_spare, num_threads=num_threads)
        self.digests, self.errors = {}, {}
        self.files = [self._file(number) for number in range(len(sizes))]
        for file in self.files:
            self.hasher.open(file)

    def _file(self, number):
        def read(target, offset):
            target.copy_(target.new_tensor(bytearray(self.contents[number][offset : offset + len(target)])))

        def done(digest):
            self.digests[number] = digest
            self.hasher.close(self.files[number])

        def failed(error):
            self.errors[number] = error
            self.hasher.close(self.files[number])

        return FileHash(len(self.contents[number]), read=read, on_hashed=done, on_error=failed)

    def bring(self, number, begin, end):
        data = self.contents[number][begin:end]
        with self.buffers.take(len(data), begin) as buffer:
            buffer.values.copy_(buffer.values.new_tensor(bytearray(data)))
            buffer.hold()
            self.hasher.add(self.files[number], begin, buffer)

    @property
    def num_held(self):
        return 8 - self.buffers.num_free

    def right(self):
        true = {number: hashlib.sha256(data).hexdigest() for number, data in enumerate(self.contents)}
        return self.digests == true and self.num_held == 0


def test_a_file_alone_is_hashed_at_once():
    files = Files([1000])
    files.bring(0, 0, 600)
    assert files.num_held == 0
    files.bring(0, 600, 1000)
    assert files.right()


def test_a_file_waits_for_another():
    files = Files([1000, 900])
    files.bring(0, 0, 600)
    assert files.num_held == 1
    files.bring(1, 0, 500)
    assert files.num_held == 1  # the hundred bytes that are more
    files.bring(0, 600, 1000)
    files.bring(1, 500, 900)
    assert files.right()


def test_a_file_that_is_whole_waits_for_none():
    files = Files([1000, 900])
    files.bring(0, 0, 1000)
    assert files.num_held == 0
    files.bring(1, 0, 900)
    assert files.right()


def test_a_file_does_not_wait_for_one_that_never_comes():
    files = Files([1000, 900])
    for begin in range(0, 900, 100):
        files.bring(0, begin, begin + 100)
        assert files.num_held <= 2
    files.bring(0, 900, 1000)
    assert files.digests.keys() == {0}


def test_nothing_waits_where_buffers_are_wanted():
    files = Files([1000, 900], num_spare=9)
    files.bring(0, 0, 600)
    files.bring(1, 500, 900)  # too early, and read back
    assert files.num_held == 0
    files.bring(0, 600, 1000)
    files.bring(1, 0, 500)
    assert files.right()


def test_a_file_that_cannot_be_read_back_fails_alone():
    files = Files([1000, 900], num_spare=9)
    fault = OSError("the disk")

    def fail(*_):
        raise fault

    files.files[1].read = fail
    files.bring(1, 500, 900)
    files.bring(1, 0, 500)
    files.bring(0, 0, 1000)
    assert files.errors == {1: fault}
    assert files.digests.keys() == {0}
    assert files.num_held == 0


def test_memory_that_is_not_there_is_told_and_others_go_on(monkeypatch):
    files = Files([1000, 900], num_spare=9)
    files.bring(1, 500, 900)

    def fail(*_, **__):
        raise RuntimeError("not enough memory")

    with monkeypatch.context() as patched:
        patched.setattr(workers.files.hashing.torch, "empty", fail)
        files.hasher.add(files.files[1], 0, Held(files.contents[1][:500]))
    assert str(files.errors[1]) == "not enough memory"
    files.bring(0, 0, 1000)
    assert files.digests.keys() == {0}


def test_without_instructions_no_file_waits_for_another(monkeypatch):
    monkeypatch.setattr(workers.files.sha256, "pairs", lambda: False)
    files = Files([1000, 900])
    files.bring(0, 0, 600)
    assert files.num_held == 0
    files.bring(1, 0, 900)
    files.bring(0, 600, 1000)
    assert files.right()


def test_a_fault_of_hashing_itself_is_told_and_others_go_on(monkeypatch):
    files = Files([1000, 900, 800])
    fault = ZeroDivisionError("surprise")

    def fail(*_):
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(workers.files.hashing.sha256, "update_both", fail)
        files.bring(0, 0, 500)
        files.bring(1, 0, 500)
    assert files.errors == {0: fault, 1: fault}
    files.bring(2, 0, 800)
    assert files.digests.keys() == {2}
    assert files.num_held == 0


def test_bytes_of_a_closed_file_are_let_go_of():
    files = Files([1000, 900])
    files.bring(0, 0, 500)
    files.bring(1, 500, 900)
    assert files.num_held == 2
    for file in files.files:
        files.hasher.close(file)
    assert files.num_held == 0
    files.bring(0, 500, 1000)
    assert files.num_held == 0
    assert files.digests == {}


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("num_spare", [1, 3, 9])
@pytest.mark.parametrize("seed", range(5))
def test_many_files_by_many_threads(num_threads, num_spare, seed):
    generator = random.Random(seed)
    sizes = [generator.randint(1, 300_000) for _ in range(7)]
    files = Files(sizes, num_spare=num_spare, num_threads=num_threads)
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
                piece = work.pop(0)
            files.bring(*piece)

    threads = [threading.Thread(target=bring, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert files.right()
