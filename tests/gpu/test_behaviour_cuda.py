"""The behavioural check where models run on a GPU."""

from pathlib import Path

import pytest
import torch

from jobs.parity_policy import Thresholds
from jobs.request import MergeRequest
from tests.models import build_llama, make_adapter, merge_with_peft
from workers.adapters.adapter import open_adapter
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_cuda_gives_the_figures_of_the_cpu(tmp_path: Path, quantization: str):
    base = build_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge_with_peft(
        base, adapter, tmp_path / "merged", quant_type=None if quantization == "none" else quantization
    )
    request = MergeRequest(
        id="one", base=str(base), adapter=str(adapter), destination="/releases/one", base_quantization=quantization
    )
    subject = Subject(request=request, merged=merged, adapter=open_adapter(adapter), streamed=True)
    on_gpu, on_cpu = (
        check_behaviour(base, [subject], torch.device(kind), tmp_path, cancelled=lambda: None)["one"]
        for kind in ("cuda", "cpu")
    )
    assert isinstance(on_gpu, tuple)
    assert isinstance(on_cpu, tuple)
    assert on_gpu[0].mean_kl < Thresholds().max_mean_kl / 10
    assert on_gpu[0].mean_kl == pytest.approx(on_cpu[0].mean_kl, rel=0.5)
    assert on_gpu[0].reference_nll == pytest.approx(on_cpu[0].reference_nll, rel=1e-3)
