"""A device is tried before a worker gets work: this machine has no GPU, which is one of the faults."""

import contextlib
import re
import socket
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from jobs.errors import BadInputError, DeviceLostError, FailureClass, OutOfMemoryError
from jobs.request import MergeRequest
from workers.adapters.adapter import Adapter, refusals
from workers.merging.failures import shared_failures
from workers.merging.job import Job
from workers.merging.settings import WorkerSettings
from workers.numerics import device
from workers.numerics.device import device_fault
from workers.parity.foreign_models import model_of
from workers.worker import MergeWorker

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU that works")


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_the_cpu_needs_no_trial(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_fault(name) is None


@no_gpu
def test_a_worker_says_that_its_gpu_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    settings = WorkerSettings(cache=tmp_path, scratch=tmp_path, reports=tmp_path, device="cuda", num_threads=1)
    readiness = MergeWorker(settings).ready()
    assert readiness.host == socket.gethostname()
    assert re.match(r"device 'cuda' cannot be used \(CUDA_VISIBLE_DEVICES is 3\): \w+: \w", readiness.fault)


def test_a_driver_that_hangs_is_a_fault(monkeypatch):
    """The trial is replaced by one that waits: a driver that hangs cannot be had here."""
    ended = threading.Event()
    monkeypatch.setattr(device, "_multiply", lambda _: ended.wait(60))
    fault = device_fault("cuda", seconds=0.05)
    ended.set()
    assert fault.endswith("no answer within 0 s")


DEVICE_FAULTS = (
    torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
)
MEMORY_FAULTS = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)


@pytest.mark.parametrize("error", DEVICE_FAULTS)
def test_a_device_that_fails_at_work_is_told_as_the_loss_of_the_worker(error):
    job = Job(MergeRequest(id="one", base="/b", adapter="/a", destination="/d"))
    with shared_failures([job]):
        raise error
    assert isinstance(job.error, DeviceLostError)
    assert job.error.failure_class is FailureClass.WORKER_LOST
    assert str(job.error) == f"the GPU failed at work: {str(error).splitlines()[0]}; another worker has to do it"


def by_peft():
    adapter = Adapter(Path("/a"), "LORA", LoraConfig(), {})
    return refusals(adapter, "adapter_model.safetensors: PEFT cannot load it")


def by_transformers():
    return model_of(Path("/b"), BadInputError)


@pytest.mark.parametrize("by", [contextlib.nullcontext, by_peft, by_transformers])
@pytest.mark.parametrize("error", [*DEVICE_FAULTS, *MEMORY_FAULTS])
def test_the_machine_is_no_fault_of_the_files_that_are_worked_on(by, error):
    job = Job(MergeRequest(id="one", base="/b", adapter="/a", destination="/d"))
    with shared_failures([job]), by():
        raise error
    assert isinstance(job.error, DeviceLostError if error in DEVICE_FAULTS else OutOfMemoryError)


@pytest.mark.parametrize("by", [by_peft, by_transformers])
def test_what_a_library_of_cuda_refuses_is_the_fault_of_the_files(by):
    with pytest.raises(BadInputError), by():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")


def test_other_runtime_errors_stay_faults():
    job = Job(MergeRequest(id="one", base="/b", adapter="/a", destination="/d"))
    with shared_failures([job]):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert job.error.failure_class is FailureClass.INTERNAL


def test_a_device_that_computes_wrongly_is_a_fault(monkeypatch):
    """The device is the CPU, and its product is off by one."""
    multiply, mm = device._multiply, torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: mm(a, b) + 1)
    monkeypatch.setattr(device, "_multiply", lambda _: multiply(torch.device("cpu")))
    assert device_fault("cuda").endswith("a product of ones is 65.0 to 65.0, not 64")
    monkeypatch.setattr(torch, "mm", mm)
    assert device_fault("cuda") is None
