"""Several adapters combined for the tests by PEFT itself, over the whole loaded model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from tests.merges import one_torch_thread, read_tensors
from tests.models import load_plain
from workers.parity.inference import quiet_libraries

PRUNED = {"density": 0.5}
EVERY_TYPE = {
    "linear": {},
    "cat": {},
    "svd": {},
    "ties": PRUNED,
    "ties_svd": PRUNED,
    "dare_linear": PRUNED,
    "dare_linear_svd": PRUNED,
    "dare_ties": PRUNED,
    "dare_ties_svd": PRUNED,
    "magnitude_prune": PRUNED,
    "magnitude_prune_svd": PRUNED,
}
"""PEFT's combination types, each with what it needs."""


def combine_by_peft(
    base: Path,
    adapters: Sequence[Path],
    weights: Sequence[float],
    *,
    seed: int = 0,
    dtype: torch.dtype | str = "auto",
    **how: Any,
) -> PeftModel:
    """Load the base whole, put all adapters on, combine them and make the result the active one, called `all`.

    Args:
        base: directory of the base.
        adapters: directories.
        weights: of the adapters.
        seed: set right before they are combined.
        dtype: the base is loaded in.
        how: further arguments of `add_weighted_adapter`.
    """
    names = [f"adapter{number}" for number in range(len(adapters))]
    with quiet_libraries(), one_torch_thread():
        model = PeftModel.from_pretrained(load_plain(base, dtype), adapters[0], adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            model.load_adapter(adapter, adapter_name=name)
        torch.manual_seed(seed)
        model.add_weighted_adapter(names, list(weights), "all", **how)
        model.set_adapter("all")
    return model


def merge_combined_by_peft(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], directory: Path, **how: Any
) -> dict[str, torch.Tensor]:
    """Combine as `combine_by_peft` does, merge and save.

    Returns:
        The tensors of the merged model, by name.
    """
    model = combine_by_peft(base, adapters, weights, **how)
    with quiet_libraries(), one_torch_thread():
        model.merge_and_unload().save_pretrained(directory)
    return read_tensors(directory)
