"""mergefleet against the merges people run today and a plain copy: time, memory, bytes, and whether the bits agree.

Usage: python -m benchmarks.bench [--shape SHAPE] [--rounds N]

The contenders take turns, so that a slow minute of the machine hurts all of them; the page cache is warm for all. They
run on the disk, and the copy and our 16-bit merges in a tmpfs, too, where no disk hides what computing costs. Ours run
in a process that has everything imported; ratios take the imports off the references' time.

Prints a table for each place and the ratios, and writes .bench/SHAPE/results.json.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import (
    ADAPTER,
    EIGHT,
    FEW,
    Contender,
    Copy,
    Imports,
    Mergekit,
    OurCommand,
    Ours,
    Reference,
    Site,
)
from benchmarks.equality import Comparison, ExactMerge, compare
from benchmarks.make_base import ADAPTERS, SHAPES
from benchmarks.measurement import Measurement
from benchmarks.resident import Resident
from benchmarks.where import draw

_VERSIONS_OF = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "mergekit")
_TMPFS = Path("/dev", "shm")

Runs = dict[str, list[Measurement]]
"""What was measured, by contender."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contenders:
    """All contenders of a benchmark."""

    none: Ours
    none_few: Ours
    nf4: Ours
    nf4_resident: Ours
    none_eight: Ours
    nf4_four: Ours
    nf4_single: tuple[Ours, ...]
    command: OurCommand
    command_four: OurCommand
    command_single: tuple[OurCommand, ...]
    copy: Copy
    copy_eight: Copy
    imports: Imports
    reference_16bit: Reference
    reference_4bit: Reference
    mergekit: Mergekit

    @classmethod
    def of(cls, resident: Resident, model_type: str) -> "Contenders":
        """Return the contenders for models of a type, ours in one process."""

        def ours(name: str, base_quantization: str, *adapters: str, keeps_cache: bool = False) -> Ours:
            return Ours(
                name=name,
                resident=resident,
                base_quantization=base_quantization,
                adapters=adapters or (ADAPTER,),
                keeps_cache=keeps_cache,
            )

        return cls(
            none=ours("ours, none", "none", keeps_cache=True),
            none_few=ours(f"ours, none, {FEW}", "none", FEW, keeps_cache=True),
            nf4=ours("ours, nf4", "nf4"),
            nf4_resident=ours("ours, nf4, base resident", "nf4", keeps_cache=True),
            none_eight=ours(f"ours, none, {len(EIGHT)} adapters", "none", *EIGHT, keeps_cache=True),
            nf4_four=ours(f"ours, nf4, {len(ADAPTERS)} adapters", "nf4", *ADAPTERS),
            nf4_single=tuple(ours(f"ours, nf4, {name}", "nf4", name) for name in ADAPTERS),
            command=OurCommand(base_quantization="none"),
            command_four=OurCommand(base_quantization="nf4", adapters=tuple(ADAPTERS)),
            command_single=tuple(OurCommand(base_quantization="nf4", adapters=(name,)) for name in ADAPTERS),
            copy=Copy(),
            copy_eight=Copy(times=len(EIGHT)),
            imports=Imports(model_type=model_type),
            reference_16bit=Reference(name="reference 16-bit", module="benchmarks.reference_16bit"),
            reference_4bit=Reference(name="reference 4-bit", module="benchmarks.reference_4bit"),
            mergekit=Mergekit(),
        )

    @property
    def ours(self) -> frozenset[str]:
        """Names of those that run in our process."""
        several = (self.none, self.none_few, self.nf4, self.nf4_resident, self.none_eight, self.nf4_four)
        return frozenset(each.name for each in (*several, *self.nf4_single))

    @property
    def on_disk(self) -> tuple[Contender, ...]:
        """Those that take turns on the disk."""
        ours = [each for pair in self.singles for each in pair]
        return (self.copy, *ours, self.command, self.imports, self.reference_16bit, self.reference_4bit, self.mergekit)

    @property
    def singles(self) -> tuple[tuple[Ours, Ours], ...]:
        """Our merges of one adapter, each with itself without the check."""
        return tuple((each, each.without_check()) for each in (self.none, self.none_few, self.nf4, self.nf4_resident))

    @property
    def in_tmpfs(self) -> tuple[Contender, ...]:
        """Those that take turns in a tmpfs."""
        return (self.copy, *self.singles[0], *self.singles[1])

    @property
    def of_eight(self) -> tuple[Contender, ...]:
        """Those of eight adapters."""
        return (self.copy_eight, self.none_eight, self.none_eight.without_check())


def run_rounds(site: Site, contenders: Sequence[Contender], num_rounds: int, console: Console) -> Runs:
    """Run every contender once a round, taking turns."""
    runs: Runs = {contender.name: [] for contender in contenders}
    for number in range(1, num_rounds + 1):
        for contender in contenders:
            measurement = contender.run(site)
            runs[contender.name].append(measurement)
            console.print(f"{site.name}, round {number}: {contender.name}: {measurement.seconds:.1f} s")
    return runs


def compare_outputs(site: Site, contenders: Contenders) -> dict[str, Comparison]:
    """Compare what the last runs left: each of our merges with the reference of its kind, and mergekit's, too."""

    def compared(contender: Contender, reference: Reference, *, nf4: bool) -> Comparison:
        exact = ExactMerge(site.base, site.adapter(ADAPTER), nf4=nf4)
        return compare(site.out(contender.name), site.out(reference.name), exact)

    in_16bit = (contenders.none, contenders.command, contenders.mergekit)
    return {each.name: compared(each, contenders.reference_16bit, nf4=False) for each in in_16bit} | {
        each.name: compared(each, contenders.reference_4bit, nf4=True)
        for each in (contenders.nf4, contenders.nf4_resident)
    }


def num_equal_to_single(site: Site, contenders: Contenders) -> int:
    """Count the adapters whose merge in one pass is, bit for bit, that of its single merge."""
    count = 0
    for name, single in zip(ADAPTERS, contenders.nf4_single, strict=True):
        exact = ExactMerge(site.base, site.adapter(name), nf4=True)
        count += not compare(site.out(contenders.nf4_four.name) / name, site.out(single.name), exact).differences
    return count


def ratios(contenders: Contenders, disk: Runs, tmpfs: Runs, site: Site) -> dict[str, float]:
    """Return what the benchmark is about, by what it says."""

    def seconds(runs: Runs, contender: Contender) -> float:
        return statistics.median(run.seconds for run in runs[contender.name])

    def reference(contender: Contender) -> float:
        return seconds(disk, contender) - seconds(disk, contenders.imports)

    def synced(contender: Contender) -> float:
        syncs = [json.loads(run.output)["sync_seconds"] for run in disk[contender.name]]
        return reference(contender) + statistics.median(syncs)

    singles = sum(seconds(disk, single) for single in contenders.nf4_single)
    commands = sum(seconds(disk, single) for single in contenders.command_single)
    given = [site.base, *map(site.adapter, ADAPTERS)]
    bytes_given = sum(path.stat().st_size for directory in given for path in directory.glob("*.safetensors"))
    bytes_read = json.loads(disk[contenders.nf4_four.name][0].output)["merge_bytes_read"]
    found = {
        "mergekit, imports included / ours, none": seconds(disk, contenders.mergekit) / seconds(disk, contenders.none),
        f"ours, nf4, {len(ADAPTERS)} adapters in one pass / one by one": seconds(disk, contenders.nf4_four) / singles,
        f"mergefleet merge, nf4, {len(ADAPTERS)} adapters in one pass / one by one": seconds(
            disk, contenders.command_four
        )
        / commands,
        "bytes read by that pass / bytes of base and adapters": bytes_read / bytes_given,
    }
    for ours, without in (*contenders.singles, (contenders.none_eight, contenders.none_eight.without_check())):
        for each in (ours, without):
            took = seconds(disk, each)
            times = len(each.adapters)
            if each.adapters != (FEW,):
                other = contenders.reference_4bit if each.base_quantization == "nf4" else contenders.reference_16bit
                several = "" if times == 1 else f"{times} x "
                found[f"{several}{other.name} / {each.name}"] = times * reference(other) / took
                found[f"{several}{other.name} and sync / {each.name}"] = times * synced(other) / took
            if each.base_quantization == "none":
                copy = contenders.copy if times == 1 else contenders.copy_eight
                found[f"{each.name} / {copy.name} (disk)"] = took / seconds(disk, copy)
                if each.name in tmpfs:
                    found[f"{each.name} / {copy.name} (tmpfs)"] = seconds(tmpfs, each) / seconds(tmpfs, copy)
    return found


def table_of(title: str, runs: Runs, ours: frozenset[str], comparisons: dict[str, Comparison]) -> Table:
    """Return the table of one place."""
    table = Table("", title=title)
    for heading in ("seconds", "of it parity", "peak MB", "read MB", "written MB"):
        table.add_column(heading, justify="right")
    table.add_column("bits")
    for name, measurements in runs.items():
        parity = [json.loads(run.output)["stages"]["arithmetic"] for run in measurements if name in ours]
        table.add_row(
            name,
            _spread([run.seconds for run in measurements]),
            f"{statistics.median(parity):.1f}" if parity else "",
            f"{statistics.median(run.peak_memory_bytes for run in measurements) / 1e6:.0f}",
            f"{statistics.median(run.bytes_read for run in measurements) / 1e6:.0f}",
            f"{statistics.median(run.bytes_written for run in measurements) / 1e6:.0f}",
            comparisons[name].verdict if name in comparisons else "",
        )
    return table


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def _plain(run: Measurement) -> dict[str, object]:
    return {name: value for name, value in dataclasses.asdict(run).items() if name != "output"}


def _processor() -> str:
    """Return what the kernel calls the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@contextlib.contextmanager
def _in_tmpfs(disk: Site, console: Console) -> Iterator[Site | None]:
    """Make a site in a tmpfs with the same inputs, if there is room for them and all outputs."""
    num_bytes = sum(path.stat().st_size for path in disk.root.glob("base/*"))
    if not _TMPFS.is_dir() or shutil.disk_usage(_TMPFS).free < 5 * num_bytes:
        console.print(f"No runs in a tmpfs: {_TMPFS} has no room for {5 * num_bytes / 1e9:.1f} GB.")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="mergefleet-bench-", dir=_TMPFS) as directory:
        site = Site("tmpfs", Path(directory))
        shutil.copytree(disk.base, site.base)
        for name in (ADAPTER, FEW):
            shutil.copytree(disk.adapter(name), site.adapter(name))
        yield site


def main() -> None:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    disk = Site("disk", Path(".bench", arguments.shape).absolute())
    disk.prepare(arguments.shape)
    model_type = SHAPES[arguments.shape].model_type
    with Resident(disk.log("resident")) as resident:  # compiles what the machine has not compiled yet
        for ours, _ in Contenders.of(resident, model_type).singles:
            ours.run(disk)
    with Resident(disk.log("resident")) as resident:
        contenders = Contenders.of(resident, model_type)
        for contender in (contenders.copy, *(each for pair in contenders.singles for each in pair)):
            contender.run(disk)  # warms the page cache and the process, and fills the caches that are kept
        on_disk = run_rounds(disk, contenders.on_disk, arguments.rounds, console)
        eight = run_rounds(disk, contenders.of_eight, arguments.rounds, console)
        passes = (contenders.nf4_four, *contenders.nf4_single, contenders.command_four, *contenders.command_single)
        once = run_rounds(disk, passes, 1, console)
        for ours, picture in ((contenders.none, "where-none.svg"), (contenders.nf4, "where-nf4.svg")):
            merges = functools.partial(run_rounds, disk, [ours], arguments.rounds, console)
            draw(resident.pid, merges, disk.root / picture)
        resident.forget(disk.home("kept"))
        with _in_tmpfs(disk, console) as tmpfs:
            in_tmpfs = run_rounds(tmpfs, contenders.in_tmpfs, arguments.rounds, console) if tmpfs else {}
    comparisons = compare_outputs(disk, contenders)
    num_equal = num_equal_to_single(disk, contenders)
    found = ratios(contenders, on_disk | eight | once, in_tmpfs, disk)
    what = f"{arguments.shape}, adapter {ADAPTER} unless said, {os.cpu_count()} cores"
    console.print(
        table_of(
            f"{what}, on disk: median of {arguments.rounds} (least to most)",
            on_disk | eight,
            contenders.ours,
            comparisons,
        )
    )
    console.print(table_of("once, on disk", once, contenders.ours, {}))
    if in_tmpfs:
        console.print(table_of("in a tmpfs", in_tmpfs, contenders.ours, {}))
    for name, ratio in found.items():
        console.print(f"{ratio:8.3f}  {name}")
    console.print(
        "Ours end published and synced, SHA-256 of every file included, and arithmetic parity, as every release has\n"
        "it; the others check nothing, so ours are also measured with the check left out. Ours have planned the base\n"
        "before, except where 4-bit weights start from empty caches. References leave their files to the page cache;\n"
        "what syncing them takes is in the ratios that say so.\n"
        "Ratios to references: less the time that imports take. Peak: memory without pages of mapped files.\n"
        "Bits: every tensor against the reference merge of the same kind.\n"
        f"One pass: {num_equal} of {len(ADAPTERS)} outputs equal those of the single merges in every bit."
    )
    results = {
        "shape": arguments.shape,
        "adapter": ADAPTER,
        "machine": {"cores": os.cpu_count(), "processor": _processor(), "python": platform.python_version()},
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONS_OF},
        "runs": {
            place: {name: [_plain(run) for run in measurements] for name, measurements in runs.items()}
            for place, runs in (("disk", on_disk | eight | once), ("tmpfs", in_tmpfs))
        },
        "ratios": found,
        "equality": {name: dataclasses.asdict(each) for name, each in comparisons.items()},
        "num_equal_in_one_pass": num_equal,
    }
    path = disk.root / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Every run: {path}. Where the time goes: {disk.root / 'where-none.svg'}, where-nf4.svg")
    shutil.rmtree(disk.root / "out")
    shutil.rmtree(disk.root / "home")


if __name__ == "__main__":
    main()
