"""The pass: the merged shards of all jobs that share a base, each tensor by the lane the plan gave it."""

from collections.abc import Sequence
from dataclasses import dataclass

from workers.bases.quantized_base import QuantizedBase
from workers.files.conveyor import Conveyor
from workers.files.local import FileState, file_errors
from workers.files.shard import Origin
from workers.files.writer import CheckpointWriter
from workers.merging.base_plan import BasePlan
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.context import Context
from workers.merging.job import Job
from workers.merging.module_weights import ModuleWeights
from workers.merging.passes import PassState, check_range
from workers.merging.peft_lane import merge_modules
from workers.merging.plan import MergePlan
from workers.merging.stream_lane import Walk
from workers.numerics.tiles import single_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class PassBytes:
    """What a pass read and wrote."""

    of_base: int
    """Of the base's own files; what is in 4-bit comes out of the cache and does not count."""
    of_adapters: int
    written: int


def run_pass(
    base: BasePlan,
    quantized: QuantizedBase | None,
    weights: ModuleWeights | None,
    jobs: Sequence[Job],
    context: Context,
    *,
    check: ArithmeticCheck | None,
) -> PassBytes:
    """Merge several adapters into one base in one walk, each as far as its plan, or the part of it in work, says.

    A job that went well has its files and what the check found; the others have their errors.

    Memory: tiles of each thread, and the adapter tensors of the weights in work; it does not grow with the model. A
    job that PEFT merges takes one module of the base and the whole adapter besides.

    Args:
        base: the planned base.
        quantized: its weights in 4-bit, where the plan asks for them.
        weights: its weights for PEFT, where a plan leaves any to it.
        jobs: planned on this base, their directories empty of what is to be written; each fails alone.
        context: twice as many threads as compute write and hash.
        check: of what is streamed, on its way into the files; None to leave it out.

    Raises:
        NotFoundError, BadInputError, TransientIOError: the base itself cannot be read.
    """
    conveyor = Conveyor.of_threads(context.num_threads, pin=context.device.type == "cuda")
    state = PassState(jobs, {job.id: _writer(job, conveyor) for job in jobs}, context.tracker)
    walk = Walk(base, quantized, state, check, context)
    try:
        with single_threads(context.num_threads, "merge") as pool:
            for worker in [pool.submit(walk.work) for _ in range(context.num_threads)]:
                worker.result()
            for job in jobs:
                if job.in_work.by_peft:
                    assert weights is not None
                    # One after the other: PEFT changes process-wide state while it wraps a model.
                    pool.submit(_merge_by_peft, state, job, weights).result()
        conveyor.close()
        state.settle()
        return PassBytes(of_base=state.num_base_bytes, of_adapters=state.num_adapter_bytes, written=state.num_written)
    finally:
        conveyor.close()
        walk.close()
        state.close()


def _writer(job: Job, conveyor: Conveyor) -> CheckpointWriter:
    return CheckpointWriter(
        job.merged_in,
        job.written,
        conveyor,
        direct=job.direct,
        on_file=None if job.merges_apart else job.ship,
        # What is read again would come from the disk: a clone shares no page of the cache with its origin.
        origin=_origin(job.in_work) if job.direct else None,
    )


def _origin(plan: MergePlan) -> Origin:
    directory = plan.base.source.directory
    names = {plan.output.tensors[name][0].name for name in plan.kept}
    with file_errors(f"reading {directory}", directory):
        states = {name: FileState.of((directory / name).stat()) for name in names}
    return Origin(directory, plan.kept, states)


def _merge_by_peft(state: PassState, job: Job, weights: ModuleWeights) -> None:
    plan = job.in_work
    outputs = {tensor.name: tensor for tensor in plan.tensors}
    with state.of(job) as writer:
        if writer is None:
            return
        state.count(adapter=plan.num_adapter_bytes)
        for module in merge_modules(plan, weights):
            if not state.well([job]):
                return
            for output, values in module.outputs.items():
                rounded = values.detach().to(outputs[output].dtype).contiguous()
                check_range(outputs[output], rounded)
                shard, spec = writer.locate(output)
                shard.write_copy(spec.begin, rounded)
                state.count(written=spec.num_bytes)
