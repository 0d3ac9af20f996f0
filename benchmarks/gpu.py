"""A GPU at work: merges of one adapter into a base held there in 4-bit, against what the machine could move at best.

Usage: python -m benchmarks.gpu [--shape SHAPE] [--root DIRECTORY] [--rounds N] [--threads N]

Makes the base and an adapter in a tmpfs, and measures what copies from the device and writes to the tmpfs reach by
themselves. Then, on the device: merges into the 16-bit weights, and into 4-bit ones, the first of which quantizes the
base and leaves it resident. The same merges on the CPU tell how far the results of the two are apart. Prints a table.
The tmpfs takes three times the base's 16 bits, and what its 4 bits take twice.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from benchmarks.contenders import ADAPTER
from benchmarks.make_base import SHAPES, make_adapter, make_base
from benchmarks.unchecked import check_left_out
from cluster.commands.plan import preview
from jobs.parity_policy import ParityPolicy
from jobs.request import BaseQuantization, MergeRequest
from workers.merging.settings import WorkerSettings
from workers.numerics.rounding import half_ulp
from workers.unit.estimate import Estimate
from workers.worker import MergeWorker

_COPY_BYTES = 1 << 30
_WRITE_BYTES = 1 << 20


def copy_rate() -> float:
    """Return the bytes a second that a copy from the device to pinned memory reaches."""
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


def write_rate(directory: Path, num_threads: int, *, hashed: bool = False) -> float:
    """Return the bytes a second that threads reach that write to a file each, and take its SHA-256 as well."""
    data = memoryview(bytearray(os.urandom(_WRITE_BYTES)))

    def write(number: int) -> None:
        digest = hashlib.sha256()
        with Path(directory, f"write-{number}").open("wb", buffering=0) as file:
            for _ in range(_COPY_BYTES // _WRITE_BYTES):
                file.write(data)
                if hashed:
                    digest.update(data)

    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(write, range(num_threads)))
        best = min(best, time.perf_counter() - begin)
        for path in directory.glob("write-*"):
            path.unlink()
    return num_threads * _COPY_BYTES / best


class Tensors:
    """The tensors of all safetensors files below a directory, read onto the device."""

    def __init__(self, directory: Path) -> None:
        self._files = [safe_open(path, framework="pt", device="cuda") for path in directory.rglob("*.safetensors")]
        self._holders = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118 - it is no mapping

    @property
    def names(self) -> list[str]:
        """Their names."""
        return sorted(self._holders)

    def read(self, name: str) -> torch.Tensor:
        """Return one of them."""
        tensor: torch.Tensor = self._holders[name].get_tensor(name)
        return tensor


@dataclass(slots=True)
class Difference:
    """How far two checkpoints are apart."""

    num_elements: int = 0
    num_different: int = 0
    num_beyond: int = 0
    """Elements that are more than one unit in the last place apart."""
    largest: float = 0.0
    """Distance of the two, in units in the last place of the smaller one."""

    @classmethod
    def between(cls, left: Path, right: Path) -> "Difference":
        """Compare all tensors below two directories."""
        found = cls()
        ours, theirs = Tensors(left), Tensors(right)
        if ours.names != theirs.names:
            raise RuntimeError(f"{left} and {right} do not hold the same tensors")
        for name in ours.names:
            tensor, other = ours.read(name), theirs.read(name)
            found.num_elements += tensor.numel()
            different = tensor != other
            a, b = tensor[different], other[different]
            found.num_different += a.numel()
            if a.numel() and a.is_floating_point():
                units = torch.minimum(half_ulp(a), half_ulp(b)).double().mul_(2)
                distance = (a.double() - b.double()).abs_().div_(units)
                found.num_beyond += int((distance > 1).sum())
                found.largest = max(found.largest, float(distance.max()))
        return found

    def __str__(self) -> str:
        share = self.num_different / self.num_elements
        return (
            f"{self.num_different} of {self.num_elements} differ ({share:.1e}), {self.num_beyond} by more than a unit "
            f"in the last place, the largest by {self.largest:.0f}"
        )


@dataclass(frozen=True, slots=True)
class Merged:
    """One merge."""

    seconds: float
    stages: dict[str, float]
    device_bytes: int
    """Peak of the device's memory."""


class Fleet:
    """One worker on each device, over the same base."""

    def __init__(self, root: Path, num_threads: int | None) -> None:
        self._root = root
        self._num_threads = num_threads
        self._workers: dict[str, MergeWorker] = {}

    def out(self, device: str) -> Path:
        """Return where a device's last release is."""
        return self._root / device / "out"

    def cache(self, device: str) -> Path:
        """Return where a device's bases in 4-bit are kept."""
        return self._root / device / "cache"

    def request(self, device: str, quantization: str) -> MergeRequest:
        """Return what is asked of a device."""
        return MergeRequest(
            id=f"{device}-{quantization}",
            base=str(self._root / "base"),
            adapter=str(self._root / "adapter"),
            destination=str(self.out(device)),
            base_quantization=BaseQuantization(quantization),
            parity=ParityPolicy(level="arithmetic"),
        )

    def planned(self, quantization: str) -> Estimate:
        """Return what `mergefleet plan` says of a merge on the GPU."""
        (planned,) = preview([self.request("cuda", quantization)], self.cache("cuda"), self._num_threads, "cuda")
        if planned.estimate is None:
            raise RuntimeError(f"the merge cannot be planned: {planned.failure}")
        return planned.estimate

    def merge(self, device: str, quantization: str) -> Merged:
        """Merge the adapter; what the device merged before is removed."""
        if device not in self._workers:
            places = {name: self._root / device / name for name in ("cache", "scratch", "reports")}
            self._workers[device] = MergeWorker(WorkerSettings(**places, device=device, num_threads=self._num_threads))
        shutil.rmtree(self.out(device), ignore_errors=True)
        request, worker = self.request(device, quantization), self._workers[device]
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        outcome = worker.run_unit("gpu", (request,))
        published = worker.publish(request.id)
        seconds = time.perf_counter() - begin
        for job in (*outcome.jobs, published):
            if job.failure is not None:
                raise RuntimeError(job.failure.message)
        return Merged(seconds, dict(outcome.usage.seconds), torch.cuda.max_memory_allocated())


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--root", type=Path, default=Path("/dev/shm"), help="a tmpfs")  # noqa: S108
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of a worker; all cores by default")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this process sees no CUDA device; run it where there is one")
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="mergefleet-gpu-", dir=arguments.root) as directory:
        root = Path(directory)
        begin = time.perf_counter()
        make_base(arguments.shape, root / "base", "cuda")
        make_adapter(arguments.shape, ADAPTER, root / "adapter", root / "base")
        num_bytes = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
        console.print(f"base of {num_bytes / 1e9:.1f} GB made in {time.perf_counter() - begin:.0f} s")
        num_cores = os.cpu_count() or 1
        copies, writes = copy_rate(), write_rate(root, num_cores)
        hashed = write_rate(root, num_cores, hashed=True)
        console.print(
            f"device to pinned memory {copies / 1e9:.1f} GB/s; {num_cores} threads write {writes / 1e9:.1f} GB/s to "
            f"the tmpfs, and {hashed / 1e9:.1f} GB/s if they take SHA-256 as well"
        )
        fleet = Fleet(root, arguments.threads)
        figures: dict[str, dict[str, str]] = {}
        for quantization in ("none", "nf4"):  # the base in 4-bit stays on the device
            first = fleet.merge("cuda", quantization)
            with check_left_out():
                unchecked = [fleet.merge("cuda", quantization) for _ in range(arguments.rounds)]
            checked = [fleet.merge("cuda", quantization) for _ in range(arguments.rounds)]
            on_cpu = fleet.merge("cpu", quantization)
            planned = fleet.planned(quantization)
            merge = statistics.median(each.stages["merge"] for each in unchecked)
            rate = num_bytes / merge
            figures[quantization] = {
                "seconds, first": f"{first.seconds:.1f}",
                "of them quantizing": f"{first.stages.get('quantize', 0.0):.1f}",
                "seconds": _spread([each.seconds for each in checked]),
                "seconds, check left out": _spread([each.seconds for each in unchecked]),
                "of them merging": f"{merge:.2f}",
                "GB/s of that": f"{rate / 1e9:.1f}",
                "of copies and writes": f"{rate / min(copies, writes):.0%}",
                "of copies and hashed writes": f"{rate / min(copies, hashed):.0%}",
                "GPU memory, GB": f"{max(each.device_bytes for each in (first, *checked)) / 1e9:.1f}",
                "planned": f"{planned.peak_device_memory_bytes / 1e9:.1f}",
                "held by torch": f"{torch.cuda.max_memory_reserved() / 1e9:.1f}",
                "seconds, first, on the CPU": f"{on_cpu.seconds:.1f}",
            }
            what = {"elements": fleet.out}
            if quantization == "nf4":
                what |= {"codes and scales": fleet.cache}
            for name, place in what.items():
                console.print(
                    f"{quantization}, GPU beside CPU: {name}: {Difference.between(place('cuda'), place('cpu'))}"
                )
            for device in ("cuda", "cpu"):
                shutil.rmtree(fleet.cache(device), ignore_errors=True)
        table = Table(
            "", *figures, title=f"{torch.cuda.get_device_name()}, {arguments.shape}, {ADAPTER}, {num_cores} cores"
        )
        for name in figures["nf4"]:
            table.add_row(name, *(figures[quantization][name] for quantization in figures))
        console.print(table)


def _spread(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})"


if __name__ == "__main__":
    main()
