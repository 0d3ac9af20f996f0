"""The pass: the merged shards of all jobs that share a base, each tensor by the lane the plan gave it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from jobs.errors import MergefleetError
from jobs.parity_report import TensorCheck
from workers.bases.quantized_base import QuantizedBase
from workers.files.shard import Conveyor, HashedFile
from workers.merging.arithmetic import ArithmeticCheck
from workers.merging.base_plan import BasePlan
from workers.merging.module_weights import ModuleWeights
from workers.merging.passes import PassJob, PassState, check_range
from workers.merging.peft_lane import merge_modules
from workers.merging.walk import Walk
from workers.numerics.tiles import single_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a pass did."""

    files: dict[str, tuple[HashedFile, ...]]
    """The merged shards of the jobs that went well, by request id."""
    errors: dict[str, MergefleetError]
    """Why the other jobs failed, by request id."""
    checks: dict[str, tuple[TensorCheck, ...]]
    """What was found about the tensors that were streamed, by request id."""
    num_base_bytes_read: int
    """Bytes of the base's own files read; those in 4-bit come out of the cache and do not count."""
    num_adapter_bytes_read: int
    num_bytes_written: int


def run_pass(
    base: BasePlan,
    quantized: QuantizedBase | None,
    weights: ModuleWeights | None,
    jobs: Sequence[PassJob],
    *,
    check: ArithmeticCheck | None,
    device: torch.device,
    num_threads: int,
    on_bytes: Callable[[int], None],
) -> PassResult:
    """Merge several adapters into one base in one walk.

    Memory: tiles of each thread, and the adapter tensors of the weights in work; it does not grow with the model. A
    job that PEFT merges takes one module of the base and the whole adapter besides.

    Args:
        base: the planned base.
        quantized: its weights in 4-bit, where the plan asks for them.
        weights: its weights for PEFT, where a plan leaves any to it.
        jobs: planned on this base; each fails alone.
        check: of what is streamed, on its way into the files; None to leave it out.
        device: where tiles are computed.
        num_threads: threads that compute; twice as many write and hash.
        on_bytes: told the bytes written, and again as they are checked.

    Returns:
        The files of the jobs that went well and the errors of the others.

    Raises:
        NotFoundError, BadInputError, TransientIOError: the base itself cannot be read.
    """
    conveyor = Conveyor.of_threads(num_threads, pin=device.type == "cuda")
    state = PassState(jobs, conveyor, on_bytes)
    walk = Walk(base, quantized, state, check=check, device=device, num_threads=num_threads)
    try:
        with single_threads(num_threads, "merge") as pool:
            for worker in [pool.submit(walk.work) for _ in range(num_threads)]:
                worker.result()
            for name, job in state.jobs.items():
                if job.plan.by_peft:
                    assert weights is not None
                    # One after the other: PEFT changes process-wide state while it wraps a model.
                    pool.submit(_merge_by_peft, state, name, weights).result()
        conveyor.close()
        return _result(state)
    finally:
        conveyor.close()
        walk.close()
        state.close()


def _merge_by_peft(state: PassState, name: str, weights: ModuleWeights) -> None:
    plan = state.jobs[name].plan
    outputs = {tensor.name: tensor for tensor in plan.tensors}
    with state.job(name) as writer:
        if writer is None:
            return
        state.count(adapter=plan.num_adapter_bytes)
        for module in merge_modules(plan, weights):
            state.jobs[name].check()
            if writer.over:
                return
            for output, values in module.outputs.items():
                rounded = values.detach().to(outputs[output].dtype).contiguous()
                check_range(outputs[output], rounded)
                shard, spec = writer.locate(output)
                shard.write_copy(spec.begin, rounded)
                state.count(written=spec.num_bytes)


def _result(state: PassState) -> PassResult:
    files = {name: writer.finished() for name, writer in state.writers.items()}
    errors = {name: writer.error for name, writer in state.writers.items() if writer.error is not None}
    return PassResult(
        files={name: each for name, each in files.items() if name not in errors},
        errors=errors,
        checks={name: tuple(checks) for name, checks in state.checks.items()},
        num_base_bytes_read=state.num_base_bytes,
        num_adapter_bytes_read=state.num_adapter_bytes,
        num_bytes_written=state.num_written,
    )
