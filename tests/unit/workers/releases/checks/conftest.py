"""Good releases, made once."""

import json
import shutil

import pytest
import torch

from jobs.request import MergeRequest
from tests import architectures
from tests.models import build_bnb_4bit, build_llama, build_qwen2, make_adapter
from tests.stored.awq import store_awq
from tests.stored.fp8_blocks import store_fp8
from workers.merging.settings import WorkerSettings
from workers.worker import MergeWorker


def settle(directory):
    """Write what transformers 4 reads, too, so that a good release has nothing to be noted."""
    config = json.loads((directory / "config.json").read_text())
    config["torch_dtype"] = config.get("dtype") or config.get("torch_dtype")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def released(root, directory, output):
    """Merge an adapter into a release in a form, by a worker."""
    base, home = build_llama(root / "base-of-a-form"), root / "worker"
    worker = MergeWorker(
        WorkerSettings(cache=home / "cache", scratch=home / "scratch", reports=home / "reports", device="cpu")
    )
    request = MergeRequest(
        id="one",
        base=str(base),
        adapter=str(make_adapter(base, root / "adapter-of-a-form", targets=["q_proj"])),
        destination=str(directory),
        output=output,
        base_quantization="none",
        parity={"level": "arithmetic"},
    )
    (staged,) = worker.run_unit("unit", (request,)).jobs
    assert staged.failure is None, staged.failure
    assert worker.publish("one", None).failure is None
    worker.close()
    return directory


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """Releases by kind: each made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("good"), {}
    scale = {"block": (16, 16), "scale_dtype": torch.float32}
    builders = {
        "llama": build_llama,
        "sharded": lambda path: build_llama(path, max_shard_size="100KB"),
        "qwen2": build_qwen2,
        "qwen3_moe": lambda path: architectures.build("decoder", "qwen3_moe", path),
        "phi3": lambda path: architectures.build("decoder", "phi3", path),
        "gpt_oss": lambda path: architectures.build("decoder", "gpt_oss", path),
        "llava": lambda path: architectures.build("vision-language", "llava", path),
        "bert": lambda path: architectures.build("encoder", "bert", path),
        "fp8": lambda path: store_fp8(release("llama"), path, **scale),
        "awq": lambda path: store_awq(release("llama"), path),
        "gguf": lambda path: released(root, path, "gguf"),
        "bnb": lambda path: build_bnb_4bit(release("llama"), path),
    }

    def release(kind):
        if kind not in made:
            made[kind] = settle(builders[kind](root / kind))
        return made[kind]

    return release


@pytest.fixture
def copy(good, tmp_path):
    """A copy of a good release, to be broken."""

    def make(kind):
        return shutil.copytree(good(kind), tmp_path / "release")

    return make
