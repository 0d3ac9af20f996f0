"""No collections while many objects are made, and as before after it."""

import gc
import threading

import pytest

from jobs.collecting import uncollected


def test_collections_stop_inside_and_begin_again() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_they_begin_again_after_an_error() -> None:
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()


def test_where_they_were_off_they_stay_off() -> None:
    gc.disable()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_last_of_several_threads_begins_them_again() -> None:
    inside, may_leave = threading.Event(), threading.Event()

    def other() -> None:
        with uncollected():
            inside.set()
            may_leave.wait()

    thread = threading.Thread(target=other)
    with uncollected():
        thread.start()
        inside.wait()
    assert not gc.isenabled()
    may_leave.set()
    thread.join()
    assert gc.isenabled()
