"""What the benchmark claims is only as good as its base, its measuring and its comparing."""

import shutil
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from benchmarks.equality import ExactMerge, compare
from benchmarks.make_base import ADAPTERS, make_adapter, make_base
from benchmarks.measurement import measure
from benchmarks.resident import Resident
from benchmarks.where import draw

MB = 10**6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_base("tiny", directory / "base")
    make_adapter("tiny", "r16-all", directory / "r16-all", directory / "base")
    return directory


@pytest.fixture(scope="module")
def merged(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, tiny / "r16-all").merge_and_unload().save_pretrained(tiny / "merged")
    return tiny / "merged"


def test_base_loads_whole(tiny):
    _, loading = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_base_is_the_same_every_time(tiny, tmp_path):
    make_base("tiny", tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tiny / "base").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter_is_what_peft_saves(tiny, tmp_path, name):
    make_adapter("tiny", name, tmp_path / "ours", tiny / "base")
    model = AutoModelForCausalLM.from_pretrained(tiny / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_equal_merges_are_equal(tiny, merged):
    comparison = compare(merged, merged, ExactMerge(tiny / "base", tiny / "r16-all", nf4=False))
    assert comparison.differences == ()


@pytest.mark.parametrize("ours_is_flipped", [True, False])
def test_a_flipped_bit_is_found_and_judged(tiny, merged, tmp_path, ours_is_flipped):
    """The flipped one is the farther from the exact value, whichever side it is on."""
    flipped = tmp_path / "flipped"
    shutil.copytree(merged, flipped)
    state = load_file(flipped / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    state[name].view(torch.int16)[3, 5] ^= 1 << 6
    save_file(state, flipped / "model.safetensors")
    ours, reference = (flipped, merged) if ours_is_flipped else (merged, flipped)
    (difference,) = compare(ours, reference, ExactMerge(tiny / "base", tiny / "r16-all", nf4=False)).differences
    assert (difference.tensor, difference.num_elements) == (name, 1)
    assert (difference.num_nearer, difference.num_farther) == ((0, 1) if ours_is_flipped else (1, 0))


def test_memory_and_bytes_of_children_are_measured(tmp_path):
    """300 MB in a child, held for a while; 20 MB written by it."""
    child = (
        "import time; held = b'x' * (300 * 10**6); time.sleep(0.5); open('/dev/null', 'wb').write(held[: 20 * 10**6])"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True); print('done')"
    measurement = measure([sys.executable, "-c", parent], {}, tmp_path / "log")
    assert measurement.output == "done\n"
    assert 300 * MB < measurement.peak_memory_bytes < 350 * MB
    assert 20 * MB <= measurement.bytes_written < 21 * MB
    assert measurement.seconds > 0.5


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)exit code 1.*no such shape"):
        measure([sys.executable, "-c", "raise SystemExit('no such shape')"], {}, tmp_path / "log")


@pytest.mark.slow
def test_a_resident_process_merges_on_order(tiny, merged, tmp_path):
    with Resident(tmp_path / "log") as resident:
        runs = (("first", "none"), ("unchecked", "none"), ("cold", "nf4"), ("cached", "nf4"))
        for name, quantization in runs:
            measured = resident.merge(
                tiny / "base",
                [tiny / "r16-all"],
                tmp_path / name,
                base_quantization=quantization,
                home=tmp_path / "home",
                checked=name != "unchecked",
            )
            num_bytes = sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors"))
            assert 0 < measured.seconds < 60
            assert measured.bytes_written >= num_bytes
            assert measured.peak_memory_bytes > 100 * MB
        with pytest.raises(RuntimeError, match="none is no directory"):
            resident.merge(
                tmp_path / "none",
                [tiny / "r16-all"],
                tmp_path / "out",
                base_quantization="none",
                home=tmp_path / "home",
            )
        resident.forget(tmp_path / "home")
    exact = ExactMerge(tiny / "base", tiny / "r16-all", nf4=False)
    assert compare(tmp_path / "first", merged, exact).differences == ()
    assert compare(tmp_path / "unchecked", merged, exact).differences == ()
    assert not compare(
        tmp_path / "cold", tmp_path / "cached", ExactMerge(tiny / "base", tiny / "r16-all", nf4=True)
    ).differences


def test_where_the_time_of_a_process_goes_is_drawn(tmp_path):
    program = "import time\ndef busy():\n    while True: sum(range(1000))\nbusy()"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        try:
            draw(process.pid, lambda: time.sleep(1), tmp_path / "where.svg")
        finally:
            process.kill()
    assert "busy" in (tmp_path / "where.svg").read_text()
