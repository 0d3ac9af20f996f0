"""A GPU at work: merges of one adapter into a base held there in 4-bit, against what the machine could move at best.

Usage: python -m benchmarks.gpu [--shape SHAPE] [--root DIRECTORY] [--rounds N]

Makes the base and adapters in a tmpfs and measures what copies from the device and writes to the tmpfs reach by
themselves; then, on the device: the first merge, which quantizes the base, merges with the base resident, and a merge
into the 16-bit weights. The same merges on the CPU tell how far the results of the two are apart. Prints a table.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from benchmarks.contenders import ADAPTER
from benchmarks.make_base import SHAPES, make_adapter, make_base
from benchmarks.unchecked import check_left_out
from jobs.request import BaseQuantization, MergeRequest, ParityPolicy
from workers.outcomes import WorkerSettings
from workers.worker import MergeWorker

_COPY_BYTES = 1 << 30
_WRITE_BYTES = 1 << 20


def device_to_host_rate() -> float:
    """Return the bytes a second that a copy to pinned memory reaches."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    best = float("inf")
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return _COPY_BYTES / best


def write_rate(directory: Path, num_threads: int) -> float:
    """Return the bytes a second that threads reach that write to a file each."""
    data = memoryview(bytearray(os.urandom(_WRITE_BYTES)))

    def write(number: int) -> None:
        with Path(directory, f"write-{number}").open("wb") as file:
            for _ in range(_COPY_BYTES // _WRITE_BYTES):
                file.write(data)

    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(write, range(num_threads)))
        best = min(best, time.perf_counter() - begin)
        for path in directory.glob("write-*"):
            path.unlink()
    return num_threads * _COPY_BYTES / best


def tensors_of(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a checkpoint."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)


def difference(left: Path, right: Path) -> tuple[float, float]:
    """Return the share of elements in which two checkpoints differ, and the largest relative difference."""
    num_different = num_elements = 0
    largest = 0.0
    others = dict(tensors_of(right))
    for name, tensor in tensors_of(left):
        other = others[name]
        different = tensor != other
        num_elements += tensor.numel()
        count = int(different.sum())
        if count:
            num_different += count
            a, b = tensor[different].double(), other[different].double()
            largest = max(largest, float(((a - b).abs() / torch.maximum(a.abs(), b.abs())).max()))
    return num_different / num_elements, largest


class Fleet:
    """One worker on each device, over the same base."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._workers: dict[str, MergeWorker] = {}

    def merge(self, device: str, quantization: str) -> tuple[float, dict[str, float], Path]:
        """Merge the adapter; return the seconds, those of each stage, and where the release is."""
        if device not in self._workers:
            places = {name: self._root / device / name for name in ("cache", "scratch", "reports")}
            self._workers[device] = MergeWorker(WorkerSettings(**places, device=device))
        out = self._root / device / quantization
        shutil.rmtree(out, ignore_errors=True)
        request = MergeRequest(
            id=f"{device}-{quantization}",
            base=str(self._root / "base"),
            adapter=str(self._root / "adapter"),
            destination=str(out),
            base_quantization=BaseQuantization(quantization),
            parity=ParityPolicy(level="arithmetic"),
        )
        worker = self._workers[device]
        begin = time.perf_counter()
        outcome = worker.run_unit("gpu", (request,))
        published = worker.publish(request.id)
        seconds = time.perf_counter() - begin
        for job in (*outcome.jobs, published):
            if job.failure is not None:
                raise RuntimeError(job.failure.message)
        return seconds, outcome.usage.seconds, out


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--root", type=Path, default=Path("/dev/shm"), help="a tmpfs")  # noqa: S108
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this process sees no CUDA device; run it where there is one")
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="mergefleet-gpu-", dir=arguments.root) as directory:
        root = Path(directory)
        begin = time.perf_counter()
        make_base(arguments.shape, root / "base")
        make_adapter(arguments.shape, ADAPTER, root / "adapter", root / "base")
        num_bytes = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
        console.print(f"base of {num_bytes / 1e9:.1f} GB made in {time.perf_counter() - begin:.0f} s")
        copies, writes = device_to_host_rate(), write_rate(root, os.cpu_count() or 1)
        console.print(f"device to pinned memory {copies / 1e9:.1f} GB/s, tmpfs writes {writes / 1e9:.1f} GB/s")
        table = Table(title=f"{torch.cuda.get_device_name()}, {arguments.shape}, {ADAPTER}, {os.cpu_count()} cores")
        for heading in (
            "",
            "seconds",
            "merge, check left out",
            "parity",
            "GB/s of merge",
            "of the ceiling",
            "device GB",
        ):
            table.add_column(heading, justify="right")
        fleet = Fleet(root)
        runs = [("nf4, empty cache", "cuda", "nf4", 1), ("nf4, base resident", "cuda", "nf4", arguments.rounds)]
        runs += [
            ("none", "cuda", "none", arguments.rounds),
            ("CPU, nf4", "cpu", "nf4", 1),
            ("CPU, none", "cpu", "none", 1),
        ]
        outputs: dict[tuple[str, str], Path] = {}
        for what, device, quantization, rounds in runs:
            torch.cuda.reset_peak_memory_stats()
            measured = [fleet.merge(device, quantization) for _ in range(rounds)]
            seconds, stages, outputs[device, quantization] = measured[len(measured) // 2]
            seconds = statistics.median(each[0] for each in measured)
            with check_left_out():
                merge = statistics.median(
                    fleet.merge(device, quantization)[1]["merge"] for _ in range(rounds if device == "cuda" else 1)
                )
            rate = num_bytes / merge
            table.add_row(
                what,
                f"{seconds:.1f}",
                f"{stages['arithmetic']:.1f}",
                f"{merge:.1f}",
                f"{rate / 1e9:.2f}",
                f"{rate / min(copies, writes):.0%}" if device == "cuda" else "",
                f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device == "cuda" else "",
            )
        console.print(table)
        for quantization in ("none", "nf4"):
            share, largest = difference(outputs["cuda", quantization], outputs["cpu", quantization])
            console.print(
                f"{quantization}: {share:.2e} of the elements differ from the CPU's, by at most {largest:.2e}"
            )


if __name__ == "__main__":
    main()
