"""Heads that are one parameter with the embeddings, on every architecture: a part of `make fidelity`.

What a merge is held against is what base + adapter computes, unmerged, in float64 (`tests/computed.py`), as PEFT's own
merge writes into the parameter that both share.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from jobs.errors import UnsupportedError
from tests.computed import computed_ends, is_rounded
from tests.merges import plan_pass, read_tensors
from tests.methods import make_method_adapter
from tests.models import load_plain
from workers.adapters.adapter import ADAPTER_WEIGHTS
from workers.bases.model import load_config, model_class
from workers.merging.sidecars import write_sidecars
from workers.parity.inference import quiet_libraries

COLUMNS: Mapping[str, tuple[str, tuple[str, ...], bool]] = {
    "a: head": ("tied", ("head",), True),
    "b: head and embedding": ("tied", ("head", "embedding"), True),
    "c: embedding": ("tied", ("embedding",), True),
    "c: head, without its weight": ("tied", ("head",), False),
    "d: says tied, is apart": ("apart", ("head",), True),
    "e: says apart, is equal": ("equal", ("embedding",), True),
}
"""How the base is stored, what LoRA is put on, and whether the adapter holds the frozen weights as PEFT saves them."""

Verdict = tuple[str, str]
"""`equal`, `better`, `refused` or `wrong`, and why."""


def tied_cells(base: Path, scratch: Callable[[], Any]) -> Iterator[tuple[str, Verdict]]:
    """Yield column and verdict of one architecture; nothing where its head is not tied, or no linear layer.

    Args:
        base: tiny checkpoint.
        scratch: makes a directory that is removed when its context ends.
    """
    ends = _ends(base)
    if ends is None:
        return
    for column, (stored, targets, whole) in COLUMNS.items():
        with scratch() as directory:
            try:
                adapted = base if stored == "tied" else _untie(base, directory / "base", stored)
                adapter = make_method_adapter(
                    adapted,
                    directory / "adapter",
                    "LORA",
                    task_type=None,
                    r=4,
                    target_modules=[ends[target] for target in targets],
                )
                if not whole:
                    path = adapter / ADAPTER_WEIGHTS
                    tensors = {name: t for name, t in load_file(path).items() if "base_layer" not in name}
                    save_file(tensors, path, metadata={"format": "pt"})
                expected = computed_ends(adapted, adapter)
            except Exception as error:  # noqa: BLE001 - whatever the libraries raise is the reason
                yield column, ("refused", f"PEFT cannot make it: {_first_line(error)}")
                continue
            try:
                yield column, _verdict(adapted, adapter, directory, expected)
            except UnsupportedError as error:
                known = "past the adapter" in str(error)
                words = "the model computes with its head's weight by itself, so that LoRA has no effect unmerged"
                yield column, ("refused", words) if known else ("wrong", _first_line(error))
            except Exception as error:  # noqa: BLE001 - a fault of ours is a cell, too
                yield column, ("wrong", f"{type(error).__name__}: {_first_line(error)}")


def _verdict(base: Path, adapter: Path, directory: Path, expected: Mapping[str, torch.Tensor]) -> Verdict:
    planned = plan_pass(base, {"job": adapter}, directory, parity={"level": "arithmetic"})
    for error in planned.run().errors.values():
        raise error
    bad = [c.tensor for c in planned.check()["job"].values() if c.rounding_excess > 1 or c.num_bad_elements]
    if bad:
        return "wrong", f"its own arithmetic check fails: {bad[:3]}"
    write_sidecars(planned.plans[0], planned.output("job"))
    with quiet_libraries():
        loaded, info = model_class(load_config(base)).from_pretrained(
            planned.output("job"), dtype="auto", output_loading_info=True
        )
    misfits = {kind: sorted(map(str, found))[:3] for kind, found in info.items() if found}
    if misfits:
        return "wrong", f"does not load: {misfits}"
    before = load_plain(base)
    different = [name for name, exact in expected.items() if not _is(loaded, before, name, exact)]
    if different:
        files = read_tensors(planned.output("job"))
        if all(
            name in files
            and is_rounded(files[name], expected[name], before.get_parameter(name))
            and _lost_its_padding(loaded.get_submodule(name.rpartition(".")[0]), files[name])
            for name in different
        ):
            return (
                "better",
                "transformers zeroes the padding token's row of what it loads; the file has it",
            )
        return "wrong", f"not what base + adapter computes: {different}"
    with quiet_libraries():
        theirs = PeftModel.from_pretrained(load_plain(base), adapter).merge_and_unload()
    if all(_is(theirs, before, name, exact) for name, exact in expected.items()):
        return "equal", ""
    return "better", "PEFT's merge writes into the parameter that head and embedding share, base + adapter does not"


def _lost_its_padding(loaded: nn.Module, stored: torch.Tensor) -> bool:
    """Whether a loaded embedding is the file's but for the row of the padding token, which is zero."""
    if (row := getattr(loaded, "padding_idx", None)) is None:
        return False
    without = stored.clone()
    without[row] = 0
    return torch.equal(loaded.get_parameter("weight"), without)


def _is(model: nn.Module, before: nn.Module, name: str, exact: torch.Tensor) -> bool:
    return is_rounded(model.get_parameter(name), exact, before.get_parameter(name))


def _ends(base: Path) -> dict[str, str] | None:
    """Return the names of head and embedding, if they are one parameter."""
    model = load_plain(base)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding) or head.weight is not embedding.weight:
        return None
    names = {id(module): name for name, module in model.named_modules()}
    return {"head": names[id(head)], "embedding": names[id(embedding)]}


def _untie(base: Path, directory: Path, stored: str) -> Path:
    """Save a base with a head of its own: another one, which the configuration denies, or an equal one."""
    model: Any = load_plain(base)
    weight = model.get_input_embeddings().weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    if stored == "apart":
        weight += torch.randn(weight.shape, generator=generator).mul_(0.05).to(weight.dtype)
    model.get_output_embeddings().weight = nn.Parameter(weight)
    for name in model.all_tied_weights_keys:
        owner, _, key = name.rpartition(".")
        if (tied := model.get_parameter(name)) is not model.get_output_embeddings().weight:
            setattr(model.get_submodule(owner), key, nn.Parameter(tied.detach().clone()))
    model.config.tie_word_embeddings = False
    with quiet_libraries():
        model.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config")):
        if isinstance(section, dict):
            section["tie_word_embeddings"] = stored == "apart"
    path.write_text(json.dumps(config))
    return directory


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
