"""mergefleet against the two merges people run today and a plain copy: time, memory, bytes, and whether the bits agree.

Usage: python -m benchmarks.bench [--shape SHAPE] [--rounds N]

The contenders take turns, so that a slow minute of the machine hurts all of them; the page cache is warm for all.
Prints one table and writes .bench/SHAPE/results.json.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.equality import Comparison, ExactMerge, compare
from benchmarks.make_base import ADAPTERS, SHAPES, make_adapter, make_base
from benchmarks.measurement import Measurement, measure

ADAPTER = "r16-all"
"""The adapter of the single merges."""
_VERSIONS_OF = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workspace:
    """The inputs of one shape, and where runs write."""

    root: Path

    @property
    def base(self) -> Path:
        """The base's directory."""
        return self.root / "base"

    def adapter(self, name: str) -> Path:
        """Return the directory of one adapter."""
        return self.root / "adapters" / name

    def out(self, name: str) -> Path:
        """Return where the last run of a contender left its output."""
        return self.root / "out" / name

    def home(self, name: str) -> Path:
        """Return mergefleet's home for a contender: its caches are there."""
        return self.root / "home" / name

    def prepare(self, shape: str) -> None:
        """Make the base and the adapters, unless they are there."""
        complete = self.root / "complete"
        if complete.exists():
            return
        make_base(shape, self.base)
        for name in ADAPTERS:
            make_adapter(shape, name, self.adapter(name), self.base)
        complete.touch()


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One way to get from base and adapter to a merged checkpoint."""

    name: str
    arguments: Callable[[Workspace], Sequence[str | Path]]
    """Its command line, output path left out: that comes last."""
    keeps_cache: bool = False
    """Whether it finds the caches of its run before; otherwise every run starts with empty ones."""

    def run(self, workspace: Workspace) -> Measurement:
        """Run once, into a fresh output directory."""
        out, home = workspace.out(self.name), workspace.home(self.name)
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        if not self.keeps_cache:
            shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MERGEFLEET_")}
        environment |= {"MERGEFLEET_HOME": str(home), "HF_HUB_OFFLINE": "1"}
        log = workspace.root / f"{self.name}.log"
        return measure([*self.arguments(workspace), out], environment, log)


def _ours(base_quantization: str, adapters: Sequence[str]) -> Callable[[Workspace], Sequence[str | Path]]:
    def arguments(workspace: Workspace) -> Sequence[str | Path]:
        given = [argument for name in adapters for argument in ("--adapter", workspace.adapter(name))]
        command = Path(sys.executable).with_name("mergefleet")
        options = ["--base-quantization", base_quantization, "--parity", "arithmetic", "--json"]
        return [command, "merge", "--base", workspace.base, *given, *options, "--to"]

    return arguments


def _reference(module: str) -> Callable[[Workspace], Sequence[str | Path]]:
    return lambda workspace: [sys.executable, "-m", module, workspace.base, workspace.adapter(ADAPTER)]


COPY = Contender(name="cp -r", arguments=lambda workspace: ["cp", "-r", workspace.base])
OURS_16BIT = Contender(name="mergefleet none", arguments=_ours("none", [ADAPTER]))
REFERENCE_16BIT = Contender(name="reference 16-bit", arguments=_reference("benchmarks.reference_16bit"))
OURS_4BIT = Contender(name="mergefleet nf4", arguments=_ours("nf4", [ADAPTER]))
OURS_4BIT_CACHED = Contender(name="mergefleet nf4, cached", arguments=_ours("nf4", [ADAPTER]), keeps_cache=True)
REFERENCE_4BIT = Contender(name="reference 4-bit", arguments=_reference("benchmarks.reference_4bit"))
CONTENDERS = (COPY, OURS_16BIT, REFERENCE_16BIT, OURS_4BIT, OURS_4BIT_CACHED, REFERENCE_4BIT)

ONE_PASS = Contender(name="one pass", arguments=_ours("nf4", list(ADAPTERS)))
SINGLE_MERGES = {name: Contender(name=f"single {name}", arguments=_ours("nf4", [name])) for name in ADAPTERS}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePass:
    """Four adapters in one pass, with an empty cache, against four single merges of the same."""

    seconds: float
    single_seconds: float
    """Sum of the four single merges."""
    bytes_read: int
    """By the merge, as mergefleet counts them; parity reads what was written and its references again."""
    bytes_given: int
    """Weight files of the base and the four adapters."""
    num_equal: int
    """Adapters whose merged checkpoint is bit for bit that of its single merge."""

    @property
    def time_ratio(self) -> float:
        """Time of the pass over that of the single merges."""
        return self.seconds / self.single_seconds

    @property
    def read_ratio(self) -> float:
        """Bytes read over bytes given."""
        return self.bytes_read / self.bytes_given


def run_rounds(workspace: Workspace, num_rounds: int, console: Console) -> dict[Contender, list[Measurement]]:
    """Run every contender once a round, taking turns."""
    measurements: dict[Contender, list[Measurement]] = {contender: [] for contender in CONTENDERS}
    OURS_4BIT_CACHED.run(workspace)  # fills its cache
    for number in range(1, num_rounds + 1):
        for contender in CONTENDERS:
            measurement = contender.run(workspace)
            measurements[contender].append(measurement)
            console.print(f"round {number}: {contender.name}: {measurement.seconds:.1f} s")
    return measurements


def compare_outputs(workspace: Workspace) -> dict[Contender, Comparison]:
    """Compare what the last round left: each of our merges with the reference of its kind."""
    base, adapter = workspace.base, workspace.adapter(ADAPTER)
    pairs = (
        (OURS_16BIT, REFERENCE_16BIT, False),
        (OURS_4BIT, REFERENCE_4BIT, True),
        (OURS_4BIT_CACHED, REFERENCE_4BIT, True),
    )
    return {
        ours: compare(workspace.out(ours.name), workspace.out(reference.name), ExactMerge(base, adapter, nf4=nf4))
        for ours, reference, nf4 in pairs
    }


def run_one_pass(workspace: Workspace) -> OnePass:
    """Merge all adapters in one pass, then each by itself, all with an empty cache."""
    together = ONE_PASS.run(workspace)
    single_seconds = 0.0
    num_equal = 0
    for name, contender in SINGLE_MERGES.items():
        single_seconds += contender.run(workspace).seconds
        exact = ExactMerge(workspace.base, workspace.adapter(name), nf4=True)
        comparison = compare(workspace.out(ONE_PASS.name) / name, workspace.out(contender.name), exact)
        num_equal += not comparison.differences
    inputs = [workspace.base, *map(workspace.adapter, ADAPTERS)]
    return OnePass(
        seconds=together.seconds,
        single_seconds=single_seconds,
        bytes_read=json.loads(together.output)["usage"]["bytes_read"],
        bytes_given=sum(path.stat().st_size for directory in inputs for path in directory.glob("*.safetensors")),
        num_equal=num_equal,
    )


def show(
    shape: str,
    measurements: dict[Contender, list[Measurement]],
    comparisons: dict[Contender, Comparison],
    one_pass: OnePass,
    console: Console,
) -> None:
    """Print the table, and what one pass over the base saves."""
    num_rounds = len(measurements[COPY])
    title = f"{shape}, adapter {ADAPTER}: median of {num_rounds} (least to most), {os.cpu_count()} cores"
    table = Table("", title=title)
    for heading in ("seconds", "peak MB", "read MB", "written MB"):
        table.add_column(heading, justify="right")
    table.add_column("bits")
    for contender, runs in measurements.items():
        comparison = comparisons.get(contender)
        table.add_row(
            contender.name,
            _spread([run.seconds for run in runs]),
            f"{statistics.median(run.peak_memory_bytes for run in runs) / 1e6:.0f}",
            f"{statistics.median(run.bytes_read for run in runs) / 1e6:.0f}",
            f"{statistics.median(run.bytes_written for run in runs) / 1e6:.0f}",
            comparison.verdict if comparison else "",
        )
    console.print(table)
    console.print("Peak: memory without pages of mapped files. Read and written: through system calls.")
    console.print("Bits: every tensor against the reference merge of the same kind.")
    console.print(
        f"One pass, {len(ADAPTERS)} adapters, nf4, empty cache: {one_pass.seconds:.1f} s against "
        f"{one_pass.single_seconds:.1f} s for single merges ({one_pass.time_ratio:.2f}); the merge read "
        f"{one_pass.read_ratio:.3f} x the weights of base and adapters; "
        f"{one_pass.num_equal} of {len(ADAPTERS)} outputs equal those of the single merges in every bit."
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _processor() -> str:
    """Return what the kernel calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    workspace = Workspace(root=Path(".bench", arguments.shape).absolute())
    workspace.prepare(arguments.shape)
    measurements = run_rounds(workspace, arguments.rounds, console)
    comparisons = compare_outputs(workspace)
    one_pass = run_one_pass(workspace)
    show(arguments.shape, measurements, comparisons, one_pass, console)
    results = {
        "shape": arguments.shape,
        "adapter": ADAPTER,
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS_OF},
        "runs": {
            contender.name: [
                {name: value for name, value in dataclasses.asdict(run).items() if name != "output"} for run in runs
            ]
            for contender, runs in measurements.items()
        },
        "equality": {contender.name: dataclasses.asdict(each) for contender, each in comparisons.items()},
        "one_pass": dataclasses.asdict(one_pass),
    }
    path = workspace.root / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Every run: {path}")
    shutil.rmtree(workspace.root / "out")
    shutil.rmtree(workspace.root / "home")


if __name__ == "__main__":
    main()
