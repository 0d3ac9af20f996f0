"""An outline of a checkpoint in a store: headers and small files, and none of its weights."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs.errors import NotFoundError
from jobs.locations import HubRepo, LocalPath, S3Prefix
from tests.models import build_llama
from workers.files.checkpoint import read_checkpoint
from workers.releases.checks.checking import check_checkpoint
from workers.sources import outlines
from workers.sources.outlines import bring_outline


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A sharded release, with a large embedding, so that its weights are more than its header."""
    return build_llama(tmp_path_factory.mktemp("release") / "it", max_shard_size="100KB", vocab_size=2048)


def files_of(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(params=["hub", pytest.param("s3", marks=pytest.mark.s3)])
def put(request):
    """Puts files to a store, and returns where they are."""
    if request.param == "hub":
        hub = request.getfixturevalue("hub")

        def to_hub(files):
            name = f"org/outline{len(hub.repos)}"
            hub.create(name, files)
            return HubRepo(repo_id=name, revision="main")

        return to_hub
    server = request.getfixturevalue("s3")

    def to_s3(files):
        prefix = f"outlines/{id(files)}"
        for name, data in files.items():
            server.client().put_object(Bucket=server.bucket, Key=f"{prefix}/{name}", Body=data)
        return S3Prefix(server.bucket, prefix)

    return to_s3


def test_headers_and_small_files_are_those_of_the_release(release, put, tmp_path):
    """What an outline is read as is what the release is read as, to the last offset."""
    outline = bring_outline(put(files_of(release)), tmp_path)
    assert read_checkpoint(outline) == read_checkpoint(release)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"):
        assert (outline / name).read_bytes() == (release / name).read_bytes()
    assert [(each.rule.id, each.found) for each in check_checkpoint(outline)] == [
        (each.rule.id, each.found) for each in check_checkpoint(release)
    ]


def test_no_weight_is_brought(release, put, tmp_path):
    """Behind its header, a shard of an outline is a hole of the right size: zeros that take no room."""
    outline = bring_outline(put(files_of(release)), tmp_path)
    for path in outline.glob("*.safetensors"):
        data = path.read_bytes()
        length = 8 + int.from_bytes(data[:8], "little")
        assert data[:length] == (release / path.name).read_bytes()[:length]
        assert not any(data[length:])
    held = [tensor for path in release.glob("*.safetensors") for tensor in load_file(path).values()]
    assert all(tensor.any() for tensor in held)


def test_a_header_longer_than_the_first_request_is_brought_whole(put, tmp_path, monkeypatch):
    """Thousands of tensors have a header of more than what is asked for at first."""
    monkeypatch.setattr(outlines, "_FIRST_BYTES", 64)
    made = tmp_path / "made"
    made.mkdir()
    tensors = {f"layer.{number}.weight": torch.ones(2) for number in range(50)}
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "to").mkdir()
    outline = bring_outline(put(files_of(made)), tmp_path / "to")
    assert read_checkpoint(outline) == read_checkpoint(made)


def test_nonsense_in_place_of_a_header_is_told_by_its_reader(put, tmp_path):
    """A length beyond the file asks for nothing more, and is found as it is in a directory."""
    files = {"model.safetensors": struct.pack("<Q", 1 << 50) + b"{}", "config.json": json.dumps({}).encode()}
    outline = bring_outline(put(files), tmp_path)
    assert "files.unreadable" in {each.rule.id for each in check_checkpoint(outline)}


def test_other_forms_of_the_weights_stay_where_they_are(release, put, tmp_path):
    """Pickles and the files of folders are not brought; that they are there is known."""
    files = files_of(release) | {
        "pytorch_model.bin": bytes(100_000),
        "onnx/model.onnx": b"x",
        "own/code.py": b"a = 1\n",
    }
    outline = bring_outline(put(files), tmp_path)
    assert (outline / "pytorch_model.bin").stat().st_size == 100_000
    assert not (outline / "onnx").exists()
    assert (outline / "own" / "code.py").read_bytes() == b"a = 1\n"


def test_a_directory_is_its_own_outline(release, tmp_path):
    """Nothing is copied of what lies here."""
    assert bring_outline(LocalPath(release), tmp_path) == release


@pytest.mark.usefixtures("hub")
def test_a_place_that_is_not_there_is_told(tmp_path):
    """No such repository."""
    with pytest.raises(NotFoundError):
        bring_outline(HubRepo(repo_id="org/nothing", revision="main"), tmp_path)
