"""Releases stored as their base is: untouched bytes, and the library's compression of what PEFT merges."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from jobs.request import MergeRequest
from tests import architectures
from tests.merges import different, merge_by_peft, read_tensors
from tests.models import make_adapter
from tests.stored import twin_of
from tests.stored.cells import ARCHITECTURES, ON_EXPERTS
from tests.stored.compressed import FORMATS, compress
from tests.stored.forms import APART, EXPERTS, LINEAR
from workers.bases.forms.declared import declared_form
from workers.files.checkpoint import read_checkpoint

EVERY = {**LINEAR, **EXPERTS, **APART}
AGAIN = [form for form in {**LINEAR, **APART} if "AWQ" not in form and form != "mxfp4 with scales apart"]
"""Forms of linear weights that merged ones are quantized to again."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    directory = tmp_path_factory.mktemp("plain")

    @functools.cache
    def build(model_type: str) -> Path:
        return architectures.build("decoder", model_type, directory / model_type)

    return build


def release(worker, base, adapter, directory, **fields):
    """Merge by a worker, and publish; return the outcome and where the release is."""
    request = MergeRequest(
        id=directory.name,
        base=str(base),
        adapter=str(adapter),
        destination=str(directory),
        output="as_base",
        **{"parity": {"level": "arithmetic", "thresholds": {"min_survival": 0}}, **fields},
    )
    (staged,) = worker.run_unit("unit", (request,)).jobs
    if staged.failure is not None:
        return staged
    return worker.publish(request.id, None)


def expected_of(base, form, adapter, directory):
    """Return what a release has to hold: the base's bytes, and PEFT's merge stored by the library of the form."""
    twin = twin_of(base)
    merged = merge_by_peft(twin, adapter, directory / "peft")
    changed = directory / "changed"
    changed.mkdir()
    (changed / "config.json").write_bytes((twin / "config.json").read_bytes())
    save_file(merged, changed / "model.safetensors", metadata={"format": "pt"})
    again = read_tensors(EVERY[form](changed, directory / "again"))
    before, numbers = read_tensors(base), read_tensors(twin)
    touched = [name for name, tensor in numbers.items() if not torch.equal(tensor, merged[name])]
    assert touched
    specs = {name: spec for name, (_, spec) in read_checkpoint(base).tensors.items()}
    parts = {name: each.names for name, each in declared_form(base).weights(specs).items()}
    for name in touched:
        if form.startswith("fp8") and "plain" not in form:
            again |= by_transformers(name, merged[name], json.loads((base / "config.json").read_text()))
        elif "nvfp4" in form and name in parts:
            again |= with_the_global_scale(name, merged[name], before)
        elif form.startswith("mxfp4") and name in parts:
            again |= by_experts(name, merged[name])
    of_touched = {stored for name in touched for stored in parts.get(name, (name,))}
    return {**again, **{name: tensor for name, tensor in before.items() if name not in of_touched}}


def by_transformers(name, weight, config):
    """Return the parts of a weight in blocks of FP8, cut ones filled up with zeros, as transformers makes them."""
    size = config["quantization_config"]["weight_block_size"]
    block = size or weight.shape
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block[1], 0, -weight.shape[0] % block[0]))
    declared = SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=size))
    codes, scales = Fp8Quantize(declared).convert({name: padded}).values()
    return {
        name: codes[: weight.shape[0], : weight.shape[1]].contiguous(),
        f"{name}_scale_inv": scales if size else scales.reshape(()),
    }


def with_the_global_scale(name, weight, before):
    """Return the parts of a weight in NVFP4 under the global scale it had, unless it has grown beyond that."""
    module = name.removesuffix("weight")
    modelopt = f"{module}weight_scale_2" in before
    old = 1 / before[f"{module}weight_scale_2"].reshape(1) if modelopt else before[f"{module}weight_global_scale"]
    own = generate_gparam(weight.min().float(), weight.max().float())
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": dict(FORMATS["nvfp4"][1])})
    found, _ = compress(name, weight, FORMATS["nvfp4"][0], scheme, torch.minimum(own, old))
    if not modelopt:
        return found
    second = before[f"{module}weight_scale_2"] if old <= own else (1 / own).reshape(())
    return {
        name: found[f"{module}weight_packed"],
        f"{module}weight_scale": found[f"{module}weight_scale"],
        f"{module}weight_scale_2": second,
    }


def by_experts(name, weight):
    """Return experts in MXFP4, in gpt-oss's layout of the codes that compressed-tensors makes of each."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": dict(FORMATS["mxfp4"][1])})
    made = [compress("weight", each.T.contiguous(), FORMATS["mxfp4"][0], scheme)[0] for each in weight]
    codes, scales = (torch.stack([parts[part] for parts in made]) for part in ("weight_packed", "weight_scale"))
    return {f"{name}_blocks": codes.unflatten(2, (-1, 16)), f"{name}_scales": scales}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("form", AGAIN)
def test_touched_weights_are_the_librarys_compression_of_the_merge(worker, plain, tmp_path, architecture, form):
    model_type, targets = ARCHITECTURES[architecture]
    base = EVERY[form](plain(model_type), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", targets=targets, rank=2)
    outcome = release(worker, base, adapter, tmp_path / "release")
    assert outcome.failure is None, outcome.failure
    assert different(read_tensors(tmp_path / "release"), expected_of(base, form, adapter, tmp_path)) == []


@pytest.mark.parametrize("form", [*EXPERTS, "mxfp4 with scales apart"])
@pytest.mark.parametrize("options", [{"targets": ["q_proj", "o_proj"]}, ON_EXPERTS], ids=["attention", "experts"])
def test_experts_in_mxfp4(worker, plain, tmp_path, form, options):
    """An adapter of attention alone leaves every expert its bytes."""
    base = EVERY[form](plain("gpt_oss"), tmp_path / "base")
    adapter = make_adapter(twin_of(base), tmp_path / "adapter", rank=2, **options)
    outcome = release(worker, base, adapter, tmp_path / "release")
    assert outcome.failure is None, outcome.failure
    assert different(read_tensors(tmp_path / "release"), expected_of(base, form, adapter, tmp_path)) == []
