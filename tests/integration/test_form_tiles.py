"""Releases whose weights are quantized tile by tile as they are merged: the library's bits, and no wrong ones pass."""

import errno
import functools
import json
import os

import pytest
import torch

from jobs.errors import FailureClass
from jobs.parity_report import ParityReport
from tests import merges
from tests.merges import asked, different, merge_by_peft, plan_requests, read_tensors
from tests.models import build_llama, make_adapter
from tests.stored.kept import expected, survival
from workers.bases.forms.compressed.output import CompressedOutput
from workers.files.scratch import OwnedDirectory
from workers.files.shard import ShardWriter
from workers.merging import storing
from workers.numerics.tiles import TILE_ELEMENTS
from workers.unit.verification import Verifier

FORMS = ("fp8_dynamic", "fp8_block", "int8_w8a16", "int4_w4a16", "mxfp4")
PARITY = {"level": "arithmetic", "thresholds": {"min_survival": 0}}
release = functools.partial(merges.release, parity=PARITY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    base = build_llama(directory / "base", hidden_size=256, intermediate_size=384, tokenizer=False)
    return base, make_adapter(base, directory / "adapter", targets=["q_proj", "down_proj"], std=0.2)


@pytest.fixture(scope="module")
def merged(llama, tmp_path_factory):
    return merge_by_peft(*llama, tmp_path_factory.mktemp("peft") / "merged")


@pytest.fixture
def small_tiles(monkeypatch):
    """Two or more tiles of every matrix."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 1 << 14)


def plan_of(sources, directory, output, **fields):
    return plan_requests([asked(sources, directory / "job", output=output, **fields)], directory).plans[0]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("form", FORMS)
def test_tiles_make_the_weight_that_the_library_makes(worker, llama, merged, tmp_path, monkeypatch, form):
    assert plan_of(llama, tmp_path, form).can_quantize_tiles
    made = []
    monkeypatch.setattr(storing.OwnedDirectory, "make", lambda *given: made.append(given) or make(*given))
    outcome = release(worker, llama, tmp_path / "release", form)
    assert outcome.failure is None, outcome.failure
    assert different(read_tensors(tmp_path / "release"), expected(merged, form, {})) == []
    assert "merged-" not in [prefix for _, prefix in made]


make = OwnedDirectory.make


@pytest.mark.usefixtures("small_tiles")
def test_what_is_left_of_a_delta_is_measured_over_all_tiles(worker, llama, merged, tmp_path):
    assert release(worker, llama, tmp_path / "release", "int4_w4a16").failure is None
    report = ParityReport.model_validate_json((tmp_path / "release" / "parity.json").read_bytes())
    found = {check.tensor.removesuffix("_packed"): check for check in report.tensors}
    before = read_tensors(llama[0])
    targeted = [name for name in merged if name.endswith(("q_proj.weight", "down_proj.weight"))]
    assert targeted
    for name in targeted:
        assert found[name].survival == pytest.approx(survival(name, merged, before, "int4_w4a16"), rel=1e-4)
        assert found[name].changed
    assert found["model.layers.0.mlp.up_proj.weight"].survival is None


@pytest.mark.usefixtures("small_tiles")
def test_a_base_in_4_bits_is_merged_tile_by_tile_too(worker, llama, tmp_path):
    """Its report says what the 4 bits changed, of codes whose name is not that of the weight as well."""
    outcome = release(worker, llama, tmp_path / "release", "int4_w4a16", base_quantization="nf4")
    assert outcome.failure is None, outcome.failure
    base, adapter = llama
    numbers = release(worker, (base, adapter), tmp_path / "numbers", "16bit", base_quantization="nf4")
    assert numbers.failure is None, numbers.failure
    wanted = expected(read_tensors(tmp_path / "numbers"), "int4_w4a16", {})
    assert different(read_tensors(tmp_path / "release"), wanted) == []
    of_numbers, of_codes = (
        {
            check.tensor.removesuffix("_packed"): check.quantization_error
            for check in ParityReport.model_validate_json((tmp_path / name / "parity.json").read_bytes()).tensors
        }
        for name in ("numbers", "release")
    )
    assert all(of_codes[name] == error for name, error in of_numbers.items())
    assert any(of_numbers.values())


@pytest.mark.parametrize(
    ("form", "fields"), [("nvfp4a16", {}), ("int4_w4a16", {"keep": "8bit"}), ("gguf", {}), ("16bit", {})]
)
def test_what_needs_all_numbers_waits_for_them(llama, tmp_path, form, fields):
    base = build_llama(tmp_path / "base", hidden_size=256, intermediate_size=384)
    assert not plan_of((base, llama[1]), tmp_path, form, **fields).can_quantize_tiles


@pytest.mark.usefixtures("small_tiles")
def test_blocks_that_tiles_would_cut_wait_for_all_numbers(worker, tmp_path):
    base = build_llama(tmp_path / "base", hidden_size=128, intermediate_size=200)
    sources = base, make_adapter(base, tmp_path / "adapter", targets=["up_proj"], std=0.2)
    assert not plan_of(sources, tmp_path, "fp8_block").can_quantize_tiles
    assert release(worker, sources, tmp_path / "release", "fp8_block").failure is None
    wanted = expected(merge_by_peft(*sources, tmp_path / "peft"), "fp8_block", {})
    assert different(read_tensors(tmp_path / "release"), wanted) == []


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("form", "part"), [("fp8_block", "codes"), ("int4_w4a16", "codes"), ("mxfp4", "scales")])
def test_one_wrong_element_on_its_way_is_found(worker, llama, tmp_path, monkeypatch, form, part):
    """In the memory that is written: one bit of one of them, once."""
    quantize, broken = CompressedOutput.quantize, []

    def with_a_wrong_element(self, name, weight, together, codes=None):
        found = dict(quantize(self, name, weight, together, codes))
        stored = next(each for each in found if (each.endswith("_scale")) == (part == "scales"))
        if "layers.1.mlp.down_proj" in name and not broken:
            broken.append(stored)
            flat = found[stored].view(torch.uint8).reshape(-1)
            flat[flat.numel() // 2] ^= 1
        return found

    monkeypatch.setattr(CompressedOutput, "quantize", with_a_wrong_element)
    outcome = release(worker, llama, tmp_path / "release", form)
    assert outcome.failure.failure_class is FailureClass.PARITY_FAILED
    assert f"tensor {broken[0]}: 1 elements are not what {form}" in outcome.failure.message
    assert not (tmp_path / "release").exists()


def test_a_file_that_is_written_to_after_it_was_made_is_found(worker, llama, tmp_path, monkeypatch):
    check = Verifier.check

    def after_somebody_wrote(self, arithmetic, weights, jobs):
        (path,) = jobs[0].directory.glob("*.safetensors")
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
        check(self, arithmetic, weights, jobs)

    monkeypatch.setattr(Verifier, "check", after_somebody_wrote)
    outcome = release(worker, llama, tmp_path / "release", "fp8_dynamic")
    assert outcome.failure.failure_class is FailureClass.PARITY_FAILED
    assert "shard model.safetensors: it was written to after it was made" in outcome.failure.message


def test_numbers_that_nothing_can_hold_fail_all_forms_of_them(worker, llama, tmp_path):
    """A merge that overflows; the other adapter of the pass is none the worse."""
    base, adapter = llama
    wild = make_adapter(base, tmp_path / "adapter", targets=["q_proj"], std=1e37, alpha=1e6)
    requests = tuple(
        asked((base, each), tmp_path / f"{name}-{form}", output=form, parity=PARITY)
        for name, each in {"well": adapter, "wild": wild}.items()
        for form in ("16bit", "fp8_dynamic", "mxfp4", "nvfp4a16")
    )
    found = {outcome.job_id: outcome.failure for outcome in worker.run_unit("unit", requests).jobs}
    assert {job_id for job_id, failure in found.items() if failure is None} == {
        request.id for request in requests if request.id.startswith("well")
    }
    assert {failure.failure_class for failure in found.values() if failure} == {FailureClass.BAD_INPUT}
    worker.publish("well-mxfp4", None)
    assert json.loads((tmp_path / "well-mxfp4" / "config.json").read_text())["quantization_config"]


def test_a_form_goes_on_where_the_release_of_numbers_has_no_room(worker, llama, merged, tmp_path, monkeypatch):
    """Of one merge: its own file is what fails, with the first tile."""
    forms = ("16bit", "int4_w4a16")
    requests = tuple(asked(llama, tmp_path / form, output=form, parity=PARITY) for form in forms)
    make_room = ShardWriter._make_room

    def full(shard, layout, origin, *, on_block_device):
        if "16bit" in str(shard._path.parent):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make_room(shard, layout, origin, on_block_device=on_block_device)

    monkeypatch.setattr(ShardWriter, "_make_room", full)
    unit = worker.run_unit("unit", requests)
    found = {outcome.job_id: outcome.failure for outcome in unit.jobs}
    assert found["16bit"].failure_class is FailureClass.NO_CAPACITY
    assert found["int4_w4a16"] is None
    worker.publish("int4_w4a16", None)
    assert different(read_tensors(tmp_path / "int4_w4a16"), expected(merged, "int4_w4a16", {})) == []
