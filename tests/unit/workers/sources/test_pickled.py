"""Adapters that come as a pickle merge as their safetensors do; a pickle of anything else is refused and never run."""

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from jobs.errors import BadInputError, InternalError, NoCapacityError, TransientIOError, UnsupportedError
from jobs.locations import LocalPath
from tests.merges import different, merge, merge_by_peft, plan_pass
from tests.methods import make_method_adapter
from tests.models import build_llama, load_plain, make_adapter
from workers.parity.inference import quiet_libraries
from workers.sources.confinement import Ended
from workers.sources.fetch import fetch_adapter
from workers.sources.pickled import _failure, convert


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


def save_pickled(base, adapter, directory):
    """Load an adapter and save it by PEFT in the format of old."""
    with quiet_libraries():
        PeftModel.from_pretrained(load_plain(base), adapter).save_pretrained(directory, safe_serialization=False)
    assert (directory / "adapter_model.bin").exists()
    assert not list(directory.glob("*.safetensors"))
    return directory


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """One adapter as safetensors and as a pickle."""
    directory = tmp_path_factory.mktemp("adapters")
    plain = make_adapter(base, directory / "plain")
    return plain, save_pickled(base, plain, directory / "pickled")


@pytest.fixture
def adapter(adapters, tmp_path):
    """A copy of the pickled adapter, to be damaged."""
    return shutil.copytree(adapters[1], tmp_path / "adapter")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "adapter_model.bin"


class Harmful:
    """A pickle of it runs a command when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def left_in(cache):
    """What is in a cache, lock files that stay aside."""
    return sorted(
        path.name for path in (cache / "gathered").iterdir() if path.suffix != ".lock" or "part-" in path.name
    )


def refused(adapter, kind, match):
    """The adapter is refused by name, and leaves nothing in the cache."""
    cache = adapter.parent / "cache"
    with pytest.raises(kind, match=match) as error:
        fetch_adapter(LocalPath(adapter), cache)
    assert type(error.value) is kind
    assert str(adapter / "adapter_model.bin") in str(error.value)
    assert "weights_only" not in str(error.value)
    assert left_in(cache) == []


class TestMerge:
    def test_merges_as_its_safetensors_do(self, base, adapters, tmp_path):
        plain, pickled = adapters
        merged = merge(base, pickled, tmp_path / "pickled")
        assert different(merged, merge(base, plain, tmp_path / "plain")) == []
        assert different(merged, merge_by_peft(base, pickled, tmp_path / "peft")) == []
        assert different(merged, load_file(base / "model.safetensors")) != []

    @pytest.mark.parametrize("method", ["VERA", "VBLORA"])
    def test_tensors_that_layers_share_are_written_for_each(self, base, tmp_path, method):
        plain = make_method_adapter(base, tmp_path / "plain", method)
        pickled = save_pickled(base, plain, tmp_path / "pickled")
        source = fetch_adapter(LocalPath(pickled), tmp_path / "cache")
        saved = load_file(plain / "adapter_model.safetensors")
        assert different(load_file(source.directory / "adapter_model.safetensors"), saved) == []

    def test_safetensors_go_before_a_pickle(self, adapters, tmp_path):
        plain, _ = adapters
        before = fetch_adapter(LocalPath(plain), tmp_path / "cache")
        mixed = shutil.copytree(plain, tmp_path / "mixed")
        (mixed / "adapter_model.bin").write_bytes(pickle.dumps(Harmful(tmp_path / "trace")))
        source = fetch_adapter(LocalPath(mixed), tmp_path / "cache")
        assert (source.directory, source.digest) == (mixed, before.digest)
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / "trace").exists()

    def test_nan_passes_and_is_named_by_the_merge(self, base, adapter, tmp_path):
        tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
        name = next(name for name in tensors if "lora_B" in name)
        tensors[name][0, 0] = float("nan")
        torch.save(tensors, adapter / "adapter_model.bin")
        result = plan_pass(base, {"job": adapter}, tmp_path / "merge").run()
        assert isinstance(result.errors["job"], BadInputError)
        assert f"tensor {name}: expected finite numbers, found NaN" in str(result.errors["job"])


class TestCache:
    def test_other_files_lie_beside_the_converted_weights(self, adapter, tmp_path):
        (adapter / "tokenizer.json").write_text("{}")
        (adapter / "additional_chat_templates").mkdir()
        (adapter / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
        (adapter / "optimizer.pt").write_bytes(b"pickle")
        source = fetch_adapter(LocalPath(adapter), tmp_path / "cache")
        assert source.location == LocalPath(adapter)
        assert source.directory == tmp_path / "cache" / "gathered" / f"{source.digest}-2"
        found = {p.relative_to(source.directory).as_posix() for p in source.directory.rglob("*") if p.is_file()}
        copied = {"adapter_config.json", "tokenizer.json", "additional_chat_templates/rag.jinja", "README.md"}
        assert found == copied | {"adapter_model.safetensors", ".trained_beside.json", ".reordered_beside.json"}
        assert all((source.directory / name).read_bytes() == (adapter / name).read_bytes() for name in copied)
        with safe_open(source.directory / "adapter_model.safetensors", "pt") as weights:
            assert weights.metadata() == {"format": "pt"}

    def test_digest_is_that_of_the_files_as_they_were(self, adapter, tmp_path):
        first = fetch_adapter(LocalPath(adapter), tmp_path / "cache")
        tensors = torch.load(adapter / "adapter_model.bin", weights_only=True)
        torch.save(tensors, adapter / "adapter_model.bin", _use_new_zipfile_serialization=False)
        second = fetch_adapter(LocalPath(adapter), tmp_path / "cache")
        assert first.digest != second.digest
        weights = [(source.directory / "adapter_model.safetensors").read_bytes() for source in (first, second)]
        assert weights[0] == weights[1]

    def test_second_fetch_finds_the_converted_one(self, adapter, tmp_path, monkeypatch):
        first = fetch_adapter(LocalPath(adapter), tmp_path / "cache")
        monkeypatch.setattr("workers.sources.adapter_files.convert", None)
        assert fetch_adapter(LocalPath(adapter), tmp_path / "cache") == first

    def test_many_at_once_convert_it_once(self, adapter, tmp_path, monkeypatch):
        started = []
        monkeypatch.setattr(
            "workers.sources.adapter_files.convert", lambda *args: (started.append(args), convert(*args))
        )
        with ThreadPoolExecutor(3) as pool:
            sources = set(pool.map(lambda _: fetch_adapter(LocalPath(adapter), tmp_path / "cache"), range(3)))
        assert len(sources) == len(started) == 1

    def test_an_adapter_that_changes_meanwhile_is_not_kept(self, adapter, tmp_path, monkeypatch):
        def change_after(path, target):
            convert(path, target)
            (adapter / "adapter_config.json").write_text("{}")

        monkeypatch.setattr("workers.sources.adapter_files.convert", change_after)
        with pytest.raises(TransientIOError, match="was changed while it was read"):
            fetch_adapter(LocalPath(adapter), tmp_path / "cache")
        assert left_in(tmp_path / "cache") == []

    def test_what_a_killed_process_left_is_swept(self, adapter, tmp_path):
        cache = tmp_path / "cache"
        code = (
            "import sys; from pathlib import Path; from jobs.locations import LocalPath; "
            "from workers.sources.fetch import fetch_adapter; "
            "fetch_adapter(LocalPath(Path(sys.argv[1])), Path(sys.argv[2]))"
        )
        process = subprocess.Popen([sys.executable, "-c", code, adapter, cache])
        deadline = time.monotonic() + 60
        while not list(cache.glob("gathered/*.part-*/adapter_model.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert [name for name in left_in(cache) if ".part-" in name]
        source = fetch_adapter(LocalPath(adapter), cache)
        assert left_in(cache) == [f"{source.digest}-2"]


class TestRefusals:
    @pytest.mark.parametrize("protocol", ["zip", "legacy", "bare"])
    def test_a_pickle_that_runs_commands_is_refused_and_not_run(self, adapter, tmp_path, protocol):
        content = {"weight": torch.zeros(3), "extra": Harmful(tmp_path / "trace")}
        if protocol == "bare":
            (adapter / "adapter_model.bin").write_bytes(pickle.dumps(content["extra"], protocol=2))
        else:
            torch.save(content, adapter / "adapter_model.bin", _use_new_zipfile_serialization=protocol == "zip")
        refused(adapter, UnsupportedError, r"asks for posix\.system, which could run code and was not run; .* save it")
        assert not (tmp_path / "trace").exists()
        with contextlib.suppress(RuntimeError):  # a bare pickle is none of torch's, which it finds out too late
            torch.load(adapter / "adapter_model.bin", weights_only=False)
        assert (tmp_path / "trace").exists(), "it does no harm to anybody, so this test shows nothing"

    @pytest.mark.parametrize("num_bytes", [0, 100, -1])
    def test_truncated(self, adapter, num_bytes):
        path = adapter / "adapter_model.bin"
        path.write_bytes(path.read_bytes()[:num_bytes])
        refused(adapter, BadInputError, r"adapter_model\.bin: expected what torch\.save writes, .* fetch it again")

    def test_truncated_in_the_legacy_format(self, adapter):
        path = adapter / "adapter_model.bin"
        torch.save({"a": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes()[:-50])
        refused(adapter, BadInputError, r"cannot be read \(unexpected EOF, expected 50 more bytes\)")

    @pytest.mark.parametrize("content", [b"garbage" * 99, bytes(5000), b"PK\x03\x04" * 99, b"version https://git-lfs"])
    def test_garbage(self, adapter, content):
        (adapter / "adapter_model.bin").write_bytes(content)
        refused(adapter, BadInputError, r"adapter_model\.bin: expected what torch\.save writes, found")

    @pytest.mark.parametrize(
        ("content", "match"),
        [
            ([torch.zeros(1)], "expected a dict of tensors by name, found list"),
            (torch.zeros(1), "expected a dict of tensors by name, found Tensor"),
            ({"a": {"b": torch.zeros(1)}}, "expected tensors by name, found dict under 'a'"),
            ({"a": torch.zeros(1), "step": 7}, "expected tensors by name, found int under 'step'"),
            ({3: torch.zeros(1)}, "expected tensors by name, found Tensor under 3"),
        ],
        ids=["list", "tensor", "nested", "number", "numbered"],
    )
    def test_anything_but_tensors_by_name(self, adapter, content, match):
        torch.save(content, adapter / "adapter_model.bin")
        refused(adapter, BadInputError, match)

    @pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:TypedStorage is deprecated")
    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda: torch.eye(3).to_sparse(), r"layout torch\.sparse_coo"),
            (lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8), r"a quantized one, torch\.qint8"),
            (lambda: torch.zeros(3, device="meta"), "one on device meta"),
            (lambda: torch.zeros(3, dtype=torch.complex64), r"dtype torch\.complex64"),
        ],
        ids=["sparse", "quantized", "meta", "complex"],
    )
    def test_tensors_of_another_kind(self, adapter, make, found):
        torch.save({"a": make()}, adapter / "adapter_model.bin")
        refused(
            adapter, UnsupportedError, f"tensor a: expected a dense tensor that safetensors can hold, found {found}"
        )

    def test_tensors_larger_than_their_file(self, adapter):
        torch.save({"a": torch.zeros(1).expand(1 << 40)}, adapter / "adapter_model.bin")
        refused(
            adapter, BadInputError, r"expected tensors of at most \d+ bytes in a file of its size, found 4398046511104"
        )

    def test_a_small_file_that_asks_for_much_memory(self, adapter):
        path = adapter / "adapter_model.bin"
        torch.save({"a": torch.zeros(1 << 10)}, path, _use_new_zipfile_serialization=False)
        few, many = (bytes(pickle.dumps(count, protocol=2)[2:-1]) for count in (1 << 10, 1 << 30))
        assert path.read_bytes().count(few) == 2  # elements of the storage and of the tensor
        path.write_bytes(path.read_bytes().replace(few, many))
        refused(adapter, BadInputError, "take more memory than a file of its size may")

    def test_a_process_that_is_killed(self, adapter):
        def kill():
            for _ in range(6000):
                for child in psutil.Process().children():
                    if "workers.sources.pickled" in " ".join(child.cmdline()):
                        child.kill()
                        return
                time.sleep(0.01)

        killer = threading.Thread(target=kill)
        killer.start()
        refused(adapter, BadInputError, r"the process that read it was killed \(SIGKILL\)")
        killer.join()


class TestFile:
    def test_views_become_tensors_of_their_own(self, file, tmp_path):
        whole = torch.arange(12, dtype=torch.float32).reshape(3, 4)
        tensors = OrderedDict(
            whole=whole,
            same=whole,
            row=whole[1],
            column=whole[:, 1],
            transposed=whole.t(),
            repeated=whole[0].expand(2, 4),
            trained=torch.nn.Parameter(whole),
            scalar=torch.tensor(3.5, dtype=torch.float64),
            empty=torch.zeros(0, 3, dtype=torch.int8),
            half=torch.tensor([1.5], dtype=torch.bfloat16),
            flags=torch.tensor([True, False]),
        )
        torch.save(tensors, file)
        convert(file, tmp_path / "out")
        expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        assert different(load_file(tmp_path / "out"), expected) == []

    def test_many_large_tensors(self, file, tmp_path):
        torch.manual_seed(0)
        tensors = {f"{i}": torch.randn(1 << 20) for i in range(40)}
        torch.save(tensors, file)
        convert(file, tmp_path / "out")
        assert different(load_file(tmp_path / "out"), tensors) == []

    def test_how_a_process_ended_is_told(self, file):
        late = _failure(file, Ended(None, ""), 120.0, "fetch it again")
        assert type(late) is BadInputError
        assert f"{file}: reading it took more than 120 seconds" in str(late)
        full = _failure(
            file, Ended(1, 'warning\n["NoCapacityError", "writing x: No space left"]\n'), 1.0, "fetch it again"
        )
        assert type(full) is NoCapacityError
        for said in ("Traceback\x1b[1m\nImportError: no torch", "", "7", '["OSError", "x"]', "[[], []]", "{}"):
            broken = _failure(file, Ended(1, said), 1.0, "fetch it again")
            assert type(broken) is InternalError
            assert str(broken).isprintable()
        assert type(_failure(file, Ended(-signal.SIGTERM, ""), 1.0, "fetch it again")) is TransientIOError
        killed = _failure(file, Ended(-signal.SIGSEGV, ""), 1.0, "fetch it again")
        assert "killed (SIGSEGV)" in str(killed)
