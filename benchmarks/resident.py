"""mergefleet in a process that has everything imported already, as a worker of a fleet is: merges on order, measured.

The process reads orders from its standard input, a JSON object a line, and answers each with one.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.measurement import Measurement, PeakMemory, bytes_moved
from benchmarks.unchecked import check_left_out
from jobs.output_form import OutputForm
from jobs.parity_policy import ParityPolicy
from jobs.request import BaseQuantization, MergeRequest
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker


class Resident:
    """The process, seen from outside. Use it as a context."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            command = [sys.executable, "-m", "benchmarks.resident"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def merge(
        self,
        base: Path,
        adapters: Sequence[Path],
        out: Path,
        *,
        base_quantization: str,
        home: Path,
        outputs: Sequence[OutputForm] = (OutputForm.PLAIN,),
        checked: bool = True,
    ) -> Measurement:
        """Merge adapters in one pass.

        Args:
            base: the base.
            adapters: of one adapter the release is at `out`, of several under it, by the name of their directories.
            out: a new directory.
            base_quantization: as in a request.
            outputs: the forms of each adapter's release; whatever is left of the delta passes.
            home: of caches, scratch and reports; one worker serves all orders with the same home.
            checked: whether arithmetic parity is part of it.

        Raises:
            RuntimeError: a merge failed, or the process ended.
        """
        wanted = [(adapter, output) for adapter in adapters for output in outputs]
        names = [adapter.name if len(outputs) == 1 else f"{adapter.name}-{output}" for adapter, output in wanted]
        requests = [
            MergeRequest(
                id=name,
                base=str(base),
                adapter=str(adapter),
                destination=str(out if len(wanted) == 1 else out / name),
                base_quantization=BaseQuantization(base_quantization),
                output=output,
                parity=ParityPolicy.model_validate({"level": "arithmetic", "thresholds": {"min_survival": 0}}),
            )
            for name, (adapter, output) in zip(names, wanted, strict=True)
        ]
        read, written = bytes_moved(self._process.pid)
        peak = PeakMemory(self._process.pid)
        try:
            answer = self._ask(
                {
                    "home": str(home),
                    "requests": [each.model_dump(mode="json") for each in requests],
                    "checked": checked,
                }
            )
        finally:
            peak_memory_bytes = peak.stop()
        read_after, written_after = bytes_moved(self._process.pid)
        return Measurement(
            seconds=answer["seconds"],
            peak_memory_bytes=peak_memory_bytes,
            bytes_read=read_after - read,
            bytes_written=written_after - written,
            output=json.dumps(answer),
        )

    def forget(self, home: Path) -> None:
        """End the worker of a home, which lets go of the bases it holds."""
        self._ask({"home": str(home), "requests": None})

    def _ask(self, order: dict[str, object]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or b'{"failure": "the process ended"}')
        if "failure" in answer:
            raise RuntimeError(f"mergefleet in a warm process: {answer['failure']}; its log is {self._log}")
        return answer


def _carry_out(workers: dict[str, MergeWorker], order: dict[str, Any]) -> dict[str, object]:
    home = order["home"]
    if order["requests"] is None:
        if home in workers:
            workers.pop(home).close()
        return {}
    if home not in workers:
        places = {name: Path(home, name) for name in ("cache", "scratch", "reports")}
        workers[home] = MergeWorker(WorkerSettings(**places, device="cpu"))
    worker = workers[home]
    requests = tuple(map(MergeRequest.model_validate, order["requests"]))
    with contextlib.nullcontext() if order["checked"] else check_left_out():
        start = time.perf_counter()
        outcome = worker.run_unit("bench", requests)
        published = [worker.publish(job.job_id) for job in outcome.jobs if job.failure is None]
        seconds = time.perf_counter() - start
    failures = [job.failure.message for job in (*outcome.jobs, *published) if job.failure is not None]
    if failures:
        return {"failure": failures[0]}
    return {"seconds": seconds, "stages": outcome.usage.seconds, "merge_bytes_read": outcome.usage.bytes_read}


def main() -> None:
    """Carry out orders until there are no more."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    workers: dict[str, MergeWorker] = {}
    for line in sys.stdin:
        answers.write(json.dumps(_carry_out(workers, json.loads(line))) + "\n")
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    main()
