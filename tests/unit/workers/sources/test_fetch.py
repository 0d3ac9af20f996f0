"""Bases and adapters arrive whole, pinned, and without what a checkpoint does not need."""

import io
import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import AuthError, NotFoundError, TransientIOError, UnsupportedError
from jobs.locations import HubRepo, LocalPath, Location, S3Prefix
from tests.releases import write_files
from tests.servers.hub import Hub
from tests.servers.s3 import S3Server
from workers.sources.belongings import belongings, strays
from workers.sources.fetch import Source, fetch_adapter, fetch_base
from workers.sources.listing import LocalFiles


def safetensors(data: bytes, name: str = "w") -> bytes:
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


BASE = {
    "config.json": b'{"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "org/other--configuration_y.Y"}}',
    "modeling_x.py": b"from .layers_x import (\n    Layer,\n)\nfrom . import extra\n",
    "layers_x.py": b"import torch\nfrom .deep.rope import Rope\n",
    "extra.py": b"",
    "deep/rope.py": b"from ..layers_x import Layer\n",
    "model-00001-of-00002.safetensors": safetensors(bytes(9_000_000)),
    "model-00002-of-00002.safetensors": safetensors(bytes(10)),
    "model.safetensors.index.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"spm",
    "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["tokenization_x.T", null]}}',
    "tokenization_x.py": b"",
    "merges.txt": b"a b",
    "source.spm": b"spm",
    "x.vocab": b"a",
    "modules.json": b'[{"path": "", "type": "sentence_transformers.models.Transformer"}, {"path": "1_Pooling"}, '
    b'{"path": "2_Dense", "type": "custom_dense.Dense"}, {"path": "3_Normalize", "type": "gone.Normalize"}]',
    "custom_dense.py": b"",
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": safetensors(b"dense"),
    "README.md": b"# Base",
    "license.md": b"free",
    "COPYING": b"free",
    "Llama License Agreement.pdf": b"pdf",
    "\u8bb8\u53ef.txt": b"free",
    "LICENSES/MIT.txt": b"free",
    "ThirdPartyNotices.txt": b"thanks",
    "hf_quant_config.json": b"{}",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/rag.jinja": b"{{ y }}",
}
CLUTTER = {
    "stray.py": b"",
    "params.json": b"{}",
    "trainer_state.json": b"{}",
    "licenses.py": b"",
    "2_Dense/pytorch_model.bin": b"pickle",
    "2_Dense/openvino.onnx": b"onnx",
    "4_Other/config.json": b"{}",
    "pytorch_model-00001-of-00002.bin": b"pickle",
    "consolidated.safetensors": safetensors(b"twice"),
    "model.gguf": b"gguf",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "nested/model.safetensors": safetensors(b"other"),
}
ADAPTER = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "README.md": b"# Adapter",
    "adapter_model.safetensors": safetensors(bytes(5_000)),
    "tokenizer.json": b"{}",
}
IN_PARTS = {
    "adapter_config.json": b"{}",
    "adapter_model-00001-of-00002.safetensors": safetensors(b"first"),
    "adapter_model-00002-of-00002.safetensors": safetensors(b"second", name="v"),
    "vit.safetensors": safetensors(b"third", name="u"),
    "model.safetensors.index.json": b"{}",
}
ADAPTER_CLUTTER = {
    "adapter_model.bin": b"pickle",
    "optimizer.pt": b"pickle",
    "model.gguf": b"base",
    "checkpoint-5/x.json": b"{}",
    "trainer_state.json": b"{}",
}


def pickled() -> dict[str, bytes]:
    """Return the files of an adapter whose weights are only in a pickle."""
    weights = io.BytesIO()
    torch.save({"w": torch.arange(5000)}, weights)
    return {"adapter_config.json": b"{}", "tokenizer.json": b"{}", "adapter_model.bin": weights.getvalue()}


def names(source: Source) -> set[str]:
    """Files of a source's directory."""
    return {path.relative_to(source.directory).as_posix() for path in source.directory.rglob("*") if path.is_file()}


def write_objects(server: S3Server, place: S3Prefix, files: dict[str, bytes]) -> None:
    client = server.client()
    for name, data in files.items():
        client.put_object(Bucket=place.bucket, Key=f"{place.prefix}/{name}", Body=data)


@pytest.fixture(scope="module")
def written(s3_server: S3Server) -> S3Prefix:
    """A prefix with a base and an adapter below it, both with clutter."""
    place = S3Prefix(s3_server.bucket, "sources")
    write_objects(s3_server, place.child("base"), BASE | CLUTTER)
    write_objects(s3_server, place.child("adapter"), ADAPTER | ADAPTER_CLUTTER)
    return place


class TestLocal:
    def test_base_stays_where_it_is(self, tmp_path: Path) -> None:
        write_files(tmp_path / "base", BASE)
        source = fetch_base(LocalPath(tmp_path / "base"), tmp_path / "cache")
        assert (source.location, source.directory) == (LocalPath(tmp_path / "base"), tmp_path / "base")
        assert len(source.digest) == 64
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("fetch", [fetch_base, fetch_adapter])
    def test_clutter_does_not_count(self, tmp_path: Path, fetch: type[fetch_base]) -> None:
        wanted, clutter = (BASE, CLUTTER) if fetch is fetch_base else (ADAPTER, ADAPTER_CLUTTER)
        write_files(tmp_path / "there", wanted)
        before = fetch(LocalPath(tmp_path / "there"), tmp_path).digest
        write_files(tmp_path / "there", clutter)
        assert fetch(LocalPath(tmp_path / "there"), tmp_path).digest == before

    @pytest.mark.parametrize("name", sorted(BASE))
    def test_digest_of_a_base_follows_every_file(self, tmp_path: Path, name: str) -> None:
        write_files(tmp_path / "base", BASE)
        before = fetch_base(LocalPath(tmp_path / "base"), tmp_path).digest
        (tmp_path / "base" / name).write_bytes(BASE[name] + b" ")
        assert fetch_base(LocalPath(tmp_path / "base"), tmp_path).digest != before

    @pytest.mark.parametrize("place", [0, 4_500_000, -1], ids=["begin", "middle", "end"])
    def test_digest_of_a_base_follows_its_weights(self, tmp_path: Path, place: int) -> None:
        """Two trainings of one architecture, unpacked with the times of one archive."""
        digests = set()
        for change in (b"\0", b"\1"):
            weights = bytearray(9_000_000)
            weights[place] = change[0]
            write_files(tmp_path / "base", BASE | {"model-00001-of-00002.safetensors": safetensors(bytes(weights))})
            for path in (tmp_path / "base").rglob("*"):
                os.utime(path, (1, 1))
            digests.add(fetch_base(LocalPath(tmp_path / "base"), tmp_path).digest)
        assert len(digests) == 2

    def test_digest_of_a_base_takes_few_samples_of_many_tensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reads: list[int] = []
        pread = os.pread
        monkeypatch.setattr(os, "pread", lambda *args: (reads.append(args[1]), pread(*args))[1])
        entries = {
            f"w{place}": {"dtype": "U8", "shape": [9_000], "data_offsets": [place * 9_000, (place + 1) * 9_000]}
            for place in range(5_000)
        }
        header = json.dumps(entries).encode()
        write_files(tmp_path / "base", {"config.json": b"{}", "model.safetensors": b""})
        with (tmp_path / "base" / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + 5_000 * 9_000)
        fetch_base(LocalPath(tmp_path / "base"), tmp_path)
        assert 3_000 <= len(reads) <= 4_096
        assert max(reads) == 4_096

    def test_digest_of_a_base_reads_few_weights(self, tmp_path: Path) -> None:
        write_files(tmp_path / "base", BASE)
        with (tmp_path / "base" / "model-00001-of-00002.safetensors").open("ab") as file:
            file.truncate(1 << 40)  # a sparse TiB
        fetch_base(LocalPath(tmp_path / "base"), tmp_path)

    def test_header_that_lies_is_left_to_the_reader(self, tmp_path: Path) -> None:
        write_files(tmp_path / "base", BASE | {"model-00002-of-00002.safetensors": b"\xff" * 8})
        fetch_base(LocalPath(tmp_path / "base"), tmp_path)
        write_files(tmp_path / "base", {"model-00002-of-00002.safetensors": b"cut"})
        fetch_base(LocalPath(tmp_path / "base"), tmp_path)

    def test_digest_of_an_adapter_is_that_of_its_contents(self, tmp_path: Path) -> None:
        write_files(tmp_path / "a", ADAPTER)
        write_files(tmp_path / "b", ADAPTER)
        write_files(tmp_path / "c", ADAPTER | {"adapter_model.safetensors": safetensors(b"\x01" + bytes(4_999))})
        digests = [fetch_adapter(LocalPath(tmp_path / name), tmp_path).digest for name in "abc"]
        assert digests[0] == digests[1] != digests[2]

    def test_adapters_with_names_lie_in_folders(self, tmp_path: Path) -> None:
        """As PEFT saves them: each folder is an adapter, and the directory around them is none."""
        for folder in ("runs/policy", "runs/critic", "deep/checkpoint-900/policy", "deep/checkpoint-1500/policy"):
            write_files(tmp_path / folder, ADAPTER)
        digests = [fetch_adapter(LocalPath(tmp_path / "runs" / name), tmp_path).digest for name in ("policy", "critic")]
        assert digests[0] == digests[1]
        told = (
            rf"has no adapter_config\.json at its top; .* 2 have one: critic, policy; .* such as {tmp_path}/runs/critic"
        )
        with pytest.raises(NotFoundError, match=told):
            fetch_adapter(LocalPath(tmp_path / "runs"), tmp_path)
        with pytest.raises(NotFoundError, match=r"have one: checkpoint-900/policy, checkpoint-1500/policy; name"):
            fetch_adapter(LocalPath(tmp_path / "deep"), tmp_path)
        with pytest.raises(NotFoundError, match=r"has no adapter_config\.json at its top; .* 1 has one: policy; name"):
            fetch_adapter(LocalPath(tmp_path / "deep" / "checkpoint-900"), tmp_path)

    def test_an_adapter_at_the_top_is_meant_where_folders_have_others(self, tmp_path: Path) -> None:
        """PEFT saves the adapter `default` at the top, and those with names below it."""
        write_files(tmp_path / "a", ADAPTER)
        digest = fetch_adapter(LocalPath(tmp_path / "a"), tmp_path).digest
        write_files(tmp_path / "a" / "other", ADAPTER)
        assert fetch_adapter(LocalPath(tmp_path / "a"), tmp_path).digest == digest

    def test_modules_beside_an_adapter_belong_to_it(self, tmp_path: Path) -> None:
        modules = {"modules.json": b'[{"path": "2_Dense"}]', "2_Dense/model.safetensors": safetensors(b"dense")}
        write_files(tmp_path / "a", ADAPTER | modules)
        source = fetch_adapter(LocalPath(tmp_path / "a"), tmp_path)
        write_files(tmp_path / "a", {"2_Dense/model.safetensors": safetensors(b"other")})
        assert fetch_adapter(LocalPath(tmp_path / "a"), tmp_path).digest != source.digest
        with pytest.raises(TransientIOError, match=r"2_Dense/model\.safetensors was changed while it was read"):
            source.check_unchanged()

    def test_missing_directory_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"base .*/no is no directory; expected one with config\.json"):
            fetch_base(LocalPath(tmp_path / "no"), tmp_path)
        with pytest.raises(NotFoundError, match=r"adapter .*/no is no directory; expected one with adapter_config"):
            fetch_adapter(LocalPath(tmp_path / "no"), tmp_path)

    @pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
    def test_missing_file_is_named(self, tmp_path: Path, missing: str) -> None:
        write_files(tmp_path / "a", {name: data for name, data in ADAPTER.items() if name != missing})
        with pytest.raises(NotFoundError, match=rf"has no {missing[:13]}.*found .*tokenizer\.json"):
            fetch_adapter(LocalPath(tmp_path / "a"), tmp_path)

    def test_pickled_bases_of_other_names_are_refused(self, tmp_path: Path) -> None:
        for name in ("adapter_model.bin", "model.pt"):
            write_files(tmp_path / name, {"config.json": b"{}", name: pickled()["adapter_model.bin"]})
        with pytest.raises(UnsupportedError, match=r"base .*model\.pt.*re-save it as safetensors"):
            fetch_base(LocalPath(tmp_path / "model.pt"), tmp_path)
        with pytest.raises(NotFoundError, match=r"has no \*\.safetensors; found adapter_model\.bin"):
            fetch_base(LocalPath(tmp_path / "adapter_model.bin"), tmp_path)

    @pytest.mark.parametrize("weights", [None, "adapter_model.safetensors", "adapter_model.bin"])
    def test_a_base_with_an_adapter_of_its_own_is_refused(self, tmp_path: Path, weights: str | None) -> None:
        own = {"adapter_config.json": b"{}"} | ({weights: b""} if weights else {})
        write_files(tmp_path / "base", BASE | own)
        with pytest.raises(UnsupportedError, match=r"holds an adapter of its own \(adapter_config\.json beside config"):
            fetch_base(LocalPath(tmp_path / "base"), tmp_path)

    def test_part_of_an_adapter_that_is_missing_is_named(self, tmp_path: Path) -> None:
        write_files(tmp_path / "a", {"adapter_config.json": b"{}", "adapter_model-00001-of-00002.bin": b"pickle"})
        with pytest.raises(NotFoundError, match=r"has no adapter_model-00002-of-00002\.bin, a part of the adapter"):
            fetch_adapter(LocalPath(tmp_path / "a"), tmp_path)

    def test_pickled_adapter_without_a_config_is_named(self, tmp_path: Path) -> None:
        write_files(tmp_path / "a", {"adapter_model.bin": b"pickle"})
        with pytest.raises(NotFoundError, match=r"has no adapter_config\.json"):
            fetch_adapter(LocalPath(tmp_path / "a"), tmp_path)


def check_gathered(place: Location, tmp_path: Path) -> None:
    """Fetch an adapter in several files: it is what the same files in a directory are."""
    source = fetch_adapter(place, tmp_path / "cache")
    assert names(source) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        ".trained_beside.json",
        ".reordered_beside.json",
    }
    assert source.beside == {"u": "vit.safetensors"}
    tensors = load_file(source.directory / "adapter_model.safetensors")
    found = {name: bytes(tensor.tolist()) for name, tensor in tensors.items()}
    assert found == {"w": b"first", "v": b"second", "u": b"third"}
    write_files(tmp_path / "local", IN_PARTS)
    assert fetch_adapter(LocalPath(tmp_path / "local"), tmp_path / "cache").digest == source.digest


def check_converted(place: Location, tmp_path: Path) -> Source:
    """Fetch a pickled adapter: it is what the same files in a directory are."""
    source = fetch_adapter(place, tmp_path / "cache")
    assert source.directory == tmp_path / "cache" / "gathered" / f"{source.digest}-2"
    made = {"adapter_model.safetensors", ".trained_beside.json", ".reordered_beside.json"}
    assert names(source) == pickled().keys() - {"adapter_model.bin"} | made
    assert torch.equal(load_file(source.directory / "adapter_model.safetensors")["w"], torch.arange(5000))
    write_files(tmp_path / "local", pickled())
    assert fetch_adapter(LocalPath(tmp_path / "local"), tmp_path / "cache").directory == source.directory
    assert fetch_adapter(place, tmp_path / "cache") == source
    return source


@pytest.mark.s3
class TestS3:
    @pytest.fixture
    def place(self, written: S3Prefix, s3: S3Server) -> S3Prefix:
        self.server = s3
        return written

    def test_base_is_brought_without_clutter(self, place: S3Prefix, tmp_path: Path) -> None:
        source = fetch_base(place.child("base"), tmp_path / "cache")
        assert source.directory == tmp_path / "cache" / "sources" / source.digest
        assert {name: (source.directory / name).read_bytes() for name in names(source)} == BASE

    def test_adapter_has_the_digest_of_its_contents(self, place: S3Prefix, tmp_path: Path) -> None:
        write_files(tmp_path / "local", ADAPTER)
        source = fetch_adapter(place.child("adapter"), tmp_path / "cache")
        assert names(source) == ADAPTER.keys()
        assert source.digest == fetch_adapter(LocalPath(tmp_path / "local"), tmp_path).digest

    def test_adapters_with_names_lie_below_one_prefix(self, place: S3Prefix, tmp_path: Path) -> None:
        run = place.child("run")
        for name in ("policy", "critic"):
            write_objects(self.server, run.child(name), ADAPTER)
        found = [fetch_adapter(run.child(name), tmp_path / "cache") for name in ("policy", "critic")]
        assert found[0].digest == found[1].digest
        with pytest.raises(NotFoundError, match=rf"2 have one: critic, policy; .* such as {run}/critic"):
            fetch_adapter(run, tmp_path)

    def test_pickled_adapter_is_converted(self, place: S3Prefix, tmp_path: Path) -> None:
        write_objects(self.server, place.child("pickled"), pickled())
        check_converted(place.child("pickled"), tmp_path)

    def test_adapter_in_several_files_is_gathered(self, place: S3Prefix, tmp_path: Path) -> None:
        write_objects(self.server, place.child("parts"), IN_PARTS | {"optimizer.pt": b"pickle"})
        check_gathered(place.child("parts"), tmp_path)

    def test_second_fetch_brings_nothing(self, place: S3Prefix, tmp_path: Path) -> None:
        first = fetch_base(place.child("base"), tmp_path / "cache")
        identity = {path: path.stat().st_ino for path in first.directory.rglob("*")}
        assert fetch_base(place.child("base"), tmp_path / "cache") == first
        assert {path: path.stat().st_ino for path in first.directory.rglob("*")} == identity

    def test_many_at_once_bring_it_once(self, place: S3Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import workers.sources.fetch

        brought = []
        download = workers.sources.fetch._download
        monkeypatch.setattr(workers.sources.fetch, "_download", lambda *args: (brought.append(args), download(*args)))
        with ThreadPoolExecutor(4) as pool:
            sources = list(pool.map(lambda _: fetch_base(place.child("base"), tmp_path / "cache"), range(4)))
        assert len(set(sources)) == len(brought) == 1

    def test_changed_object_is_another_source(self, place: S3Prefix, tmp_path: Path) -> None:
        adapter = place.child("changing")
        write_objects(self.server, adapter, ADAPTER)
        first = fetch_adapter(adapter, tmp_path / "cache")
        write_objects(self.server, adapter, {"tokenizer.json": b"[]"})
        second = fetch_adapter(adapter, tmp_path / "cache")
        assert first.digest != second.digest
        assert (second.directory / "tokenizer.json").read_bytes() == b"[]"

    def test_broken_download_leaves_no_trace(
        self, place: S3Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(
                "workers.files.scratch.sync_tree", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
            )
            with pytest.raises(Exception, match="No space left"):
                fetch_base(place.child("base"), tmp_path / "cache")
        left = [path.suffix for path in (tmp_path / "cache" / "sources").iterdir()]
        assert left == [".lock"]
        assert names(fetch_base(place.child("base"), tmp_path / "cache")) == BASE.keys()

    def test_missing_places_are_named(self, place: S3Prefix, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"base s3://.*/nothing has no \*\.safetensors; found nothing"):
            fetch_base(place.child("nothing"), tmp_path)
        with pytest.raises(NotFoundError, match="bucket 'no-such-bucket'"):
            fetch_base(S3Prefix("no-such-bucket", "x"), tmp_path)

    def test_missing_credentials(self, place: S3Prefix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        with pytest.raises(AuthError, match="AWS_ACCESS_KEY_ID"):
            fetch_base(place.child("base"), tmp_path)


class TestHub:
    @pytest.fixture
    def place(self, hub: Hub, tmp_path: Path) -> HubRepo:
        place = HubRepo(f"org/{tmp_path.name}")
        hub.create(place.repo_id, BASE | CLUTTER)
        hub.create(f"{place.repo_id}-adapter", ADAPTER | ADAPTER_CLUTTER)
        return place

    def test_base_is_brought_without_clutter_and_pinned(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        source = fetch_base(place, tmp_path)
        assert {name: (source.directory / name).read_bytes() for name in names(source)} == BASE
        assert source.location == HubRepo(place.repo_id, hub.repos[place.repo_id][-1].oid)
        assert fetch_base(source.location, tmp_path) == source

    def test_a_folder_is_a_source_of_its_own(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        """Only its files are brought, its revision is pinned, and nothing of another folder changes its digest."""
        folders = ("a/adapters", "b")
        tree = {f"{folder}/{name}": data for folder in folders for name, data in (ADAPTER | ADAPTER_CLUTTER).items()}
        repo = HubRepo(f"{place.repo_id}-folders")
        hub.create(repo.repo_id, tree | {f"base [1]/{name}": data for name, data in (BASE | CLUTTER).items()})
        source = fetch_adapter(repo.folder("a/adapters"), tmp_path)
        commit = hub.repos[repo.repo_id][-1].oid
        assert source.location == HubRepo(repo.repo_id, commit, "a/adapters")
        snapshot = source.directory.parent.parent
        assert snapshot.name == commit
        assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} == {
            f"a/adapters/{name}" for name in ADAPTER
        }
        assert fetch_adapter(source.location, tmp_path) == source
        write_files(tmp_path / "local", ADAPTER)
        assert fetch_adapter(LocalPath(tmp_path / "local"), tmp_path).digest == source.digest
        hub.commit(repo.repo_id, "b alone", {"b/tokenizer.json": hub.keep(b"[]")})
        assert fetch_adapter(repo.folder("a/adapters"), tmp_path).digest == source.digest
        assert fetch_adapter(repo.folder("b"), tmp_path).digest != source.digest
        base = fetch_base(repo.folder("base [1]"), tmp_path)
        assert {name: (base.directory / name).read_bytes() for name in names(base)} == BASE

    def test_equal_bases_in_two_places_of_a_repository_have_different_digests(self, hub: Hub, tmp_path: Path) -> None:
        """The digest of a base on the Hub is taken from names: those in a folder are not those at the top."""
        files = {name: data for name, data in BASE.items() if name != "modules.json"}
        repo = HubRepo(f"org/{tmp_path.name}-twice")
        hub.create(repo.repo_id, files | {f"{folder}/{name}": data for folder in "xy" for name, data in files.items()})
        places = [repo, repo.folder("x"), repo.folder("y")]
        assert len({fetch_base(place, tmp_path).digest for place in places}) == 3

    def test_adapters_beside_a_base_are_no_part_of_it(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        """All folders of a commit share one directory of the cache."""
        tokenizer = {"lora/tokenizer_config.json": b"{}"}
        hub.create(f"{place.repo_id}-both", BASE | {f"lora/{name}": data for name, data in ADAPTER.items()} | tokenizer)
        repo = HubRepo(f"{place.repo_id}-both")
        before = fetch_base(repo, tmp_path)
        assert strays(LocalFiles(before.directory)) == ()
        fetch_adapter(repo.folder("lora"), tmp_path)
        assert fetch_base(repo, tmp_path) == before
        assert strays(LocalFiles(before.directory)) == ()
        assert not any(name.startswith("lora/") for name in belongings(LocalFiles(before.directory)))

    def test_a_repository_with_adapters_in_folders_alone_is_refused(
        self, place: HubRepo, hub: Hub, tmp_path: Path
    ) -> None:
        repo = HubRepo(f"{place.repo_id}-named")
        hub.create(
            repo.repo_id, {f"{folder}/{name}": data for folder in ("b", "a/c") for name, data in ADAPTER.items()}
        )
        with pytest.raises(NotFoundError, match=rf"2 have one: a/c, b; name .*, such as hf://{repo.repo_id}/a/c@main"):
            fetch_adapter(repo, tmp_path)
        with pytest.raises(NotFoundError, match=r"/nothing@main has no adapter_model\.safetensors"):
            fetch_adapter(repo.folder("nothing"), tmp_path)

    def test_a_folder_works_from_the_cache(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        repo = HubRepo(f"{place.repo_id}-cached")
        hub.create(repo.repo_id, {f"sub/{name}": data for name, data in (ADAPTER | ADAPTER_CLUTTER).items()})
        source = fetch_adapter(repo.folder("sub"), tmp_path)
        hub.fail("GET", "/", status=503, times=99)
        hub.fail("HEAD", "/", status=503, times=99)
        assert fetch_adapter(source.location, tmp_path) == source

    def test_new_commit_is_another_source(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        first = fetch_base(place, tmp_path)
        hub.commit(place.repo_id, "new tokenizer", {"tokenizer.json": hub.keep(b"[]")})
        second = fetch_base(place, tmp_path)
        assert first.digest != second.digest
        assert fetch_base(first.location, tmp_path) == first

    def test_adapter_has_the_digest_of_its_contents(self, place: HubRepo, tmp_path: Path) -> None:
        write_files(tmp_path / "local", ADAPTER)
        source = fetch_adapter(HubRepo(f"{place.repo_id}-adapter"), tmp_path)
        assert names(source) == ADAPTER.keys()
        assert source.digest == fetch_adapter(LocalPath(tmp_path / "local"), tmp_path).digest

    @pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"], ids=["offline", "unreachable"])
    def test_works_from_the_cache(self, place: HubRepo, tmp_path: Path, endpoint: str | None) -> None:
        """huggingface_hub reads HF_HUB_OFFLINE when it is imported."""
        source = fetch_base(place, tmp_path)
        code = (
            "import sys; from pathlib import Path; from jobs.locations import parse_location; "
            "from workers.sources.fetch import fetch_base; "
            "print(fetch_base(parse_location(sys.argv[1]), Path(sys.argv[2])))"
        )
        environment = os.environ | ({"HF_ENDPOINT": endpoint} if endpoint else {"HF_HUB_OFFLINE": "1"})
        command = [sys.executable, "-c", code, str(place), str(tmp_path)]
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert found.stdout.strip() == str(source)

    def test_what_is_missing_is_named(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match=r"hf://org/none@main at .* does not exist, or HF_TOKEN may not see it"):
            fetch_base(HubRepo("org/none"), tmp_path)
        with pytest.raises(NotFoundError, match=r"@v9 at .* has no such revision"):
            fetch_base(HubRepo(place.repo_id, "v9"), tmp_path)
        hub.create(f"{place.repo_id}-empty")
        with pytest.raises(NotFoundError, match=r"has no \*\.safetensors; found \.gitattributes"):
            fetch_base(HubRepo(f"{place.repo_id}-empty"), tmp_path)

    def test_pickled_adapter_is_converted(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        hub.create(f"{place.repo_id}-pickled", pickled() | {"nested/adapter_model.bin": b"pickle"})
        source = check_converted(HubRepo(f"{place.repo_id}-pickled"), tmp_path)
        assert source.location == HubRepo(f"{place.repo_id}-pickled", hub.repos[f"{place.repo_id}-pickled"][-1].oid)

    def test_adapter_in_several_files_is_gathered(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        hub.create(f"{place.repo_id}-parts", IN_PARTS | {"optimizer.pt": b"pickle"})
        check_gathered(HubRepo(f"{place.repo_id}-parts"), tmp_path)

    def test_pickled_bases_are_converted(self, place: HubRepo, hub: Hub, tmp_path: Path) -> None:
        files = {"config.json": b"{}", "pytorch_model.bin": pickled()["adapter_model.bin"], "model.onnx": b"other"}
        hub.create(f"{place.repo_id}-bin", files)
        source = fetch_base(HubRepo(f"{place.repo_id}-bin"), tmp_path)
        assert {path.name for path in source.directory.iterdir() if not path.name.startswith(".")} == {
            "config.json",
            "model.safetensors",
        }
        assert source == fetch_base(HubRepo(f"{place.repo_id}-bin"), tmp_path)

    @pytest.mark.parametrize(("status", "kind"), [(401, AuthError), (403, AuthError)])
    def test_refused(self, place: HubRepo, hub: Hub, tmp_path: Path, status: int, kind: type[Exception]) -> None:
        hub.fail("GET", "/api/models/", status=status, times=9)
        with pytest.raises(kind, match="HF_TOKEN"):
            fetch_base(place, tmp_path)
