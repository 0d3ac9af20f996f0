"""Headers of safetensors files: what the library writes is read as it reads it, and what lies is refused by name."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from jobs.errors import AuthError, BadInputError, NotFoundError
from tests.merges import read_tensors
from tests.models import build_llama
from workers.files.checkpoint import MAX_TENSORS, read_checkpoint, read_json, read_shard
from workers.files.layout import DTYPES, INDEX_FILE, SINGLE_FILE, CheckpointLayout, lay_out

SHARDED = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", max_shard_size="100KB", tokenizer=False)


@pytest.fixture
def copy(sharded, tmp_path):
    directory = tmp_path / "copy"
    directory.mkdir()
    for path in sharded.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def write_raw(path: Path, header: object, data: bytes = b"", *, num_header_bytes: int | None = None) -> Path:
    """Write a safetensors file as bytes; nothing is checked."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(raw) if num_header_bytes is None else num_header_bytes
    path.write_bytes(length.to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, *, dtype: object = "U8", shape: object = None) -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def layout_of_files(directory: Path) -> dict[str, tuple[str, torch.dtype, tuple[int, ...]]]:
    found = {}
    for path in directory.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            found[name] = (path.name, tensor.dtype, tuple(tensor.shape))
    return found


def test_reads_what_transformers_wrote(sharded):
    layout = read_checkpoint(sharded)
    assert len(layout.shards) > 2
    read = {name: (shard.name, spec.dtype, spec.shape) for name, (shard, spec) in layout.tensors.items()}
    assert read == layout_of_files(sharded)
    assert layout.num_bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))


def test_offsets_lead_to_the_bytes_of_each_tensor(sharded):
    expected = read_tensors(sharded)
    for name, (shard, spec) in read_checkpoint(sharded).tensors.items():
        data = (sharded / shard.name).read_bytes()[spec.begin : spec.end]
        assert data == expected[name].view(torch.uint8).numpy().tobytes()


def test_the_index_is_that_of_transformers(sharded):
    written = json.loads((sharded / INDEX_FILE).read_text())
    index = read_checkpoint(sharded).index()
    assert index is not None
    assert index["weight_map"] == written["weight_map"]
    assert index["metadata"]["total_size"] == written["metadata"]["total_size"]


def test_one_plain_file_needs_no_index(tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / SINGLE_FILE)
    assert read_checkpoint(tmp_path).index() is None


def test_the_single_file_wins_over_an_index_as_in_transformers(copy):
    save_file({"only": torch.zeros(3)}, copy / SINGLE_FILE)
    assert list(read_checkpoint(copy).tensors) == ["only"]


def test_tensors_without_dimensions_or_elements_are_tensors(tmp_path):
    save_file({"scalar": torch.tensor(1.5), "none": torch.zeros(0), "flat": torch.zeros(4, 0)}, tmp_path / "a")
    shapes = {spec.name: (spec.shape, spec.num_bytes) for spec in read_shard(tmp_path / "a").tensors}
    assert shapes == {"scalar": ((), 4), "none": ((0,), 0), "flat": ((4, 0), 0)}


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path, code):
    save_file({"t": torch.zeros(2, 3).to(DTYPES[code])}, tmp_path / "a.safetensors")
    (spec,) = read_shard(tmp_path / "a.safetensors").tensors
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert (file.get_slice("t").get_dtype(), file.get_tensor("t").dtype) == (code, spec.dtype)


HUGE = 10**30
BAD_FILES = {
    "empty file": (b"", "truncated or no safetensors file"),
    "seven bytes": (b"\0" * 7, "truncated or no safetensors file"),
    "text": (b"not a checkpoint at all", "truncated or no safetensors file"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "header length of 100"),
    "header of 2**63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", f"header length of {1 << 63}"),
}
BAD_HEADERS = {
    "no JSON": (b"{]", b"", "JSON header"),
    "no text": (b"\xff\xfe{}", b"", "JSON header"),
    "UTF-16": ('{"a":1}'.encode("utf-16"), b"", "JSON header"),
    "nested beyond reason": (b"[" * 100_000, b"", "JSON header"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "JSON header"),
    "a list": ([], b"", "JSON object"),
    "a number": (7, b"", "JSON object"),
    "entry is text": ({"a": "F32"}, b"", "tensor a: expected dtype, shape and data_offsets"),
    "entry is a list": ({"a": [1, 2]}, b"", "tensor a: expected dtype, shape and data_offsets"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234", "tensor a: expected dtype, shape"),
    "shape is a number": ({"a": entry(0, 4, shape=4)}, b"1234", "tensor a: expected dtype, shape"),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 4, 8]}}, b"1234", "tensor a: expected dtype, shape"),
    "unknown dtype": ({"a": entry(0, 4, dtype="Q4")}, b"1234", "tensor a: dtype 'Q4' is unknown to safetensors"),
    "dtype is a list": ({"a": entry(0, 4, dtype=["F32"])}, b"1234", "tensor a: dtype"),
    "dtype is null": ({"a": entry(0, 4, dtype=None)}, b"1234", "tensor a: dtype None"),
    "negative shape": ({"a": entry(0, 4, shape=[-2, -2])}, b"1234", "tensor a: expected whole numbers"),
    "fractional shape": ({"a": entry(0, 4, shape=[4.0])}, b"1234", "tensor a: expected whole numbers"),
    "boolean shape": ({"a": entry(0, 1, shape=[True])}, b"1", "tensor a: expected whole numbers"),
    "shape of text": ({"a": entry(0, 4, shape="4")}, b"1234", "tensor a: expected whole numbers"),
    "shape beyond 64 bits": ({"a": entry(0, 4, shape=[HUGE])}, b"1234", "tensor a: expected whole numbers"),
    "huge shape": ({"a": entry(0, 4, shape=[1 << 40, 1 << 40])}, b"1234", "tensor a: U8 of shape"),
    "too many dimensions": ({"a": entry(0, 1, shape=[1] * 65)}, b"1", "tensor a: expected at most 64 dimensions"),
    "negative offset": ({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, b"1234", "tensor a: expected whole numbers"),
    "offsets the wrong way round": ({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, b"1234", "tensor a: U8 of shape"),
    "too few bytes for the shape": ({"a": entry(0, 4, dtype="F32", shape=[2])}, b"1234", "tensor a: F32 of shape [2]"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, b"123456", "tensor b: expected its bytes to begin at"),
    "hole": ({"a": entry(0, 2), "b": entry(4, 6)}, b"123456", "tensor b: expected its bytes to begin at"),
    "hole at the start": ({"a": entry(2, 6)}, b"123456", "tensor a: expected its bytes to begin at"),
    "beyond the file": ({"a": entry(0, 40)}, b"1234", "it is truncated or corrupt"),
    "bytes nobody owns": ({"a": entry(0, 4)}, b"1234567", "it is truncated or corrupt"),
    "the same name twice": (
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        b"1234",
        "tensor a: expected its bytes to begin at",
    ),
    "a name with a line break": (
        {"a\nb": entry(0, 4)},
        b"1234",
        r"tensor a\nb: expected a name of at most 1000 visible",
    ),
    "a name that turns the text": ({"a\u202eb": entry(0, 4)}, b"1234", r"tensor a\u202eb: expected a name of"),
    "a name of a page": ({"a" * 1001: entry(0, 4)}, b"1234", "expected a name of at most 1000 visible"),
    "half a character as name": (b'{"\\ud800":{}}', b"", r"expected names of valid Unicode, found \ud800"),
    "metadata that is a number": ({"__metadata__": 1, "a": entry(0, 4)}, b"1234", "a header that safetensors opens"),
    "metadata that is no text": ({"__metadata__": {"format": 1}, "a": entry(0, 4)}, b"1234", "that safetensors opens"),
    "a number of 4000 digits": ({"a": entry(0, 10**4000)}, b"1234", "a number of 4001 digits, expected at most 100"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_what_is_no_safetensors_file_is_refused(tmp_path, case):
    data, message = BAD_FILES[case]
    (tmp_path / SINGLE_FILE).write_bytes(data)
    with pytest.raises(BadInputError) as error:
        read_checkpoint(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_lies_is_refused_by_name(tmp_path, case):
    header, data, message = BAD_HEADERS[case]
    write_raw(tmp_path / SINGLE_FILE, header, data)
    with pytest.raises(BadInputError) as error:
        read_checkpoint(tmp_path)
    assert str(tmp_path / SINGLE_FILE) in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_header_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / SINGLE_FILE
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(BadInputError, match="header of at most 33554432 bytes, found one of 200000000"):
        read_checkpoint(tmp_path)


def test_a_header_of_too_many_tensors_is_not_parsed(tmp_path):
    header = b"{" + b",".join(b'"%d":{"data_offsets":[0,0]}' % number for number in range(MAX_TENSORS + 1)) + b"}"
    (tmp_path / SINGLE_FILE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(BadInputError, match=f"expected at most {MAX_TENSORS} tensors, found {MAX_TENSORS + 1}"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("num_kept", [0, 5, 8, 100, -1])
def test_a_truncated_shard_is_refused(copy, num_kept):
    data = (copy / SHARDED).read_bytes()
    (copy / SHARDED).write_bytes(data[:num_kept])
    with pytest.raises(BadInputError, match=f"{SHARDED}.*truncated"):
        read_checkpoint(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), children, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=json_values, data=st.binary(max_size=16))
def test_no_header_brings_down_more_than_its_own_job(tmp_path, header, data):
    path = write_raw(tmp_path / "any.safetensors", header, data)
    try:
        shard = read_shard(path)
    except BadInputError:
        return
    assert shard.num_bytes == path.stat().st_size
    with safe_open(path, framework="pt"):
        pass


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_flipped_bit_in_a_header_is_noticed_or_harmless(tmp_path, data):
    path = tmp_path / "flip.safetensors"
    save_file({"w": torch.zeros(3, 5), "b": torch.zeros(5, dtype=torch.bfloat16)}, path, metadata={"format": "pt"})
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        shard = read_shard(path)
    except BadInputError:
        return
    # What is left describes the whole file: another name, dtype of the same size, or metadata.
    assert sum(spec.num_bytes for spec in shard.tensors) == len(content) - header_end
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {spec.name for spec in shard.tensors}


BAD_SHARD_NAMES = [
    "../base/model.safetensors",
    "..",
    "",
    ".",
    "/etc/passwd",
    "/tmp/model.safetensors",
    "sub/model.safetensors",
    "model.bin",
    ".hidden.safetensors",
    "a b.safetensors",
    "nul\0.safetensors",
    "line\n.safetensors",
    None,
    7,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", BAD_SHARD_NAMES, ids=repr)
def test_an_index_leads_nowhere_but_into_its_directory(copy, name):
    index = json.loads((copy / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError) as error:
        read_checkpoint(copy)
    assert "tensor model.norm.weight: expected the plain name of a safetensors file" in str(error.value)
    assert INDEX_FILE in str(error.value)


def test_an_index_that_names_a_directory_is_refused(copy):
    (copy / "folder.safetensors").mkdir()
    index = json.loads((copy / INDEX_FILE).read_text())
    index["weight_map"]["model.norm.weight"] = "folder.safetensors"
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"folder\.safetensors: expected a regular file, found a directory"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "{", "[" * 99_999]
)
def test_an_index_that_is_none_is_refused(copy, content):
    (copy / INDEX_FILE).write_text(content)
    with pytest.raises(BadInputError, match=INDEX_FILE):
        read_checkpoint(copy)


def test_an_index_that_puts_a_tensor_elsewhere_is_refused(copy):
    index = json.loads((copy / INDEX_FILE).read_text())
    actual = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = SHARDED
    assert actual != SHARDED
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=f"model.norm.weight: the index says {SHARDED}, the shards say {actual}"):
        read_checkpoint(copy)


def test_an_index_that_names_a_tensor_nobody_has_is_refused(copy):
    index = json.loads((copy / INDEX_FILE).read_text())
    index["weight_map"]["model.extra.weight"] = SHARDED
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"model\.extra\.weight: .*the shards say nothing"):
        read_checkpoint(copy)


def test_an_index_that_leaves_a_tensor_out_is_refused(copy):
    index = json.loads((copy / INDEX_FILE).read_text())
    del index["weight_map"]["model.norm.weight"]
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match=r"model\.norm\.weight: the index says nothing"):
        read_checkpoint(copy)


def test_a_tensor_in_two_shards_is_refused(copy):
    index = json.loads((copy / INDEX_FILE).read_text())
    save_file({"model.norm.weight": torch.zeros(64), "other": torch.zeros(1)}, copy / "twice.safetensors")
    index["weight_map"]["other"] = "twice.safetensors"
    (copy / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(BadInputError, match="more than one shard"):
        read_checkpoint(copy)


def test_a_missing_shard_is_named(copy):
    (copy / SHARDED).unlink()
    with pytest.raises(NotFoundError, match=SHARDED):
        read_checkpoint(copy)


def test_a_directory_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(NotFoundError, match=f"expected {SINGLE_FILE} or {INDEX_FILE}, found neither"):
        read_checkpoint(tmp_path)


def test_a_fault_of_the_disk_is_not_a_fault_of_the_input(sharded, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(13, "Permission denied", "config.json")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(AuthError, match="Permission denied"):
        read_json(sharded / "config.json")
    with pytest.raises(AuthError, match="Permission denied"):
        read_shard(sharded / SHARDED)


specs = st.lists(
    st.tuples(
        st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.uint8, torch.bool]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=12,
).map(lambda found: [(f"tensor.{n}", dtype, shape) for n, (dtype, shape) in enumerate(found)])


@settings(max_examples=60, deadline=None)
@given(tensors=specs, limit=st.none() | st.integers(1, 400))
def test_layouts_are_files_that_safetensors_reads(tmp_path_factory, tensors, limit):
    layout = lay_out(tensors, limit)
    directory = tmp_path_factory.mktemp("layout")
    found = {}
    for shard in layout.shards:
        data = shard.header + bytes(shard.num_bytes - len(shard.header))
        (directory / shard.name).write_bytes(data)
        found |= {
            name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(directory / shard.name).items()
        }
    assert found == {name: (dtype, shape) for name, dtype, shape in tensors}
    assert layout.total_size == sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in tensors)


@settings(max_examples=60, deadline=None)
@given(tensors=specs, limit=st.none() | st.integers(1, 400))
def test_layouts_keep_to_the_limit_and_are_aligned(tensors, limit):
    layout = lay_out(tensors, limit)
    assert [name for name, _, _ in tensors] == sorted(layout.tensors, key=lambda name: int(name.split(".")[1]))
    for shard in layout.shards:
        num_bytes = sum(spec.num_bytes for spec in shard.tensors)
        assert limit is None or num_bytes <= limit or sum(spec.num_bytes > 0 for spec in shard.tensors) == 1
        assert all(spec.begin % spec.dtype.itemsize == 0 for spec in shard.tensors)
    if limit is None:
        assert [shard.name for shard in layout.shards] == [SINGLE_FILE]
    elif len(layout.shards) > 1:
        total = len(layout.shards)
        assert [shard.name for shard in layout.shards] == [
            f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)
        ]


def test_a_written_layout_is_read_back_as_it_was(tmp_path):
    layout = lay_out([(f"t{n}", torch.float16, (n, 3)) for n in range(9)], 60)
    for shard in layout.shards:
        (tmp_path / shard.name).write_bytes(shard.header + bytes(shard.num_bytes - len(shard.header)))
    (tmp_path / INDEX_FILE).write_text(json.dumps(layout.index()))
    assert read_checkpoint(tmp_path) == CheckpointLayout(tuple(sorted(layout.shards, key=lambda shard: shard.name)))
