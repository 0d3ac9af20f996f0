"""What every stored form has to do: weights from headers, tiles that are parts of the whole, faults told by name."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import BadInputError, UnsupportedError
from tests import architectures
from tests.models import build_llama
from tests.stored import twin_of
from tests.stored.forms import APART, EXPERTS, FOUR_BIT, LINEAR
from tests.stored.fp8_blocks import store_fp8
from workers.bases.forms import StoredForm
from workers.bases.forms.declared import declared_form
from workers.bases.model import config_dtype
from workers.bases.quantized_base import QuantizedBase
from workers.files.checkpoint import read_checkpoint
from workers.files.layout import TensorSpec
from workers.numerics.tiles import Tiling, columns_of

CPU = torch.device("cpu")
EVERY = {**LINEAR, **EXPERTS, **APART, **FOUR_BIT}
_BESIDE_BYTES = 64
"""Of a weight, whatever its size: the last of its blocks, and its shape."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("plain")
    return {
        "llama": build_llama(directory / "llama", tokenizer=False),
        "gpt_oss": architectures.build("decoder", "gpt_oss", directory / "gpt_oss"),
    }


@pytest.fixture(scope="module", params=EVERY, ids=lambda name: name)
def stored(request: pytest.FixtureRequest, plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = plain["gpt_oss" if request.param.startswith("mxfp4") else "llama"]
    return EVERY[request.param](base, tmp_path_factory.mktemp("stored") / "stored")


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


def test_every_part_is_there_and_of_one_weight(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    weights = form.weights(specs)
    assert weights
    parts = [stored for each in weights.values() for stored in (each.codes, *each.beside.values())]
    assert set(parts) <= set(specs)
    assert len(parts) == len(set(parts))
    assert all(each.beside for each in weights.values())


def test_what_is_plain_is_a_part_of_none(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    assert not [name for name in form.weights(specs) if "norm" in name or "embed" in name]


def test_weights_have_the_values_of_the_twin(stored: Path, opened: QuantizedBase) -> None:
    twin = load_file(twin_of(stored) / "model.safetensors")
    assert opened.names
    for name in opened.names:
        weight = opened.weight(name)
        assert weight.shape == twin[name].shape
        rows = Tiling.of(weight.shape, weight.row_alignment, twin[name].numel()).rows
        whole = torch.cat([weight.dequantize_rows(each.start, each.stop) for each in rows])
        assert torch.equal(whole.view(twin[name].shape), twin[name])


def test_tiles_are_parts_of_the_whole(opened: QuantizedBase) -> None:
    for name in sorted(opened.names)[:3]:
        weight = opened.weight(name)
        num_columns = columns_of(weight.shape)
        num_rows = math.prod(weight.shape) // num_columns
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
    num_rows = math.prod(weight.shape) // columns_of(weight.shape)
    expected = weight.dequantize_rows(0, num_rows)
    for other in (weight.to(CPU), weight.brought_to(CPU)):
        assert torch.equal(other.dequantize_rows(0, num_rows), expected)


def test_what_is_held_is_no_more_than_is_told(form: StoredForm, opened: QuantizedBase) -> None:
    for name in opened.names:
        weight = opened.weight(name)
        assert 0 < weight.num_bytes <= form.held_bytes(math.prod(weight.shape)) + _BESIDE_BYTES


def _is_needed(part: str) -> bool:
    """Whether a weight cannot be without a part: it can without scales of activations, and is none without a state."""
    return not part.endswith("input_scale") and ".quant_state." not in part


def use(form: StoredForm, name: str, specs: dict[str, TensorSpec]) -> None:
    """Find the parts of a weight among some tensors, and put it together."""
    parts = form.weights(specs)[name]
    tensors = {stored: torch.empty(0) for stored in (parts.codes, *parts.beside.values())}
    form.restore(name, parts, tensors, torch.bfloat16, transposed=False)


def test_a_missing_part_is_told_by_name(form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    name, parts = next(iter(form.weights(specs).items()))
    for stored in filter(_is_needed, (parts.codes, *parts.beside.values())):
        rest = {other: spec for other, spec in specs.items() if other != stored}
        with pytest.raises(BadInputError, match=re.escape(name.removesuffix(".weight"))):
            use(form, name, rest)


def test_a_part_of_another_shape_is_told_by_name(stored: Path, form: StoredForm, specs: dict[str, TensorSpec]) -> None:
    """By its header, or, where that does not tell, when it is put together."""
    name, parts = next(iter(form.weights(specs).items()))
    tensors = {part: tensor for file in stored.glob("*.safetensors") for part, tensor in load_file(file).items()}
    for part in filter(_is_shaped, parts.beside.values()):
        changed = specs | {part: replace(specs[part], shape=(7, 7))}
        wrong = tensors | {part: torch.zeros(7, 7, dtype=specs[part].dtype)}
        with pytest.raises(BadInputError, match=re.escape(name.removesuffix(".weight"))):
            form.restore(name, form.weights(changed)[name], wrong, torch.bfloat16, transposed=False)


def _is_shaped(part: str) -> bool:
    """Whether a weight goes by the shape of a part: of bitsandbytes' own table of values it takes its type's."""
    return _is_needed(part) and not part.endswith(".quant_map")


@pytest.fixture(scope="module")
def fp8(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_fp8(plain["llama"], tmp_path_factory.mktemp("fp8") / "fp8")


def parts_of_fp8(fp8: Path) -> tuple[StoredForm, dict[str, TensorSpec], str]:
    """Return the form, all tensors, and the name of some scales."""
    specs = {name: spec for name, (_, spec) in read_checkpoint(fp8).tensors.items()}
    form = declared_form(fp8)
    assert form is not None
    return form, specs, next(name for name in specs if name.endswith("_scale_inv"))


def test_scales_of_activations_belong_to_their_weight(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    weight = scale.removesuffix("_scale_inv")
    fixed = f"{weight.rpartition('.')[0]}.activation_scale"
    parts = form.weights(specs | {fixed: replace(specs[scale], name=fixed, shape=())})[weight]
    assert fixed in parts.beside.values()


def test_scales_of_fp8_without_codes(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    weight = scale.removesuffix("_scale_inv")
    with pytest.raises(BadInputError, match=rf"{scale}.*holds the scales of {weight}.*no file holds it"):
        form.weights({name: spec for name, spec in specs.items() if name != weight})
    plain = replace(specs[weight], dtype=torch.bfloat16)
    with pytest.raises(BadInputError, match="it is stored as BF16"):
        form.weights(specs | {weight: plain})


def test_scales_of_fp8_of_another_shape(fp8: Path) -> None:
    form, specs, scale = parts_of_fp8(fp8)
    wrong = replace(specs[scale], shape=(7, 7))
    with pytest.raises(BadInputError, match=rf"{scale} has shape \[7, 7\]; expected \["):
        form.weights(specs | {scale: wrong})


def weights_of(directory: Path, specs: dict[str, TensorSpec]) -> object:
    form = declared_form(directory)
    assert form is not None
    return form.weights(specs)


def test_e4m3_under_its_other_name(fp8: Path, tmp_path: Path) -> None:
    """As MiniMax-M2 declares it."""
    copy = shutil.copytree(fp8, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["fmt"] = "float8_e4m3fn"
    (copy / "config.json").write_text(json.dumps(config))
    specs = {name: spec for name, (_, spec) in read_checkpoint(copy).tensors.items()}
    assert weights_of(copy, specs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fmt": "float8_e5m2"}, UnsupportedError, "quantization_config.fmt: expected e4m3"),
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
        weights_of(copy, specs)
