"""What releases hold that are stored as their base is: its bytes, and the library's compression of what PEFT merges."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import generate_gparam
from safetensors.torch import save_file
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from jobs.request import MergeRequest
from tests.merges import merge_by_peft, read_tensors
from tests.stored import twin_of
from tests.stored.compressed import FORMATS, compress
from tests.stored.forms import APART, EXPERTS, LINEAR
from workers.bases.forms.declared import declared_form
from workers.files.checkpoint import read_checkpoint
from workers.merging.outcomes import JobOutcome
from workers.worker import MergeWorker

EVERY = {**LINEAR, **EXPERTS, **APART}
AGAIN = [form for form in {**LINEAR, **APART} if "AWQ" not in form and form != "mxfp4 with scales apart"]
"""Forms of linear weights that merged ones are quantized to again."""


def release_as_base(worker: MergeWorker, base: Path, adapter: Path, directory: Path, **fields: Any) -> JobOutcome:
    """Merge by a worker, and publish where the merge went well; the delta may be lost altogether."""
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


def expected_again(base: Path, form: str, adapter: Path, directory: Path) -> dict[str, torch.Tensor]:
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
            again |= _by_transformers(name, merged[name], json.loads((base / "config.json").read_text()))
        elif "nvfp4" in form and name in parts:
            again |= _with_the_global_scale(name, merged[name], before)
        elif form.startswith("mxfp4") and name in parts:
            again |= _by_experts(name, merged[name])
    of_touched = {stored for name in touched for stored in parts.get(name, (name,))}
    return {**again, **{name: tensor for name, tensor in before.items() if name not in of_touched}}


def _by_transformers(name: str, weight: torch.Tensor, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
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


def _with_the_global_scale(
    name: str, weight: torch.Tensor, before: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
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


def _by_experts(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return experts in MXFP4, in gpt-oss's layout of the codes that compressed-tensors makes of each."""
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": dict(FORMATS["mxfp4"][1])})
    made = [compress("weight", each.T.contiguous(), FORMATS["mxfp4"][0], scheme)[0] for each in weight]
    codes, scales = (torch.stack([parts[part] for parts in made]) for part in ("weight_packed", "weight_scale"))
    return {f"{name}_blocks": codes.unflatten(2, (-1, 16)), f"{name}_scales": scales}
