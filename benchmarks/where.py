"""Where the time of a merge goes: the processor time of each of its parts, as bars.

Usage: python -m benchmarks.where SITE OUT

Merges the adapter of a benchmark's site in this process, by itself, with a clock around each part of the work: into the
base's own weights, and into a 4-bit base that is quantized first. Writes OUT/where.json and OUT/where.svg. The clocks
count processor time of the thread, the kernel's included; what a part waits for is not in it.
"""

import argparse
import collections
import contextlib
import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import torch

from benchmarks.contenders import ADAPTER, Site
from jobs.request import BaseQuantization, MergeRequest, ParityPolicy
from workers import arithmetic, hashing, products, quant, unit, walk, writer
from workers.merging.outcomes import WorkerSettings
from workers.numerics.tiles import TileBuffers, single_threads
from workers.releases.sinks import directory
from workers.worker import MergeWorker

COLOURS = {
    "plan": "#8d99ae",
    "quantize": "#5f0f40",
    "read": "#2a9d8f",
    "dequantize": "#6a4c93",
    "B.A": "#264653",
    "add and round": "#e9c46a",
    "write": "#f4a261",
    "hash": "#e76f51",
    "sync": "#577590",
    "parity": "#bc6c25",
    "other": "#ced4da",
}
"""The parts, in their order."""
_TOGETHER = "B.A, add, round and compare"
"""One loop, whose time is divided afterwards."""


class Clocks:
    """Processor time by part. A part inside another counts for the outer one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self._lock = threading.Lock()
        self._inside = threading.local()
        self._whole: str | None = None
        """A part that all threads are at: what they do is its time, whoever does it."""

    def around(self, owner: Any, name: str, part: str, *, whole: bool) -> contextlib.AbstractContextManager[None]:
        """Have the calls of a function or method counted towards a part, as long as this lasts.

        Args:
            owner: module or class that has it.
            name: of the function.
            part: it is counted towards.
            whole: whether all threads are at this part while it runs.
        """
        return _replaced(owner, name, functools.partial(self._counted, part=part, whole=whole))

    def _counted(self, function: Callable[..., Any], *, part: str, whole: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            if whole:
                self._whole = part
            if getattr(self._inside, "part", None) is not None and not whole:
                return function(*arguments, **options)
            self._inside.part = part
            begin = time.process_time() if whole else time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                took = (time.process_time() if whole else time.thread_time()) - begin
                self._inside.part = None
                with self._lock:
                    if whole:
                        self._whole = None
                        self.seconds[part] += took
                    elif self._whole is None:
                        self.seconds[part] += took

        return counted


@contextlib.contextmanager
def _replaced(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def measure_parts(site: Site, base_quantization: str, room: Path) -> dict[str, float]:
    """Merge once; return the processor time of each part, in seconds, and the wall time as `wall`.

    Args:
        site: has base and adapter, and a release to replace.
        base_quantization: as in a request.
        room: for caches and the release; emptied.
    """
    clocks = Clocks()
    shutil.rmtree(room, ignore_errors=True)
    places = {name: room / name for name in ("cache", "scratch", "reports")}
    request = MergeRequest(
        id=ADAPTER,
        base=str(site.base),
        adapter=str(site.adapter(ADAPTER)),
        destination=str(room / "release"),
        base_quantization=BaseQuantization(base_quantization),
        parity=ParityPolicy(level="arithmetic"),
    )
    worker = MergeWorker(WorkerSettings(**places, device="cpu"))
    with contextlib.ExitStack() as stack, contextlib.closing(worker):
        for owner, name, part, whole in (
            (unit.PlannedBases, "get", "plan", False),
            (unit, "plan_merge", "plan", False),
            (unit.QuantizedCache, "prepare", "quantize", True),
            (walk, "read_into", "read", False),
            (quant.QuantizedWeight, "dequantize_rows", "dequantize", False),
            (products, "merge", _TOGETHER, False),
            (writer.ShardWriter, "_put", "write", False),
            (hashing.Hasher, "_hash", "hash", False),
            (directory, "sync", "sync", False),
            (directory, "sync_tree", "sync", False),
            (arithmetic.ArithmeticCheck, "weight", "parity", False),
            (arithmetic.ArithmeticCheck, "compare", "parity", False),
        ):
            stack.enter_context(clocks.around(owner, name, part, whole=whole))
        begin, cpu_begin = time.perf_counter(), time.process_time()
        outcome = worker.run_unit("where", (request,))
        published = worker.publish(request.id)
        wall, cpu = time.perf_counter() - begin, time.process_time() - cpu_begin
    failures = [each.failure.message for each in (*outcome.jobs, published) if each.failure is not None]
    if failures:
        raise RuntimeError(failures[0])
    shutil.rmtree(room)
    for part, share in _shares().items():
        clocks.seconds[part] += share * clocks.seconds[_TOGETHER]
    parts = {part: clocks.seconds[part] for part in COLOURS}
    return parts | {"other": max(0.0, cpu - sum(parts.values())), "wall": wall}


def _shares() -> dict[str, float]:
    """Return the shares of what is done in one loop, as it is when the rest of it is left out; they add up to 1."""
    num_rows, rank, num_columns = 2048, 16, 2048
    buffers, merged = TileBuffers(torch.device("cpu")), torch.empty(num_rows, num_columns, dtype=torch.bfloat16)
    weight, a, b = torch.ones_like(merged), torch.ones(rank, num_columns), torch.ones(num_rows, rank)
    comparison = products.Comparison.of(weight, a[0].numpy(), 1.0)

    def seconds(**options: Any) -> float:
        begin = time.thread_time()
        products.merge(b, a, 1.0, merged, buffers, **options)
        return time.thread_time() - begin

    steps: list[dict[str, Any]] = [{}, {"weight_OI": weight}, {"weight_OI": weight, "comparison": comparison}]
    with single_threads(1, "shares") as pool:
        of_product, with_sum, of_all = (min(pool.map(lambda step: seconds(**step), [step] * 20)) for step in steps)
    shares = {"B.A": of_product, "add and round": with_sum - of_product, "parity": of_all - with_sum}
    return {part: share / of_all for part, share in shares.items()}


def picture_of(found: Mapping[str, Mapping[str, float]], num_cores: int) -> str:
    """Return bars as an SVG document: for each merge its parts, in seconds of processor time.

    Args:
        found: by title, what `measure_parts` returned.
        num_cores: of the machine, for the note.
    """
    left, width, bar, gap = 90, 860, 34, 46
    longest = max(sum(value for part, value in parts.items() if part != "wall") for parts in found.values())
    lines = []
    for row, (title, parts) in enumerate(found.items()):
        x, y = float(left), 30 + row * (bar + gap)
        lines.append(f'<text x="0" y="{y + 21}" font-weight="bold">{escape(title)}</text>')
        for part, seconds in parts.items():
            if part == "wall" or seconds <= 0:
                continue
            length = seconds / longest * width
            words = f"{part}: {seconds:.2f} s of processor time"
            lines.append(
                f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="{bar}" fill="{COLOURS[part]}">'
                f"<title>{escape(words)}</title></rect>"
            )
            if length > 34:
                lines.append(f'<text x="{x + 4:.1f}" y="{y + 21}" fill="white">{seconds:.1f}</text>')
            x += length
        note = f"{parts['wall']:.1f} s on the clock, {num_cores} cores"
        lines.append(f'<text x="{left}" y="{y + bar + 16}">{note}</text>')
    height = 30 + len(found) * (bar + gap) + 30
    for number, (part, colour) in enumerate(COLOURS.items()):
        x, y = left + number % 6 * 140, height + number // 6 * 20
        lines.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 17}" y="{y}">{escape(part)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="960" height="{height + 40}" font-family="sans-serif" '
        f'font-size="13"><rect width="960" height="{height + 40}" fill="white"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )


def main() -> None:
    """Measure the site named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    site = Site("disk", arguments.site.absolute())
    room = site.root / "where"
    measure_parts(site, "none", room)  # compiles, and warms the page cache
    found = {kind: measure_parts(site, kind, room) for kind in ("none", "nf4")}
    (arguments.out / "where.json").write_text(json.dumps(found, indent=2) + "\n")
    (arguments.out / "where.svg").write_text(picture_of(found, os.cpu_count() or 1))


if __name__ == "__main__":
    main()
