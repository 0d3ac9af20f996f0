"""Merges into bases in stored forms, held against the merge into a base of the same shape in 16 bits.

Usage: python -m benchmarks.stored [--shape SHAPE] [--forms FORM,FORM] [--rounds N] [--commands]

The contenders take turns. What they write is of the same size; codes are random, as no loop looks at what they are. One
adapter on all linears, arithmetic parity included, in a process that has everything imported, or as commands.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.contenders import plain_environment
from benchmarks.make_base import SHAPES, make_adapter, make_base
from benchmarks.measurement import Measurement, measure
from benchmarks.resident import Resident

_ADAPTER = "r16-all"
_PLAIN = "16 bits"

Parts = dict[str, torch.Tensor]
"""What one weight is stored as, by what follows the name of its module."""


def _fp8_blocks(num_rows: int, num_columns: int) -> Parts:
    return {
        "weight": _codes(num_rows, num_columns).view(torch.float8_e4m3fn),
        "weight_scale_inv": torch.full((-(-num_rows // 128), -(-num_columns // 128)), 1e-4),
    }


def _fp8_channel(num_rows: int, num_columns: int) -> Parts:
    codes = _codes(num_rows, num_columns).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": torch.full((num_rows, 1), 1e-4, dtype=torch.bfloat16)}


def _int4(num_rows: int, num_columns: int) -> Parts:
    return {
        "weight_packed": _codes(num_rows, num_columns // 2).view(torch.int32),
        "weight_scale": torch.full((num_rows, num_columns // 32), 1e-3, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([num_rows, num_columns]),
    }


def _nvfp4(num_rows: int, num_columns: int) -> Parts:
    return {
        "weight_packed": _codes(num_rows, num_columns // 2),
        "weight_scale": torch.ones(num_rows, num_columns // 16).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([100.0]),
    }


def _codes(num_rows: int, num_columns: int) -> torch.Tensor:
    """Return random bytes, none of which is a NaN of FP8."""
    return torch.randint(0, 126, (num_rows, num_columns), dtype=torch.uint8)


def _compressed(format_: str, **weights: Any) -> Mapping[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format_, "config_groups": groups, "ignore": ["lm_head"]}


FORMS: Mapping[str, tuple[Callable[[int, int], Parts], Mapping[str, Any]]] = {
    "fp8": (_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8-channel": (_fp8_channel, _compressed("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int4": (_int4, _compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)),
    "nvfp4": (
        _nvfp4,
        _compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    ),
}
"""By name: what a weight is stored as, and what is declared."""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", action="store_true", help="merge by processes of their own, imports included")
    parser.add_argument("--directory", type=Path, help="where to work; by default a temporary directory")
    arguments = parser.parse_args()
    forms = arguments.forms.split(",")
    with tempfile.TemporaryDirectory(prefix="stored-", dir=arguments.directory) as name:
        directory = Path(name)
        bases = {_PLAIN: directory / "plain"}
        make_base(arguments.shape, bases[_PLAIN])
        make_adapter(arguments.shape, _ADAPTER, directory / "adapter", bases[_PLAIN])
        for form in forms:
            bases[form] = store(bases[_PLAIN], directory / form, form)
        runs: dict[str, list[Measurement]] = {form: [] for form in bases}
        with Resident(directory / "log") if not arguments.commands else contextlib.nullcontext() as resident:
            for _ in range(arguments.rounds):
                for form, base in bases.items():
                    word = "none" if form == _PLAIN else "stored"
                    adapter, out, home = directory / "adapter", directory / "out", directory / f"home-{form}"
                    if resident is None:
                        runs[form].append(_by_command(base, adapter, out, word, home))
                    else:
                        runs[form].append(resident.merge(base, [adapter], out, base_quantization=word, home=home))
                    shutil.rmtree(out)
                    os.sync()
    print(f"| base of {arguments.shape} in | seconds | times the one in 16 bits | peak memory |")
    print("|---|---|---|---|")
    plain = statistics.median(run.seconds for run in runs[_PLAIN])
    for form, measured in runs.items():
        seconds = [run.seconds for run in measured]
        peak = max(run.peak_memory_bytes for run in measured) / 1e6
        middle = statistics.median(seconds)
        spread = f"{min(seconds):.1f}-{max(seconds):.1f}"
        print(f"| {form} | {middle:.1f} ({spread}) | {middle / plain:.2f} | {peak:.0f} MB |")


def _by_command(base: Path, adapter: Path, out: Path, base_quantization: str, home: Path) -> Measurement:
    """Merge by a process of its own, which imports everything first."""
    command: list[str | Path] = [Path(sys.executable).with_name("mergefleet"), "merge"]
    command += ["--base", base, "--adapter", adapter, "--to", out, "--parity", "arithmetic", "--json"]
    command += ["--base-quantization", base_quantization]
    return measure(command, plain_environment() | {"MERGEFLEET_HOME": str(home)}, home.with_suffix(".log"))


def store(plain: Path, directory: Path, form: str) -> Path:
    """Write a base of the same shape with random codes for its projections, shard by shard.

    Args:
        plain: the base in 16 bits.
        directory: becomes the base in the form.
        form: one of `FORMS`.
    """
    make, declared = FORMS[form]
    directory.mkdir()
    weight_map = {}
    for shard in sorted(plain.glob("*.safetensors")):
        tensors: Parts = {}
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                module = name.removesuffix("weight")
                if "proj" in name:
                    parts = make(*file.get_slice(name).get_shape())
                    tensors |= {module + part: tensor for part, tensor in parts.items()}
                else:
                    tensors[name] = file.get_tensor(name)
        save_file(tensors, directory / shard.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard.name)
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": declared}
    (directory / "config.json").write_text(json.dumps(config))
    shutil.copy(plain / "generation_config.json", directory)
    if (plain / "model.safetensors.index.json").exists():
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


if __name__ == "__main__":
    main()
