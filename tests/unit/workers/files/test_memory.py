"""The memory of large tensors, as importing the package arranges it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PROGRAM = """
import re, workers, torch
tensor = torch.ones(64 << 20, dtype=torch.uint8)
for mapping in re.split(r"\\n(?=[0-9a-f]+-)", open("/proc/self/smaps").read()):
    begin, end = (int(bound, 16) for bound in mapping.split()[0].split("-"))
    if begin <= tensor.data_ptr() < end:
        print(mapping.partition("VmFlags:")[2])
"""


@pytest.mark.parametrize(("given", "asked"), [(None, True), ("0", False)])
def test_large_tensors_ask_for_huge_pages(given, asked):
    """By the kernel's own word, `hg` in proc(5); whoever runs a worker may say otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {"THP_MEM_ALLOC_ENABLE": given} if given else {}
    command = [sys.executable, "-c", PROGRAM]
    flags = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert ("hg" in flags.split()) is asked
