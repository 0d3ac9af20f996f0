"""Quantized bases: made once whoever asks, kept whole or not at all, and made anew when damaged."""

import dataclasses
import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

import workers.bases.quantizing
from jobs.errors import BadInputError, CancelledError, InternalError, NoCapacityError, NotFoundError
from jobs.locations import LocalPath
from jobs.request import MergeRequest
from tests.merges import CPU, different, load_dequantized, open_descriptors, read_tensors
from tests.models import build_bnb_4bit, build_llama, load_plain
from workers.bases.quantized_base import QuantizedBase
from workers.bases.quantized_cache import QuantizedCache
from workers.bases.resident_bases import ResidentBases
from workers.files.checkpoint import read_checkpoint
from workers.files.layout import INDEX_FILE
from workers.files.scratch import exclusive
from workers.merging.base_plan import plan_base
from workers.sources.fetch import fetch_base
from workers.unit.footprint import passing_bytes, resident_bytes

MAKE = """
import pickle, sys
from pathlib import Path
import torch
from workers.bases.quantized_cache import QuantizedCache

torch.set_num_threads(1)
task = pickle.loads(Path(sys.argv[1]).read_bytes())
num_bytes = 0

def on_bytes(count):
    global num_bytes
    num_bytes += count
    if sys.argv[3] == "stop" and num_bytes > 40_000:
        print("half", flush=True)
        sys.stdin.read()

cache = QuantizedCache(Path(sys.argv[2]), torch.device("cpu"), 1)
print("ready", flush=True)
sys.stdin.readline()
base = cache.open(task, on_bytes)
print(num_bytes, *sorted(path.name for path in base.directories), flush=True)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_llama(tmp_path_factory.mktemp("base") / "llama", tokenizer=False)


def make_task(base, cache, **fields):
    request = MergeRequest(base=str(base), adapter="/adapter", destination="/destination", **fields)
    task = plan_base(fetch_base(LocalPath(base), cache), request).quantization
    assert task is not None
    return task


@pytest.fixture(scope="module")
def task(base, tmp_path_factory):
    return make_task(base, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def sharded_task(tmp_path_factory):
    places = tmp_path_factory.mktemp("sharded")
    return make_task(build_llama(places / "llama", max_shard_size="100KB", tokenizer=False), places)


def directory_of(made):
    (directory,) = made.directories
    return directory


class Reads:
    """Counts the bytes of the base read."""

    def __init__(self):
        self.num_bytes = 0
        self._lock = threading.Lock()

    def __call__(self, num_bytes):
        with self._lock:
            self.num_bytes += num_bytes


def weight_bytes(task):
    return sum(task.layout.tensors[name][1].num_bytes for name in task.weights)


def kept(root):
    """Return what is in a cache but locks."""
    return sorted(path.name for path in root.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_what_is_kept_is_what_transformers_saves(base, tmp_path, quant_type, double_quant):
    saved = read_tensors(build_bnb_4bit(base, tmp_path / "bnb", quant_type=quant_type, double_quant=double_quant))
    task = make_task(
        base,
        tmp_path,
        base_quantization=quant_type,
        quantization_options={"bnb_4bit_use_double_quant": double_quant},
    )
    made = QuantizedCache(tmp_path / "cache", CPU, 2).open(task, lambda _: None)
    stored = read_tensors(directory_of(made))
    assert made.names == frozenset(task.weights)
    assert different(stored, {name: tensor for name, tensor in saved.items() if name in stored}) == []
    assert len(stored) == sum("proj" in name for name in saved)


@pytest.mark.parametrize("double_quant", [False, True])
def test_errors_are_those_of_transformers_dequantized_weights(base, tmp_path, double_quant):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant)
    through_4bit, plain = load_dequantized(base, config).state_dict(), load_plain(base).state_dict()
    task = make_task(base, tmp_path, quantization_options={"bnb_4bit_use_double_quant": double_quant})
    errors = QuantizedCache(tmp_path / "cache", CPU, 2).open(task, lambda _: None).errors
    assert errors.keys() == set(task.weights)
    for name, error in errors.items():
        assert error == pytest.approx(float((through_4bit[name].double() - plain[name].double()).norm()), rel=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_same_bytes_come_of_any_number_of_threads(base, tmp_path, monkeypatch, double_quant):
    monkeypatch.setitem(workers.bases.quantizing._TILE_ELEMENTS, "cpu", 1 << 9)
    task = make_task(base, tmp_path, quantization_options={"bnb_4bit_use_double_quant": double_quant})
    digests = set()
    for number, num_threads in enumerate((1, 4, 4)):
        made = QuantizedCache(tmp_path / f"cache-{number}", CPU, num_threads).open(task, lambda _: None)
        digests.add((directory_of(made) / "digests.json").read_bytes())
    assert len(digests) == 1


def test_it_is_made_once(task, tmp_path):
    reads = Reads()
    cache = QuantizedCache(tmp_path, CPU, 2)
    first = cache.open(task, reads)
    assert reads.num_bytes == weight_bytes(task)
    again = QuantizedCache(tmp_path, CPU, 1).open(task, reads)
    assert reads.num_bytes == weight_bytes(task)
    assert first.directories == again.directories


def test_threads_do_not_change_the_bits(task, tmp_path):
    made = [directory_of(QuantizedCache(tmp_path / str(n), CPU, n).open(task, lambda _: None)) for n in (1, 4)]
    assert [path.read_bytes() for path in sorted(made[0].iterdir())] == [
        path.read_bytes() for path in sorted(made[1].iterdir())
    ]


def test_weights_are_views_of_mapped_files(task, tmp_path):
    made = QuantizedCache(tmp_path, CPU, 1).open(task, lambda _: None)
    before = open_descriptors()
    weight = made.weight(task.weights[0])
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(directory_of(made)) in line]
    address = weight.codes.data_ptr()
    ranges = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in mapped]
    assert any(begin <= address < end for begin, end in ranges)
    assert made.num_device_bytes == 0
    del weight
    assert open_descriptors() <= before


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "grow"])
@pytest.mark.parametrize("file", ["codes.safetensors", INDEX_FILE, "digests.json"])
def test_a_damaged_file_is_made_anew(task, tmp_path, file, damage):
    cache = QuantizedCache(tmp_path, CPU, 2)
    directory = directory_of(cache.open(task, lambda _: None))
    good = {path.name: path.read_bytes() for path in directory.iterdir()}
    data = bytearray(good[file])
    match damage:
        case "flip":
            data[len(data) // 2] ^= 4
        case "truncate":
            del data[-9:]
        case "grow":
            data += b"\0\0"
    (directory / file).unlink()
    if damage != "remove":
        (directory / file).write_bytes(data)
    reads = Reads()
    made = cache.open(task, reads)
    assert reads.num_bytes == weight_bytes(task)
    assert directory_of(made) == directory
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == good
    assert kept(tmp_path) == [directory.name]


@pytest.mark.parametrize("content", ["[]", "7", "{}", '{"a": 1}', '["ab"]'])
def test_digests_that_are_none_are_damage(task, tmp_path, content):
    cache = QuantizedCache(tmp_path, CPU, 2)
    directory = directory_of(cache.open(task, lambda _: None))
    (directory / "digests.json").write_text(content)
    reads = Reads()
    cache.open(task, reads)
    assert reads.num_bytes == weight_bytes(task)


def test_another_base_or_another_way_has_another_key(base, task, tmp_path):
    changed = build_llama(tmp_path / "changed", seed=1, tokenizer=False)
    tasks = [
        task,
        make_task(changed, tmp_path),
        make_task(base, tmp_path, base_quantization="fp4"),
        make_task(base, tmp_path, quantization_options={"bnb_4bit_use_double_quant": True}),
        make_task(base, tmp_path, quantization_options={"llm_int8_skip_modules": ["lm_head"]}),
        make_task(base, tmp_path, quantization_options={"llm_int8_skip_modules": ["q_proj"]}),
        make_task(base, tmp_path, dtype="float32"),
        make_task(base, tmp_path, dtype="bfloat16"),
    ]
    keys = [each.key(CPU) for each in tasks] + [task.key(torch.device("cuda"))]
    # Skipping the head by name is the default said aloud: the same modules, the same bits, the same key.
    assert keys[4] == keys[0]
    assert len({*keys}) == len(keys) - 1


def test_a_base_whose_weights_were_written_again_has_another_key(tmp_path):
    base = build_llama(tmp_path / "base", tokenizer=False)
    before = make_task(base, tmp_path).key(CPU)
    build_llama(base, seed=3, tokenizer=False)
    assert make_task(base, tmp_path).key(CPU) != before


@pytest.mark.slow
def test_two_processes_make_it_once_and_a_killed_one_leaves_nothing_half_made(task, tmp_path):
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    root = tmp_path / "cache"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(mode):
        return subprocess.Popen(
            [sys.executable, "-c", MAKE, tmp_path / "task", root, mode],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    with start("stop") as killed, start("go") as one, start("go") as other:
        for process in (killed, one, other):
            assert process.stdout.readline() == "ready\n"
        killed.stdin.write("go\n")
        killed.stdin.flush()
        assert killed.stdout.readline() == "half\n"
        assert [name for name in kept(root) if not name.startswith("making-")] == []
        for process in (one, other):  # they wait for the lock of the first
            process.stdin.write("go\n")
            process.stdin.flush()
        killed.send_signal(signal.SIGKILL)
        answers = [process.communicate(timeout=120)[0].split() for process in (one, other)]
    assert sorted(int(num_bytes) for num_bytes, _ in answers) == [0, weight_bytes(task)]
    (shard,) = task.by_shard.values()
    assert {name for _, name in answers} == {shard.key(CPU)}
    assert kept(root) == [shard.key(CPU)]


def shard_bytes(task):
    return {name: weight_bytes(part) for name, part in task.by_shard.items()}


def test_only_the_shards_that_are_asked_for_are_made(sharded_task, tmp_path):
    assert len(sharded_task.by_shard) > 2
    cache, reads = QuantizedCache(tmp_path, CPU, 2), Reads()
    base = cache.empty(sharded_task)
    name = sharded_task.weights[0]
    shard = sharded_task.layout.tensors[name][0].name
    cache.prepare(base, sharded_task, {name, "model.norm.weight"}, reads)
    assert reads.num_bytes == shard_bytes(sharded_task)[shard]
    assert base.weight(name).shape == sharded_task.layout.tensors[name][1].shape
    with pytest.raises(InternalError, match=sharded_task.weights[-1]):
        base.weight(sharded_task.weights[-1])
    cache.prepare(base, sharded_task, None, reads)
    assert reads.num_bytes == weight_bytes(sharded_task)
    assert base.errors.keys() == base.names == set(sharded_task.weights)


def test_shards_have_the_bits_that_the_whole_has(sharded_task, task, tmp_path):
    sharded = QuantizedCache(tmp_path, CPU, 2).open(sharded_task, lambda _: None)
    whole = QuantizedCache(tmp_path, CPU, 2).open(task, lambda _: None)
    for name in task.weights:
        assert torch.equal(sharded.weight(name).codes, whole.weight(name).codes)


def test_those_who_start_together_make_different_shards(sharded_task, tmp_path):
    root = tmp_path / "cache"
    first, second = (sharded_task.by_shard[name] for name in sorted(sharded_task.by_shard)[:2])
    reads = Reads()
    with exclusive(root / f"{first.key(CPU)}.lock"):  # somebody is at the first
        worker = threading.Thread(target=QuantizedCache(root, CPU, 1).open, args=(sharded_task, reads))
        worker.start()
        deadline = time.monotonic() + 60
        while len(kept(root)) < len(sharded_task.by_shard) - 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (root / second.key(CPU)).is_dir()
        assert not (root / first.key(CPU)).exists()
    worker.join()
    assert reads.num_bytes == weight_bytes(sharded_task)
    assert (root / first.key(CPU)).is_dir()


def test_a_cancelled_one_leaves_nothing(task, tmp_path):
    reads = Reads()

    def stop(num_bytes):
        reads(num_bytes)
        if reads.num_bytes > 40_000:
            raise CancelledError("stop")

    before = open_descriptors()
    cache = QuantizedCache(tmp_path, CPU, 2)
    with pytest.raises(CancelledError):
        cache.open(task, stop)
    assert kept(tmp_path) == []
    assert open_descriptors() <= before
    assert cache.open(task, lambda _: None).names == frozenset(task.weights)


@pytest.mark.parametrize("fault", ["posix_fallocate", "pwrite"])
def test_a_disk_without_room_leaves_nothing(task, tmp_path, fault):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, fault, full)
        with pytest.raises(NoCapacityError, match=r"(codes|scales)\.safetensors: No space left.*; free some space"):
            QuantizedCache(tmp_path, CPU, 1).open(task, lambda _: None)
    assert kept(tmp_path) == []


def test_a_file_larger_than_the_system_allows_leaves_nothing(task, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(BadInputError, match="File too large"):
            QuantizedCache(tmp_path, CPU, 1).open(task, lambda _: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert kept(tmp_path) == []


def test_a_base_that_is_gone_is_named(task, tmp_path):
    missing = dataclasses.replace(task, base=tmp_path / "gone")
    with pytest.raises(NotFoundError, match=r"gone/model\.safetensors"):
        QuantizedCache(tmp_path / "cache", CPU, 1).open(missing, lambda _: None)
    assert kept(tmp_path / "cache") == []


def test_a_cache_that_is_taken_away_is_named(task, tmp_path):
    made = QuantizedCache(tmp_path, CPU, 1).open(task, lambda _: None)
    for path in directory_of(made).iterdir():
        path.unlink()
    with pytest.raises(NotFoundError, match=directory_of(made).name):
        made.weight(task.weights[0])


def test_a_checkpoint_stored_in_4_bit_is_read_where_it_is(base, tmp_path):
    stored = build_bnb_4bit(base, tmp_path / "bnb")
    request = MergeRequest(base=str(stored), adapter="/adapter", destination="/destination")
    planned = plan_base(fetch_base(LocalPath(stored), tmp_path), request)
    assert planned.quantization is None
    held = planned.stored_weights(CPU)
    with safe_open(stored / "model.safetensors", framework="pt") as file:
        names = {name.partition(".quant_state")[0] for name in file.keys() if ".quant_state" in name}  # noqa: SIM118
    assert held.names == names
    for name in sorted(names):
        expected = load_file(stored / "model.safetensors")[name]
        assert torch.equal(held.weight(name).codes, expected)


class Loads:
    """Loads quantized bases that hold a stated number of device bytes."""

    def __init__(self):
        self.loaded = []

    def __call__(self, content, num_bytes):
        def load():
            self.loaded.append(content)
            held = QuantizedBase.__new__(QuantizedBase)
            held.key = content
            held._held = {"weight": type("Held", (), {"num_bytes": num_bytes})()}
            return held

        return load


def test_residents_are_loaded_once_while_their_content_stays():
    loads, residents = Loads(), ResidentBases(100)
    for _ in range(2):
        residents.get("a", "one", loads("one", 10))
    assert loads.loaded == ["one"]
    residents.get("a", "two", loads("two", 10))
    assert loads.loaded == ["one", "two"]
    assert residents.keys == ("a",)


def test_other_residents_make_room_as_far_as_they_have_to():
    loads, residents = Loads(), ResidentBases(100)
    for key in "abcd":
        residents.get(key, key, loads(key, 10))
    residents.make_room("a", 0)
    assert residents.keys == ("a", "b", "c", "d")
    residents.make_room("a", 11)
    assert residents.keys == ("a", "d")
    residents.make_room("a", 1000)
    assert residents.keys == ("a",)
    assert (residents.num_device_bytes("a"), residents.num_device_bytes("d")) == (10, 0)
    assert (residents.num_device_bytes_beside("a"), residents.num_device_bytes_beside("d")) == (0, 10)


def test_what_a_base_takes_of_a_gpu_is_stated(base, tmp_path):
    request = MergeRequest(base=str(base), adapter="/adapter", destination="/destination", base_quantization="nf4")
    planned = plan_base(fetch_base(LocalPath(base), tmp_path), request)
    made = QuantizedCache(tmp_path / "cache", CPU, 2).open(planned.quantization, lambda _: None)
    assert resident_bytes(planned) == sum(made.weight(name).num_bytes for name in made.names)


def test_a_base_that_a_device_cannot_hold_comes_tile_by_tile(task, tmp_path):
    """The device is torch's `meta`, which has no memory: it shows what is brought there, and what stays."""
    meta = torch.device("meta")
    made = QuantizedCache(tmp_path, CPU, 1).open(task, lambda _: None)
    on_device = QuantizedBase(made.key, made.names, meta)
    for directory in made.directories:
        on_device.add(directory, read_checkpoint(directory), {})
    name = task.weights[0]
    assert on_device.weight(name).codes.device == meta
    assert on_device.num_device_bytes == made.weight(name).num_bytes
    on_device.hold(whole=False)
    weight = on_device.weight(name)
    assert (weight.codes.device, weight.absmax.device) == (CPU, CPU)
    assert on_device.num_device_bytes == 0
    step = weight.row_alignment
    tile = weight.dequantize_rows(step, 2 * step)
    assert (tile.device, tuple(tile.shape), tile.dtype) == (meta, (step, weight.shape[1]), weight.dtype)
    # Brought to where they are, the bits are those of a weight that is held.
    moved = dataclasses.replace(weight, device=CPU).dequantize_rows(step, 2 * step)
    assert torch.equal(moved, made.weight(name).dequantize_rows(step, 2 * step))
    on_device.hold(whole=True)
    assert on_device.weight(name).codes.device == meta


def test_what_a_base_that_is_not_held_takes_of_a_gpu_does_not_grow_with_it(base, tmp_path):
    request = MergeRequest(base=str(base), adapter="/adapter", destination="/destination", base_quantization="nf4")
    planned = plan_base(fetch_base(LocalPath(base), tmp_path), request)
    elements = max(tensor.num_elements for tensor in planned.tensors if tensor.stored is None)
    assert passing_bytes(planned, 3) == 6 * (elements // 2 + elements // 64 * 4)
    deeper = dataclasses.replace(planned, tensors=planned.tensors * 50)
    assert passing_bytes(deeper, 3) == passing_bytes(planned, 3)
    assert resident_bytes(deeper) == 50 * resident_bytes(planned)


def test_the_least_recently_used_resident_goes_first_and_the_last_stays():
    loads, residents = Loads(), ResidentBases(100)
    for key in "abc":
        residents.get(key, key, loads(key, 40))
    residents.get("a", "a", loads("a", 40))
    residents.trim()
    assert residents.keys == ("c", "a")
    residents.get("d", "d", loads("d", 1000))
    residents.trim()
    assert residents.keys == ("d",)
