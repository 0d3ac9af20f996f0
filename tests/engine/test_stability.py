"""Methods that decompose the base anew whenever they are loaded: what moves with the machine is refused by name."""

import pytest

from tests.merges import one_torch_thread
from tests.stability import MOVES, SETTINGS, STAYS, build, merge_all, merge_here, moved
from workers.adapters.methods import MERGED, REMADE, UNSTABLE


def test_a_method_is_of_one_kind():
    assert UNSTABLE.keys() | REMADE <= MERGED
    assert not UNSTABLE.keys() & REMADE


# A process that imports torch and PEFT: the number of threads of one that computed before is another matter.
@pytest.mark.slow
def test_methods_move_with_the_number_of_threads_as_they_are_said_to(tmp_path):
    methods = [*UNSTABLE, "PSOFT", "LORA"]
    directory = build(tmp_path / "made", methods)
    with one_torch_thread():
        reference = merge_here(directory, methods, tmp_path / "one")
    other = merge_all(directory, methods, SETTINGS["2 threads"], tmp_path / "two")
    distances = {method: moved(directory, method, reference, other) for method in methods}
    assert all(distances.pop(method) > MOVES for method in UNSTABLE)
    assert max(distances.values()) < STAYS
    assert distances["LORA"] == 0
