"""Files that hold or bring down whoever uses them are refused, in seconds, and the worker is none the worse."""

import contextlib
import gc
import json
import math
import operator
import shutil
import signal
import subprocess
from collections import OrderedDict

import pytest
from peft import BOFTConfig

from jobs.errors import BadInputError, UnsupportedError
from jobs.locations import LocalPath
from jobs.parity_policy import ParityPolicy
from jobs.request import MergeRequest
from tests.merges import release
from tests.models import build_llama, make_adapter
from workers.adapters.adapter import Adapter, open_adapter
from workers.adapters.wearing import match
from workers.bases.model import skeleton
from workers.merging.settings import WorkerSettings
from workers.sources.fetch import fetch_adapter, fetch_base
from workers.unit import checking, vetting
from workers.unit.checking import vet_checkpoint
from workers.unit.forks import Answer, Bounds, ForkServer
from workers.unit.vetting import vet_adapter, vet_base, vet_prompts
from workers.worker import MergeWorker

BOMB = "(([a-z_.0-9])+)+$!"
"""Backtracks for longer than the universe lasts on any module's name."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vetting")
    base = build_llama(directory / "base")
    return base, make_adapter(base, directory / "adapter")


@pytest.fixture(scope="module", autouse=True)
def little_time():
    """A second and a half is enough for a tiny model, and for a bomb to be known as one."""
    before = vetting.CPU_SECONDS
    vetting.CPU_SECONDS = 2
    yield
    vetting.CPU_SECONDS = before


def changed(source, target, name, change):
    shutil.copytree(source, target)
    content = json.loads((target / name).read_text())
    (target / name).write_text(json.dumps(change(content)))
    return target


def request(base, adapter):
    return MergeRequest(base=str(base), adapter=str(adapter), destination="/releases/a", base_quantization="none")


def vet(base, adapter, cache):
    asked = request(base, adapter)
    source = fetch_base(LocalPath(base), cache)
    vet_base(source, asked)
    vet_adapter(source, asked, fetch_adapter(LocalPath(adapter), cache))


@pytest.mark.parametrize("field", [{"target_modules": BOMB}, {"rank_pattern": {BOMB: 2}}], ids=min)
def test_a_regular_expression_that_never_ends_is_refused(made, tmp_path, field):
    base, adapter = made
    bad = changed(adapter, tmp_path / "bad", "adapter_config.json", lambda config: config | field)
    with pytest.raises(BadInputError, match=rf"adapter_config\.json: planning with it takes .*look at .*{min(field)}"):
        vet(base, bad, tmp_path)
    vet(base, adapter, tmp_path)


def test_patterns_have_no_more_time_where_a_method_computes_with_values(made, tmp_path, monkeypatch):
    base, adapter = made
    boft = {"peft_type": "BOFT", "boft_block_size": 4, "target_modules": BOMB}
    bad = changed(adapter, tmp_path / "bad", "adapter_config.json", lambda _: boft)
    call = vetting.server.call

    def bounded(*arguments, bounds):
        assert bounds.cpu_seconds == vetting.CPU_SECONDS
        return call(*arguments, bounds=bounds)

    monkeypatch.setattr(vetting, "_WEIGHED_BYTES_PER_SECOND", 1)
    monkeypatch.setattr(vetting.server, "call", bounded)
    with pytest.raises(BadInputError, match=r"takes more than 2 seconds of a processor.* look at target_modules"):
        vet(base, bad, tmp_path)


def test_patterns_are_held_against_modules_that_only_peft_names(made):
    base, adapter = made
    config = BOFTConfig(target_modules=None, layers_to_transform=[0], layers_pattern=["("])
    with pytest.raises(BadInputError, match="unterminated subpattern"):
        match(Adapter(adapter, "BOFT", config, {}), skeleton(base))


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_list_without_end_is_refused_unplanned(made, tmp_path, field):
    base, adapter = made
    many = [f"module{number}" for number in range(vetting.MAX_ENTRIES + 1)]
    bad = changed(adapter, tmp_path / "bad", "adapter_config.json", lambda config: config | {field: many})
    with pytest.raises(BadInputError, match=f"field {field}: expected at most 10000 entries, found 10001"):
        vet(base, bad, tmp_path)


@pytest.mark.parametrize("method", [[["LORA"]], {"LORA": 1}, 7, True])
def test_a_method_that_is_no_name_is_refused_as_one(made, tmp_path, method):
    base, adapter = made
    adapter = changed(adapter, tmp_path / "adapter", "adapter_config.json", lambda it: it | {"peft_type": method})
    vet(base, adapter, tmp_path)  # what it tries out is refused there: that is said when it is planned
    with pytest.raises(UnsupportedError, match=r"adapter_config\.json: peft_type .* is unknown"):
        open_adapter(adapter)


def test_a_model_of_a_million_layers_is_refused_whatever_the_field_is_called(made, tmp_path):
    base, adapter = made
    deep = {"model_type": "mpt", "architectures": ["MptForCausalLM"], "d_model": 64, "n_heads": 4, "n_layers": 10**6}
    bad = changed(base, tmp_path / "deep", "config.json", lambda _: deep | {"depth": 10**6})
    with pytest.raises(BadInputError, match=r"config\.json: .*1000000"):
        vet(bad, adapter, tmp_path)
    wide = changed(
        base, tmp_path / "wide", "config.json", lambda config: config | {"junk": "9" * 10, "head_dim": 10**12}
    )
    with pytest.raises(BadInputError):
        vet(wide, adapter, tmp_path)


def test_a_tokenizer_that_grows_text_without_end_is_refused(made, tmp_path):
    base, adapter = made
    grows = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    growth = {"type": "Sequence", "normalizers": [grows] * 5}
    bad = changed(base, tmp_path / "bad", "tokenizer.json", lambda tokenizer: tokenizer | {"normalizer": growth})
    with pytest.raises(BadInputError, match=r"tokenizing the prompts takes .* look at its normalizer"):
        vet_prompts(request(bad, adapter), bad, bad)
    vet_prompts(request(base, adapter), base, base)


def test_what_was_tried_out_is_not_tried_out_again(made, tmp_path, monkeypatch):
    base, adapter = made
    vet(base, adapter, tmp_path)
    monkeypatch.setattr(vetting.server, "call", None)
    vet(base, adapter, tmp_path)


def test_an_adapter_with_other_files_of_a_tokenizer_is_tried_out_anew(made, tmp_path, monkeypatch):
    base, adapter = made
    vet(base, adapter, tmp_path)
    asked: list[Bounds] = []
    monkeypatch.setattr(vetting.server, "call", lambda *_, bounds: asked.append(bounds) or Answer())
    own = shutil.copytree(adapter, tmp_path / "own")
    for content in ("{}", '{"model": {}}', '{"model": {}}' + " " * (vetting.CPU_SECONDS << 22)):
        shutil.copy(base / "tokenizer_config.json", own)
        (own / "tokenizer.json").write_text(content)
        vet(base, own, tmp_path)
        vet(base, own, tmp_path)
    seconds = [bounds.cpu_seconds for bounds in asked]
    assert seconds == [vetting.CPU_SECONDS, vetting.CPU_SECONDS, 2 * vetting.CPU_SECONDS]


def test_a_library_that_stumbles_is_no_fault_of_ours(made, monkeypatch):
    base, adapter = made
    monkeypatch.setattr(vetting.server, "call", lambda *_, **__: Answer(error="KeyError: 'vocab'", traceback="..."))
    asked = request(base, adapter)
    with pytest.raises(UnsupportedError, match="fails in the libraries: KeyError: 'vocab'"):
        vet_prompts(asked.model_copy(update={"parity": ParityPolicy(max_new_tokens=3)}), base, base)


@pytest.fixture
def server():
    with contextlib.closing(ForkServer(gc.collect)) as started:
        yield started


def ended_well(answer):
    return answer.overran is None and answer.error is None


def test_a_call_ends_as_it_ends(server):
    bounds = Bounds(cpu_seconds=1, memory_bytes=256 << 20)
    assert ended_well(server.call(len, "text", bounds=bounds))
    assert server.call(operator.truediv, 1, 0, bounds=bounds).error == "ZeroDivisionError: division by zero"
    assert "256 MiB of memory" in (server.call(operator.mul, b"x", 1 << 40, bounds=bounds).overran or "")
    assert "crashed" in (server.call(signal.raise_signal, signal.SIGSEGV, bounds=bounds).overran or "")
    assert "1 seconds of a processor" in (server.call(math.factorial, 10**8, bounds=bounds).overran or "")
    assert ended_well(server.call(len, "text", bounds=bounds))
    server.close()
    assert ended_well(server.call(len, "text", bounds=bounds))


def test_what_a_call_imports_of_the_libraries_the_next_one_finds(server):
    """And nothing else: `tabnanny` belongs to no package that was there."""
    bounds = Bounds(cpu_seconds=1, memory_bytes=256 << 20)
    assert ended_well(server.call(exec, "import sys; assert 'json.tool' not in sys.modules", bounds=bounds))
    made = "sys.modules['json.made'] = json"  # no file has it
    assert ended_well(server.call(exec, f"import json.tool, sys, tabnanny; {made}", bounds=bounds))
    assert ended_well(server.call(exec, "import sys; assert 'json.tool' in sys.modules", bounds=bounds))
    assert ended_well(server.call(exec, "import sys; assert 'tabnanny' not in sys.modules", bounds=bounds))


def test_adapters_of_one_recipe_are_checked_once(tmp_path, monkeypatch):
    """The check of a merged checkpoint, which builds its model: names, shapes and files beside them are the same."""
    base, checked = build_llama(tmp_path / "base"), []
    monkeypatch.setattr(checking, "_known", OrderedDict())
    monkeypatch.setattr(checking, "vet_checkpoint", lambda place: (vet_checkpoint(place), checked.append(place)))
    places = {name: tmp_path / name for name in ("cache", "scratch", "reports")}
    with contextlib.closing(MergeWorker(WorkerSettings(**places, device="cpu", num_threads=2))) as worker:
        for seed in range(2):
            adapter = make_adapter(base, tmp_path / f"adapter-{seed}", seed=seed)
            assert release(worker, (base, adapter), tmp_path / f"release-{seed}", "16bit").failure is None
    assert len(checked) == 1


def test_a_call_sees_none_of_our_variables_and_writes_no_file(server, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    bounds = Bounds(cpu_seconds=1, memory_bytes=256 << 20)
    empty = ["sh", "-c", 'test -z "$AWS_SECRET_ACCESS_KEY"']
    assert ended_well(server.call(subprocess.check_call, empty, bounds=bounds))
    found = server.call(shutil.copyfile, __file__, str(tmp_path / "copy"), bounds=bounds)
    assert "File too large" in (found.error or "")


@pytest.mark.parametrize("content", ["7", '{"dtype": false}', '{"use_cache": ' + "[" * 900 + "]" * 900 + "}"])
def test_a_generation_config_that_no_model_loads_beside_is_not_published(made, tmp_path, content):
    base, adapter = made
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(content)
    with pytest.raises(BadInputError, match=r"generation_config\.json: "):
        vet(tmp_path / "base", adapter, tmp_path)


def test_a_shard_larger_than_the_memory_for_planning_is_planned(made, tmp_path):
    """A file of 3 GiB with a hole, as shards of real bases are: it is mapped, and takes no memory."""
    base, adapter = made
    large = shutil.copytree(base, tmp_path / "large")
    path = large / "model.safetensors"
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    entries, size = json.loads(data[8:length]), 3 << 30
    end = len(data) - length
    entries["model.beside.weight"] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + data[length:])
        file.truncate(8 + len(header) + end + size)
    source = fetch_base(LocalPath(large), tmp_path / "cache")
    vet_base(source, request(large, adapter))
    vet_checkpoint(large)
