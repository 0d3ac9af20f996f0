"""Whatever is changed about an adapter: the output changes as PEFT's does, or the request fails and says what."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from jobs.errors import MergefleetError
from tests.merges import different, merge_by_peft, plan_pass, read_tensors
from tests.methods import make_method_adapter
from tests.models import build_llama
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.adapters.config import ADAPTER_CONFIG

KINDS = {
    "lora": ("LORA", {}),
    "dora": ("LORA", {"use_dora": True, "bias": "lora_only"}),
    "head": ("LORA", {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 7]}),
    "loha": ("LOHA", {}),
    "vera": ("VERA", {}),
    "ia3": ("IA3", {}),
}
LOOSE = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False, num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_method_adapter(base, root / name, method, **fields) for name, (method, fields) in KINDS.items()}


def outcome(base, adapter, directory):
    """Return the merged tensors, or the error."""
    try:
        planned = plan_pass(base, {"job": adapter}, directory, parity={"level": "arithmetic"})
        for error in planned.run().errors.values():
            raise error
    except MergefleetError as error:
        return error
    assert max(check.rounding_excess for check in planned.check()["job"].values()) <= 1
    return read_tensors(planned.output("job"))


def check(base, adapter, directory, named):
    """Merge a changed adapter: as PEFT does, or refused with one of the names in the message."""
    found = outcome(base, adapter, directory)
    if isinstance(found, MergefleetError):
        assert any(name in str(found) for name in named), f"{named}: {found}"
    else:
        assert different(found, merge_by_peft(base, adapter, directory / "peft")) == []


def edit_tensors(tensors, name, kind):
    """Change one tensor; return the names that an error may give."""
    tensor = tensors[name]
    match kind:
        case "drop":
            del tensors[name]
        case "add":
            tensors[f"{name}.more"] = tensor.clone()
        case "rename":
            tensors[name.replace("layers.0", "layers.7").replace("lm_head", "head")] = tensors.pop(name)
        case "reshape":
            tensors[name] = torch.cat([tensor, tensor])
        case "flatten":
            tensors[name] = tensor.reshape(-1, 1) if tensor.dim() != 2 or tensor.shape[1] != 1 else tensor.reshape(-1)
        case "widen":
            tensors[name] = tensor.double()
    return [name, name.replace("layers.0", "layers.7").replace("lm_head", "head")]


@pytest.mark.slow
@LOOSE
@given(
    adapter=st.sampled_from(sorted(KINDS)),
    choice=st.integers(0, 10_000),
    kind=st.sampled_from(["drop", "add", "rename", "reshape", "flatten", "widen"]),
)
def test_no_tensor_is_left_out_in_silence(base, adapters, adapter, choice, kind):
    with tempfile.TemporaryDirectory() as name:
        changed = Path(shutil.copytree(adapters[adapter], Path(name) / "adapter"))
        tensors = load_file(changed / ADAPTER_WEIGHTS)
        names = edit_tensors(tensors, sorted(tensors)[choice % len(tensors)], kind)
        save_file(tensors, changed / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        check(base, changed, Path(name), names)


def other_values(value):
    """Return legal-looking values of a field, other than the one it has."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value + 2]
    if isinstance(value, float):
        return [value + 0.5]
    if isinstance(value, list) and value and isinstance(value[0], str):
        return [value[:-1], [*value, "o_proj"]]
    if isinstance(value, dict):
        return [{"q_proj": 2}]
    return [["v_proj"], 0, "v_proj"] if value is None else []


@pytest.mark.slow
@LOOSE
@given(adapter=st.sampled_from(sorted(KINDS)), choice=st.integers(0, 10_000), value=st.integers(0, 3))
def test_no_field_is_left_out_in_silence(base, adapters, adapter, choice, value):
    with tempfile.TemporaryDirectory() as name:
        changed = Path(shutil.copytree(adapters[adapter], Path(name) / "adapter"))
        config = json.loads((changed / ADAPTER_CONFIG).read_text())
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config["peft_type"])]
        fields = sorted(field.name for field in dataclasses.fields(config_class) if field.name in config)
        field = fields[choice % len(fields)]
        others = other_values(config[field])
        assume(others)
        config[field] = others[value % len(others)]
        (changed / ADAPTER_CONFIG).write_text(json.dumps(config))
        # An error may be about the tensors that the field asks for, or makes too many of.
        check(base, changed, Path(name), [field, "adapter_model.safetensors", ADAPTER_CONFIG])
