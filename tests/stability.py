"""How far the merged weights of each method move with the machine that merges. Run by `make stability`.

One adapter of every method is merged by PEFT alone, in a process of its own for each setting: threads, the code path of
MKL, the vector instructions of torch, other random numbers before. What is measured is the distance of the merged
weights over the length of the delta. Methods that `workers.adapters.methods` calls unstable must move by more than a
hundredth of it, all others by less than a thousandth; the exit code says whether they do.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from tests.methods import make_method_adapter
from tests.models import build_llama, build_qwen2, load_plain
from workers.adapters.methods import MERGED, UNSTABLE
from workers.parity.inference import quiet_libraries

MOVES, STAYS = 1e-2, 1e-3

_WIDTH = {"hidden_size": 256, "intermediate_size": 640}
"""So wide that MKL shares its work among threads; tiny models hide what differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How a process computes."""

    num_threads: int = 1
    seed: int = 0
    """Of the random numbers that came before."""
    environment: Mapping[str, str] = field(default_factory=dict)


REFERENCE = Setting()
SETTINGS: Mapping[str, Setting] = {
    "another seed": Setting(seed=7),
    "2 threads": Setting(num_threads=2),
    "4 threads": Setting(num_threads=4),
    "MKL_CBWR=COMPATIBLE": Setting(environment={"MKL_CBWR": "COMPATIBLE"}),
    "MKL_ENABLE_INSTRUCTIONS=SSE4_2": Setting(environment={"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}),
    "ATEN_CPU_CAPABILITY=default": Setting(environment={"ATEN_CPU_CAPABILITY": "default"}),
}


def build(directory: Path, methods: Collection[str]) -> Path:
    """Make a base, and an adapter of each method for it.

    Args:
        directory: gets a folder for each.
        methods: PEFT's names of them.
    """
    for method in methods:
        base = _base(directory, method)
        if not base.exists():
            # BEFT needs a base with biases.
            make = build_qwen2 if method == "BEFT" else build_llama
            make(base, tokenizer=False, dtype=torch.float32, **_WIDTH)
        make_method_adapter(base, directory / method, method)
    return directory


def merge_all(directory: Path, methods: Collection[str], setting: Setting, output: Path) -> Path:
    """Merge each adapter in a fresh process.

    Args:
        directory: as `build` made it.
        methods: to merge.
        setting: how the process computes.
        output: becomes a directory with the tensors that changed, by method.
    """
    unset = {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "PASSIVE", **setting.environment}
    arguments = [str(directory), ",".join(methods), str(output), str(setting.num_threads), str(setting.seed)]
    subprocess.run([sys.executable, "-m", "tests.stability", "--merge", *arguments], check=True, env=environment)
    return output


def moved(directory: Path, method: str, reference: Path, other: Path) -> float:
    """Return the distance between two merges over the length of the delta, for the tensor where it is largest."""
    base = load_file(_base(directory, method) / "model.safetensors")
    one, two = (load_file(path / f"{method}.safetensors") for path in (reference, other))
    assert one.keys() == two.keys()
    assert one
    return max(float((one[name] - two[name]).norm() / (one[name] - base[name]).norm()) for name in one)


def _base(directory: Path, method: str) -> Path:
    return directory / ("qwen2" if method == "BEFT" else "llama")


def merge_here(directory: Path, methods: Collection[str], output: Path, *, seed: int = 0) -> Path:
    """Merge each adapter as this process computes; arguments and result as of `merge_all`."""
    output.mkdir()
    for method in methods:
        torch.manual_seed(seed)
        base = _base(directory, method)
        before = load_file(base / "model.safetensors")
        with quiet_libraries():
            merged = PeftModel.from_pretrained(load_plain(base), directory / method).merge_and_unload().state_dict()
        changed = {name: merged[name].contiguous() for name in before if not torch.equal(merged[name], before[name])}
        save_file(changed, output / f"{method}.safetensors")
    return output


def main() -> int:
    """Print how far each method moves with each setting, and return 1 if one moves otherwise than it is said to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--merge", nargs=5, help="directory, methods, output, threads and seed: of a process of its own"
    )
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.merge:
        directory, methods, output, num_threads, seed = arguments.merge
        torch.set_num_threads(int(num_threads))
        merge_here(Path(directory), methods.split(","), Path(output), seed=int(seed))
        return 0
    with tempfile.TemporaryDirectory(prefix="stability-") as scratch:
        methods = sorted(MERGED)
        directory = build(Path(scratch) / "made", methods)
        reference = merge_all(directory, methods, REFERENCE, Path(scratch) / "reference")
        farthest = dict.fromkeys(methods, 0.0)
        for number, (name, setting) in enumerate(SETTINGS.items()):
            output = merge_all(directory, methods, setting, Path(scratch) / str(number))
            for method in methods:
                distance = moved(directory, method, reference, output)
                farthest[method] = max(farthest[method], distance)
                if distance:
                    sys.stdout.write(f"{method}, {name}: {distance:.1e}\n")
    wrong = [method for method in methods if farthest[method] > (STAYS if method not in UNSTABLE else float("inf"))]
    wrong += [method for method in UNSTABLE if farthest[method] < MOVES]
    sys.stdout.write(f"{len(methods)} methods; not as they are said to be: {', '.join(wrong) or 'none'}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
