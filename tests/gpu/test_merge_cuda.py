"""The worker on a GPU: bases quantized, kept resident, merged and checked there."""

from pathlib import Path

import pytest
import torch

from jobs.request import MergeRequest
from tests.merges import read_tensors
from tests.models import build_llama, make_adapter, merge_with_peft
from workers.merging.settings import WorkerSettings
from workers.unit import unit
from workers.unit.footprint import resident_bytes
from workers.worker import MergeWorker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    ("quantization", "double_quant"), [("none", False), ("nf4", False), ("nf4", True), ("fp4", False)]
)
def test_merge_is_that_of_peft_on_the_gpu(tmp_path: Path, quantization: str, double_quant: bool):
    """Products of tiles may be added up in another order than those of a whole weight: few elements, one rounding."""
    base = build_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    quant_type = None if quantization == "none" else quantization
    expected = read_tensors(
        merge_with_peft(
            base,
            adapter,
            tmp_path / "expected",
            quant_type=quant_type,
            double_quant=double_quant,
            device="cuda",
        )
    )
    worker = MergeWorker(
        WorkerSettings(cache=tmp_path / "c", scratch=tmp_path / "s", reports=tmp_path / "r", device="cuda")
    )
    digests = set()
    for name in ("cold", "resident"):
        request = MergeRequest(
            id=name,
            base=str(base),
            adapter=str(adapter),
            destination=str(tmp_path / name),
            base_quantization=quantization,
            quantization_options={"bnb_4bit_use_double_quant": double_quant} if quant_type else {},
        )
        (job,) = worker.run_unit(name, (request,)).jobs
        assert job.failure is None, job.failure
        release = worker.publish(name).release
        assert release is not None
        digests.add(tuple(file.sha256 for file in release.manifest.files if file.path.endswith(".safetensors")))
        merged = read_tensors(tmp_path / name)
        assert merged.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(merged[key], tensor, rtol=2**-7, atol=2**-20)
            assert (merged[key] == tensor).float().mean() > 0.999, key
    assert len(digests) == 1
    worker.close()


def test_a_base_that_does_not_fit_is_merged_into_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = build_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    worker = MergeWorker(
        WorkerSettings(cache=tmp_path / "c", scratch=tmp_path / "s", reports=tmp_path / "r", device="cuda")
    )
    merged = {}
    for name, size in (("held", resident_bytes), ("passing", lambda _: 1 << 50)):
        monkeypatch.setattr(unit, "resident_bytes", size)
        request = MergeRequest(
            id=name, base=str(base), adapter=str(adapter), destination=str(tmp_path / name), base_quantization="nf4"
        )
        (job,) = worker.run_unit(name, (request,)).jobs
        assert job.failure is None, job.failure
        held = worker._residents.num_device_bytes(request.pass_key())
        assert (held == 0) == (name == "passing")
        assert worker.publish(name).release is not None
        merged[name] = read_tensors(tmp_path / name)
    for key, tensor in merged["held"].items():
        assert torch.equal(merged["passing"][key], tensor), key
    worker.close()
