"""What the behavioural check takes is what was stated beforehand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.request import MergeRequest
from tests.models import build_llama, make_adapter, merge_with_peft
from workers.merging.base_plan import plan_base
from workers.merging.plan import plan_merge
from workers.parity.peak import estimate_peak_bytes
from workers.sources.fetch import fetch_adapter, fetch_base

# Samples its own memory every 20 ms: anonymous and shared pages, not those of mapped files.
MEASURE = """
import json, re, sys, threading, time
from pathlib import Path

peak = 0

def sample():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        sizes = (int(re.search(rf"{name}:\\s+(\\d+) kB", status)[1]) for name in ("RssAnon", "RssShmem"))
        peak = max(peak, sum(sizes) * 1024)
        time.sleep(0.02)

threading.Thread(target=sample, daemon=True).start()

import torch
from jobs.request import MergeRequest
from workers.parity.asking import Subject
from workers.parity.behaviour import check_behaviour
from workers.adapters.adapter import open_adapter

request = MergeRequest.model_validate_json(sys.argv[1])
subject = Subject(request=request, merged=Path(sys.argv[2]), adapter=open_adapter(request.adapter.path), streamed=True)
found = check_behaviour(
    request.base.path, [subject], torch.device("cpu"), Path(sys.argv[3]), cancelled=lambda: None
)
print(json.dumps({"peak": peak, "mean_kl": found[request.id][0].mean_kl}))
"""


@pytest.mark.slow
def test_peak_memory_is_what_was_stated(tmp_path: Path):
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 20_000}
    base = build_llama(tmp_path / "base", initializer_range=0.02, **shape)
    adapter = make_adapter(base, tmp_path / "adapter")
    merged = merge_with_peft(base, adapter, tmp_path / "merged", quant_type="nf4")
    request = MergeRequest(
        base=str(base), adapter=str(adapter), destination=str(tmp_path / "out"), base_quantization="nf4"
    )
    base_plan = plan_base(fetch_base(request.base, tmp_path / "cache"), request)
    stated = estimate_peak_bytes(plan_merge(base_plan, request, fetch_adapter(request.adapter, tmp_path / "cache")))
    (tmp_path / "scratch").mkdir()
    arguments = [request.model_dump_json(by_alias=True), str(merged), str(tmp_path / "scratch")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["mean_kl"] < 5e-4
    assert stated == pytest.approx(measured["peak"], rel=0.25)
