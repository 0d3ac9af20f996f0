"""Collections: none while libraries load, and none of what they brought afterwards."""

import subprocess
import sys

import pytest

PROGRAM = """
import gc
from workers.files.collector import pass_over_modules, loading

class Node:
    pass

def cycle():
    node = Node()
    node.itself = node

def num_kept():
    return sum(isinstance(each, Node) for each in gc.get_objects())

counts = []
gc.freeze()  # what came with this program
before = gc.get_freeze_count()
try:
    with loading():
        assert not gc.isenabled()
        kept = [[] for _ in range(5_000)]  # more than a collection is due for
        {raises}
except KeyError:
    pass
assert gc.isenabled()
assert gc.get_freeze_count() >= before + 5_000
cycle()
assert num_kept() == 1
gc.collect()
assert num_kept() == 0  # what came later is looked through
for late in ([], []):
    cycle()
    kept.append(late)
    pass_over_modules()
    counts.append((num_kept(), gc.get_freeze_count()))
(num_first, first), (num_second, second) = counts
assert num_first == 0  # garbage is not kept for ever
assert (num_second, second) == (1, first)  # once: by now there may be what has to go
"""


@pytest.mark.parametrize("raises", ["", "raise KeyError('a library that is not there')"])
def test_collections_go_on_after_the_libraries_and_pass_over_them(raises):
    subprocess.run([sys.executable, "-c", PROGRAM.replace("{raises}", raises)], check=True)
