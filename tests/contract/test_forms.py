"""What every stored form has to do: weights from headers, tiles that are parts of the whole, faults told by name."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import BadInputError, UnsupportedError
from tests.models import build_bnb_4bit, build_llama
from tests.stored_bases import store_fp8
from workers.bases.forms import StoredForm
from workers.bases.forms.declared import declared_form
from workers.bases.model import config_dtype
from workers.bases.quantized_base import QuantizedBase
from workers.files.checkpoint import read_checkpoint
from workers.files.layout import TensorSpec

CPU = torch.device("cpu")
BUILDERS: dict[str, Callable[[Path, Path], Path]] = {
    "bnb-4bit": build_bnb_4bit,
    "fp8": store_fp8,
    "fp8 in cut blocks": lambda base, directory: store_fp8(base, directory, block=(48, 80), scale_dtype=torch.float32),
    "fp8 with a scale for each weight": lambda base, directory: store_fp8(base, directory, block=None),
    "fp8 with scales apart": lambda base, directory: store_fp8(base, directory, apart=True),
}


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda name: name)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stored")
    base = build_llama(directory / "base", tokenizer=False)
    return BUILDERS[request.param](base, directory / "stored")


@pytest.fixture(scope="module")
def form(stored: Path) -> StoredForm:
    found = declared_form(stored)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def specs(stored: Path) -> dict[str, TensorSpec]:
    return {name: spec for name, (_, spec) in read_checkpoint(stored).tensors.items()}


@pytest.fixture(scope="module")
def opened(stored: Path, form: StoredForm) -> QuantizedBase:
    layout = read_checkpoint(stored)
    return QuantizedBase.stored(stored, layout, CPU, (), form=form, dtype=config_dtype(stored))


def test_every_part_belongs_to_a_weight_that_is_there(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    owners = form.owners(specs)
    assert owners
    assert set(owners) <= set(specs)
    for owner in set(owners.values()):
        assert owners[owner] == owner
        assert len([part for part, its in owners.items() if its == owner]) > 1


def test_what_is_plain_belongs_to_none(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    owners = form.owners(specs)
    assert not [name for name in specs if "norm" in name and name in owners]


def test_tiles_are_parts_of_the_whole(opened: QuantizedBase) -> None:
    for name in sorted(opened.names)[:3]:
        weight = opened.weight(name)
        num_rows, num_columns = weight.shape
        whole = weight.dequantize_rows(0, num_rows)
        assert whole.shape == (num_rows, num_columns)
        assert whole.dtype == weight.dtype
        step = 3 * weight.row_alignment
        tiles = []
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            memory = torch.empty(stop - start, num_columns, dtype=weight.dtype)
            tiles.append(weight.dequantize_rows(start, stop, memory))
        assert torch.equal(torch.cat(tiles), whole)


def test_a_weight_elsewhere_has_the_same_values(opened: QuantizedBase) -> None:
    weight = opened.weight(min(opened.names))
    expected = weight.dequantize_rows(0, weight.shape[0])
    for other in (weight.to(CPU), weight.brought_to(CPU)):
        assert torch.equal(other.dequantize_rows(0, weight.shape[0]), expected)
    assert weight.num_bytes > 0


def use(form: StoredForm, name: str, specs: dict[str, TensorSpec]) -> None:
    """Find the parts of a weight among some tensors, and put it together."""
    owners = form.owners(specs)
    parts = {part.removeprefix(name): torch.empty(0) for part, owner in owners.items() if owner == name}
    form.restore(name, parts, torch.bfloat16, transposed=False)


def test_a_missing_part_is_told_by_name(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    part, owner = next((part, owner) for part, owner in form.owners(specs).items() if part != owner)
    rest = {name: spec for name, spec in specs.items() if name != part}
    with pytest.raises(BadInputError, match=re.escape(owner)):
        use(form, owner, rest)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fp8")
    return store_fp8(build_llama(directory / "base", tokenizer=False), directory / "fp8")


def parts_of_fp8(fp8: Path) -> tuple[StoredForm, dict[str, TensorSpec], str]:
    """Return the form, all tensors, and the name of some scales."""
    specs = {name: spec for name, (_, spec) in read_checkpoint(fp8).tensors.items()}
    form = declared_form(fp8)
    assert form is not None
    return form, specs, next(name for name in specs if name.endswith("_scale_inv"))


def test_fp8_has_the_values_of_its_twin(fp8: Path) -> None:
    form, _, _ = parts_of_fp8(fp8)
    opened = QuantizedBase.stored(fp8, read_checkpoint(fp8), CPU, (), form=form, dtype=torch.bfloat16)
    twin = load_file(fp8.with_name("fp8-twin") / "model.safetensors")
    assert opened.names
    for name in opened.names:
        weight = opened.weight(name)
        assert torch.equal(weight.dequantize_rows(0, weight.shape[0]), twin[name])


def test_scales_of_activations_belong_to_their_weight(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    weight = scale.removesuffix("_scale_inv")
    fixed = f"{weight.rpartition('.')[0]}.activation_scale"
    assert form.owners(specs | {fixed: replace(specs[scale], name=fixed, shape=())})[fixed] == weight


def test_scales_of_fp8_without_codes(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    weight = scale.removesuffix("_scale_inv")
    with pytest.raises(BadInputError, match=rf"{scale}.*holds the scales of {weight}.*no file holds it"):
        form.owners({name: spec for name, spec in specs.items() if name != weight})
    plain = replace(specs[weight], dtype=torch.bfloat16)
    with pytest.raises(BadInputError, match="it is stored as BF16"):
        form.owners(specs | {weight: plain})


def test_scales_of_fp8_of_another_shape(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    wrong = replace(specs[scale], shape=(7, 7))
    with pytest.raises(BadInputError, match=rf"{scale} has shape \[7, 7\]; expected \["):
        form.owners(specs | {scale: wrong})


def owners_of(directory: Path, specs: dict[str, TensorSpec]) -> object:
    form = declared_form(directory)
    assert form is not None
    return form.owners(specs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fmt": "e5m2"}, UnsupportedError, "quantization_config.fmt: expected e4m3"),
        ({"weight_block_size": [128]}, BadInputError, "weight_block_size: expected rows and columns"),
        ({"weight_block_size": [0, 128]}, BadInputError, "weight_block_size: expected rows and columns"),
        ({"weight_block_size": [64, 64]}, BadInputError, "_scale_inv has shape"),
    ],
)
def test_what_fp8_declares_wrongly(
    fp8: Path, tmp_path: Path, change: dict[str, object], error: type[Exception], message: str
) -> None:
    copy = shutil.copytree(fp8, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] |= change
    (copy / "config.json").write_text(json.dumps(config))
    specs = {name: spec for name, (_, spec) in read_checkpoint(copy).tensors.items()}
    with pytest.raises(error, match=message):
        owners_of(copy, specs)
