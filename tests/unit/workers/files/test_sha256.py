"""SHA-256 two streams at a time: the digests of hashlib, whatever comes in whatever pieces."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workers.files.sha256
from jobs.errors import InternalError
from workers.files import sha256

STREAM = st.lists(st.integers(0, 300).flatmap(lambda size: st.binary(min_size=size, max_size=size)), max_size=8)


def view(data):
    return memoryview(bytearray(data))


def true_digest(pieces):
    return hashlib.sha256(b"".join(pieces)).hexdigest()


@settings(max_examples=300, deadline=None)
@given(first=STREAM, second=STREAM)
def test_two_streams_have_the_digests_of_hashlib(first, second):
    one, other = sha256.new(), sha256.new()
    for data, other_data in zip(first, second, strict=False):
        sha256.update_both(one, view(data), other, view(other_data))
    num_both = min(len(first), len(second))
    for data in first[num_both:]:
        one.update(view(data))
    for data in second[num_both:]:
        other.update(view(data))
    assert one.hexdigest() == one.hexdigest() == true_digest(first)
    assert other.hexdigest() == true_digest(second)


@pytest.mark.parametrize("size", [*range(130), 1 << 20, (1 << 20) + 1])
def test_every_padding_is_right(size):
    data = bytes(byte % 251 for byte in range(size))
    one, other = sha256.new(), sha256.new()
    one.update(view(data))
    sha256.update_both(one, view(b""), other, view(data))
    assert one.hexdigest() == other.hexdigest() == true_digest([data])


@pytest.mark.parametrize(
    ("message", "digest"),
    [  # FIPS 180-4, examples of NIST
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
)
def test_published_examples(message, digest):
    one = sha256.new()
    one.update(view(message))
    assert one.hexdigest() == digest


@pytest.fixture
def fresh_trial():
    """Have the instructions tried anew."""
    workers.files.sha256.pairs.cache_clear()
    yield
    workers.files.sha256.pairs.cache_clear()


@pytest.mark.usefixtures("fresh_trial")
def test_without_instructions_hashlib_does_it(monkeypatch):
    monkeypatch.setattr(workers.files.sha256.kernel, "AVAILABLE", False)
    one, other = sha256.new(), sha256.new()
    sha256.update_both(one, view(b"abc"), other, view(b"de"))
    assert isinstance(one, type(hashlib.sha256()))
    assert (one.hexdigest(), other.hexdigest()) == (true_digest([b"abc"]), true_digest([b"de"]))


@pytest.mark.skipif(not workers.files.sha256.kernel.AVAILABLE, reason="needs the instructions")
@pytest.mark.usefixtures("fresh_trial")
@pytest.mark.parametrize("broken", ["compress", "compress_both"])
def test_code_that_makes_other_digests_is_refused(monkeypatch, broken):
    def wrong(state, *_):
        state += 1

    monkeypatch.setattr(workers.files.sha256.kernel, broken, wrong)
    with pytest.raises(InternalError, match="report this processor"):
        sha256.new()
