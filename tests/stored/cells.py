"""Merges into bases in every stored form, on architectures of every kind: a part of `make fidelity`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from jobs.errors import MergefleetError
from tests import architectures
from tests.dying import settings_in
from tests.merges import different, merge, merge_by_peft, read_tensors
from tests.models import make_adapter
from tests.stored import twin_of
from tests.stored.again import AGAIN, expected_again, release_as_base
from tests.stored.forms import APART, EXPERTS, LINEAR
from tests.stored.reading import is_misread
from workers.bases.forms.declared import declared_form
from workers.files.checkpoint import read_checkpoint
from workers.worker import MergeWorker

ARCHITECTURES: Mapping[str, tuple[str, list[str]]] = {
    "dense": ("qwen3", ["q_proj", "v_proj", "down_proj"]),
    "mixture of experts": ("qwen3_moe", ["q_proj", "o_proj"]),
    "latent attention": ("deepseek_v3", ["q_a_proj", "kv_b_proj", "o_proj"]),
}
"""A model type, and what adapters change in it."""
ON_EXPERTS = {"targets": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
"""Of gpt-oss."""
STORED = {"base_quantization": "stored", "parity": {"level": "arithmetic"}}
MISREAD = "transformers refuses it, or reads another base: parity full runs it as it was dequantized for the merge"

Verdict = tuple[str, str]
"""`equal` or `wrong`, and why."""


def stored_cells(
    scratch: Callable[[], AbstractContextManager[Path]],
) -> Iterator[tuple[str, str, Verdict]]:
    """Yield form, column and verdict: a release against PEFT's merge into the twin, bit by bit.

    Args:
        scratch: makes a directory that is removed when its context ends.
    """
    for architecture, (model_type, targets) in ARCHITECTURES.items():
        with scratch() as directory:
            plain = architectures.build("decoder", model_type, directory / "plain")
            adapters: dict[str, dict[str, Any]] = {
                "LoRA": {"targets": targets},
                "DoRA": {"targets": [targets[-1]], "use_dora": True},
            }
            for form, store in {**LINEAR, **APART}.items():
                if not form.startswith("mxfp4"):
                    base = store(plain, directory / form.replace(" ", "-"))
                    for adapter, options in adapters.items():
                        yield form, f"{architecture}, {adapter}", _verdict(base, directory, options)
                    if form in AGAIN:
                        yield form, f"{architecture}, as its base", _again(base, form, directory, adapters["LoRA"])
    with scratch() as directory:
        plain = architectures.build("decoder", "gpt_oss", directory / "plain")
        for form, store in {**EXPERTS, "mxfp4 with scales apart": APART["mxfp4 with scales apart"]}.items():
            base = store(plain, directory / form.replace(" ", "-"))
            yield form, "gpt-oss, attention", _verdict(base, directory, {"targets": ["q_proj", "o_proj"]})
            yield form, "gpt-oss, experts", _verdict(base, directory, ON_EXPERTS)
            yield form, "gpt-oss, experts, as its base", _again(base, form, directory, ON_EXPERTS)


def _verdict(base: Path, directory: Path, options: Mapping[str, Any]) -> Verdict:
    number = len(list(directory.iterdir()))
    adapter = make_adapter(twin_of(base), directory / f"{number}-adapter", rank=2, **options)
    try:
        ours = merge(base, adapter, directory / f"{number}-ours", **STORED)
    except MergefleetError as error:
        return "wrong", f"refused: {error}"
    found = different(ours, merge_by_peft(twin_of(base), adapter, directory / f"{number}-peft"))
    if found:
        return "wrong", found[0]
    form = declared_form(base)
    assert form is not None
    specs = {name: spec for name, (_, spec) in read_checkpoint(base).tensors.items()}
    told = form.misread(specs, torch.bfloat16) is not None
    if told != is_misread(base):
        return "wrong", f"transformers {'reads it' if told else 'misreads it'}, and the form says otherwise"
    return "equal", MISREAD if told else ""


def _again(base: Path, form: str, directory: Path, options: Mapping[str, Any]) -> Verdict:
    """Hold a release that is stored as its base is against what the form's library makes of PEFT's merge."""
    place = directory / f"{len(list(directory.iterdir()))}-again"
    place.mkdir()
    adapter = make_adapter(twin_of(base), place / "adapter", rank=2, **options)
    worker = MergeWorker(settings_in(place / "home"))
    outcome = release_as_base(worker, base, adapter, place / "release")
    worker.close()
    if outcome.failure is not None:
        return "wrong", f"refused: {outcome.failure.message}"
    found = different(read_tensors(place / "release"), expected_again(base, form, adapter, place))
    return ("wrong", found[0]) if found else ("equal", "")
