"""Releases in each form that a request can name, held against the release of plain numbers from the same base.

Usage: python -m benchmarks.outputs [--shape SHAPE] [--rounds N]

The contenders take turns: each form by itself, and all of them in one pass. One adapter on all linears, arithmetic
parity included, in a process that has everything imported.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.make_base import SHAPES, make_adapter, make_base
from benchmarks.measurement import Measurement
from benchmarks.resident import Resident
from jobs.output_form import OutputForm
from workers.bases.forms.compressed.output import PRESETS

_ADAPTER = "r16-all"
_ALL = (OutputForm.PLAIN, *PRESETS)
_CONTENDERS: Mapping[str, Sequence[OutputForm]] = {each.value: (each,) for each in _ALL} | {
    f"all {len(_ALL)} at once": _ALL
}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="outputs-", dir=arguments.directory) as name:
        directory = Path(name)
        base, adapter, out = directory / "base", directory / "adapter", directory / "out"
        make_base(arguments.shape, base)
        make_adapter(arguments.shape, _ADAPTER, adapter, base)
        num_bytes = sum(path.stat().st_size for each in (base, adapter) for path in each.glob("*.safetensors"))
        runs: dict[str, list[Measurement]] = {contender: [] for contender in _CONTENDERS}
        with Resident(directory / "log") as resident:
            for _ in range(arguments.rounds):
                for contender, outputs in _CONTENDERS.items():
                    home = directory / "home"
                    runs[contender].append(
                        resident.merge(base, [adapter], out, base_quantization="none", home=home, outputs=outputs)
                    )
                    shutil.rmtree(out)
                    os.sync()
    print(f"| from a base of {arguments.shape} | seconds | times 16bit | base and adapter read | peak memory |")
    print("|---|---|---|---|---|")
    plain = statistics.median(run.seconds for run in runs[OutputForm.PLAIN.value])
    for contender, measured in runs.items():
        seconds = [run.seconds for run in measured]
        middle, spread = statistics.median(seconds), f"{min(seconds):.1f}-{max(seconds):.1f}"
        read = json.loads(measured[-1].output)["merge_bytes_read"] / num_bytes
        peak = max(run.peak_memory_bytes for run in measured) / 1e6
        print(f"| {contender} | {middle:.1f} ({spread}) | {middle / plain:.2f} | {read:.3f} x | {peak:.0f} MB |")
        stages = json.loads(measured[-1].output)["stages"]
        print(f"<!-- {', '.join(f'{stage} {taken:.1f}' for stage, taken in stages.items())} -->")


if __name__ == "__main__":
    main()
