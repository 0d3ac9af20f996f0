"""Merges for the tests: by the engine, and, for expected values, by PEFT and transformers over the whole model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedModel

from jobs.errors import MergefleetError
from jobs.locations import LocalPath
from jobs.parity_report import TensorCheck
from jobs.request import MergeRequest
from tests.models import load_plain
from workers.bases.model import load_config, model_class
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantized_cache import QuantizedCache
from workers.files.shard import WrittenFile
from workers.merging.base_plan import BasePlan, plan_base
from workers.merging.checks.arithmetic import ArithmeticCheck
from workers.merging.checks.evidence import Evidence
from workers.merging.checks.module_checks import check_modules
from workers.merging.context import Context
from workers.merging.job import Job
from workers.merging.merge import PassBytes, run_pass
from workers.merging.module_weights import ModuleWeights
from workers.merging.plan import MergePlan, plan_merge
from workers.merging.tracker import Tracker
from workers.numerics.tiles import single_threads
from workers.parity.inference import quiet_libraries
from workers.sources.fetch import fetch_base
from workers.unit.request_adapters import fetch_adapters

CPU = torch.device("cpu")


class Told(Tracker):
    """A tracker that asks and tells the test."""

    def __init__(self, job_ids: Iterable[str], check: Callable[[str], None], on_bytes: Callable[[int], None]) -> None:
        super().__init__("test", job_ids, frozenset)
        self.check = check
        self.advance = on_bytes


@dataclass(kw_only=True)
class LooseJob(Job):
    """A job without staging: its files stay where they are written, and the test is told of each."""

    on_file: Callable[[str, Any], None]
    past_cache: bool

    @property
    def direct(self) -> bool:
        return self.past_cache

    def ship(self, file: Any) -> None:
        self.on_file(self.id, file)


@dataclass(frozen=True)
class Result:
    """What came of a pass, by job."""

    files: Mapping[str, tuple[WrittenFile, ...]]
    errors: Mapping[str, MergefleetError]
    checks: Mapping[str, tuple[TensorCheck, ...]]
    bytes: PassBytes


def context_of(directory: Path, tracker: Tracker, *, num_threads: int = 2, device: torch.device = CPU) -> Context:
    """Return what all stages share, below a directory."""
    cache = QuantizedCache(directory / "cache", device, num_threads)
    return Context(device=device, num_threads=num_threads, scratch=directory, cache=cache, tracker=tracker)


@dataclass(frozen=True, repr=False)
class Pass:
    """A planned pass of the engine and where its outputs go."""

    base: BasePlan
    quantized: QuantizedBase | None
    weights: ModuleWeights | None
    plans: tuple[MergePlan, ...]
    directory: Path

    def output(self, job_id: str) -> Path:
        """Where the merged shards of a job are."""
        return self.directory / job_id

    def run(
        self,
        *,
        num_threads: int = 2,
        check: Callable[[str], None] = lambda _: None,
        on_bytes: Callable[[int], None] = lambda _: None,
        on_file: Callable[[str, Any], None] = lambda _, __: None,
        direct: bool = False,
        checked: bool = False,
    ) -> Result:
        """Run the pass."""
        jobs = []
        for plan in self.plans:
            place = self.output(plan.request.id)
            place.mkdir(parents=True)
            jobs.append(
                LooseJob(request=plan.request, planned=plan, compared_in=place, on_file=on_file, past_cache=direct)
            )
        tracker = Told((job.id for job in jobs), check, on_bytes)
        took = run_pass(
            self.base,
            self.quantized,
            self.weights,
            jobs,
            context_of(self.directory, tracker, num_threads=num_threads),
            check=ArithmeticCheck(self.base, self.quantized, CPU) if checked else None,
        )
        return Result(
            files={job.id: job.files for job in jobs if job.error is None},
            errors={job.id: job.error for job in jobs if job.error is not None},
            checks={job.id: tuple(job.checks.values()) for job in jobs},
            bytes=took,
        )

    def check(self, *, num_threads: int = 2) -> dict[str, dict[str, TensorCheck]]:
        """Check the arithmetic of all outputs, as they are in their files; by job and tensor."""
        check = ArithmeticCheck(self.base, self.quantized, torch.device("cpu"))
        found = {}
        for plan in self.plans:
            name, directory = plan.request.id, self.output(plan.request.id)
            found[name] = check.files(plan, directory, num_threads=num_threads, stop=lambda: None)
            if plan.by_peft:
                with single_threads(1, "check") as pool:
                    how = {"evidence": Evidence(plan), "stop": lambda: None, "on_bytes": lambda _: None}
                    modules = pool.submit(check_modules, plan, directory, self.weights, **how).result()
                    assert not modules.wrong
                    found[name] |= modules.tensors
        errors = check.quantization_errors
        return {
            job: {
                name: each.model_copy(update={"quantization_error": errors.get(name)}) for name, each in checks.items()
            }
            for job, checks in found.items()
        }


def plan_pass(
    base: Path,
    adapters: Mapping[str, Path],
    directory: Path,
    *,
    inert_fields: frozenset[str] = frozenset(),
    **fields: Any,
) -> Pass:
    """Plan a pass from local directories, and quantize the base where it is wanted.

    Args:
        base: directory of the base.
        adapters: directories by job id.
        directory: where the outputs go, and the cache.
        inert_fields: of the adapters' configurations, as an operator sets them.
        fields: of all requests; `base_quantization` is none unless it is given.
    """
    requests = [
        MergeRequest(
            id=job_id,
            base=str(base),
            adapter=str(adapter),
            destination=str(directory / "releases" / job_id),
            **{"base_quantization": "none"} | fields,
        )
        for job_id, adapter in adapters.items()
    ]
    return plan_requests(requests, directory, inert_fields)


def plan_requests(
    requests: Sequence[MergeRequest], directory: Path, inert_fields: frozenset[str] = frozenset()
) -> Pass:
    """Plan a pass of requests for one local base, and quantize the base where it is wanted.

    Args:
        requests: that share a pass.
        directory: where the outputs go, and the cache.
        inert_fields: as in `plan_pass`.
    """
    base = Path(str(requests[0].base))
    cache = directory / "cache"
    planned = plan_base(fetch_base(LocalPath(base), cache), requests[0])
    requests = [request.settled(planned.usual) for request in requests]
    plans = tuple(
        plan_merge(planned, request, fetch_adapters(request, planned.source, cache, inert_fields), inert_fields)
        for request in requests
    )
    quantized = None
    if planned.form is not None:
        quantized = planned.stored_weights(CPU)
    elif planned.quantization is not None:
        quantized = QuantizedCache(cache, CPU, 2).open(planned.quantization, lambda _: None)
    weights = None
    names = {name for plan in plans for sources in plan.by_peft.values() for name in sources}
    if names:
        (directory / "weights").mkdir(parents=True)
        weights = ModuleWeights(planned, quantized, names, directory / "weights", lambda _: None)
    return Pass(planned, quantized, weights, plans, directory / "outputs")


def merge(
    base: Path, adapter: Path, directory: Path, *, num_threads: int = 2, **fields: Any
) -> dict[str, torch.Tensor]:
    """Merge one adapter by the engine, which has to succeed.

    Returns:
        The tensors of the merged shards, by name.
    """
    planned = plan_pass(base, {"job": adapter}, directory, **fields)
    result = planned.run(num_threads=num_threads)
    assert not result.errors, result.errors
    return read_tensors(planned.output("job"))


def merge_by_peft(
    base: Path,
    adapter: Path,
    directory: Path,
    *,
    dtype: torch.dtype | str = "auto",
    quantization: BitsAndBytesConfig | None = None,
    dequantize: bool = False,
    forget_4bit: bool = False,
    max_shard_size: str = "5GB",
) -> dict[str, torch.Tensor]:
    """Merge one adapter over the whole model, as anybody would: load, dequantize, merge_and_unload, save.

    Args:
        base: directory of the base.
        adapter: directory of the adapter.
        directory: the merged model is saved here.
        dtype: as in `from_pretrained`.
        quantization: how the base is loaded; None for its own weights.
        dequantize: whether the base is stored in 4-bit.
        forget_4bit: whether the flag is taken off that transformers leaves on a dequantized model; IA3 minds it.
        max_shard_size: as in `save_pretrained`.

    Returns:
        The tensors of the saved files, by name.
    """
    with quiet_libraries(), one_torch_thread():
        if quantization is None and not dequantize:
            model = load_plain(base, dtype)
        else:
            model = load_dequantized(base, quantization, dtype)
            if forget_4bit:
                model.is_loaded_in_4bit = False
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        if dequantize:
            # transformers 5.23 cannot undo how it read a 4-bit checkpoint, and refuses to save what it dequantized.
            directory.mkdir(parents=True)
            save_file(dict(merged.state_dict()), directory / "model.safetensors", metadata={"format": "pt"})
        else:
            merged.save_pretrained(directory, max_shard_size=max_shard_size)
    return read_tensors(directory)


def load_dequantized(
    base: Path, quantization: BitsAndBytesConfig | None, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """Load a base in 4-bit, and turn its weights back.

    Args:
        base: directory of the base.
        quantization: how it is loaded; None where it is stored in 4-bit.
        dtype: as in `from_pretrained`.
    """
    how = {"quantization_config": quantization} if quantization is not None else {}
    model = model_class(load_config(base)).from_pretrained(
        base, dtype=dtype, device_map="cpu", local_files_only=True, **how
    )
    return _dequantize(model)


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """MKL adds up the products of a matrix of few rows in another order when it shares them among threads."""
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_before)


def dequantize_without_kernel(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Dequantize as bitsandbytes does on devices that it has no kernel for: code times scale, rounded once."""
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    weight: torch.Tensor = _dequantize_4bit_compute(
        codes.reshape(-1), absmax, state.code, state.blocksize, state.shape, state.dtype
    )
    return weight


def _dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """Dequantize by transformers; weights with blocks over several rows by bitsandbytes' own code for any device.

    The AVX-512 kernel of bitsandbytes 0.50.2 takes the scales of other blocks there.
    """
    weights = {name: module.weight for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    quantized = {name: (weight.data, weight.quant_state) for name, weight in weights.items()}
    model = model.dequantize()
    for name, (codes, state) in quantized.items():
        if state.shape[1] % state.blocksize:
            model.get_submodule(name).weight.data.copy_(dequantize_without_kernel(codes, state))
    return model


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Read all tensors of the safetensors files of a directory."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def open_descriptors() -> set[str]:
    """Return the descriptors this process has open, each with what it is open on.

    What leaks is in a later answer and not in an earlier one; the reverse is what an earlier test had left to Python.
    """
    found = set()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            found.add(f"{path.name} {path.readlink()}")
    return found


def different(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> list[str]:
    """Return what is not bit for bit the same: names, dtypes, shapes and bytes."""
    found = [f"{name}: only in one" for name in sorted(left.keys() ^ right.keys())]
    for name in sorted(left.keys() & right.keys()):
        one, other = left[name], right[name]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            found.append(f"{name}: {one.dtype} {list(one.shape)}, {other.dtype} {list(other.shape)}")
        elif not torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)):
            num_bits = int((one != other).sum())
            found.append(f"{name}: {num_bits} of {one.numel()} elements")
    return found


def asked(sources, directory, **fields):
    """Return the request for a release of one adapter.

    Args:
        sources: base and adapter.
        directory: of the release; its name is the job's.
        fields: other fields of the request; by default the delta is added to the base as it is.
    """
    base, adapter = map(str, sources)
    fields = {"base_quantization": "none", **fields}
    return MergeRequest(id=directory.name, base=base, adapter=adapter, destination=str(directory), **fields)


def release(worker, sources, directory, output, *, base_quantization="none", parity=None, **fields):
    """Merge one adapter and publish the release; return the outcome, also where it has failed.

    Args:
        worker: merges it.
        sources: base and adapter.
        directory: of the release; its name is the job's.
        output: the form.
        base_quantization: as in a request.
        parity: as in a request; arithmetic by default.
        fields: other fields of the request.
    """
    parity = parity or {"level": "arithmetic"}
    request = asked(sources, directory, output=output, base_quantization=base_quantization, parity=parity, **fields)
    (staged,) = worker.run_unit("unit", (request,)).jobs
    return staged if staged.failure is not None else worker.publish(request.id, None)
