"""Several adapters as one, combined by PEFT's own `add_weighted_adapter`.

PEFT puts them on the skeleton of the base, whose weights take no part, and what comes out is an adapter like any other.

Source: https://arxiv.org/abs/2306.01708 (TIES), https://arxiv.org/abs/2311.03099 (DARE); `add_weighted_adapter` of
peft/tuners/lora/model.py and peft/tuners/ia3/model.py in PEFT 0.21.
"""

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from jobs.combination import Combination, CombinationType
from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.adapter import PREFIX, Adapter, read_tensor
from workers.adapters.config import ADAPTER_CONFIG, REFUSALS, read_config
from workers.adapters.wearing import ADAPTER_NAME, keep_adapters_on, put_on, wrapped_modules
from workers.bases.model import skeleton
from workers.numerics.device import raise_of_machine

_COMBINED = {
    "LORA": re.compile(r".+\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)"),
    "IA3": re.compile(r".+\.ia3_l"),
}
"""The methods that PEFT combines, and the tensors of them that it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What `add_weighted_adapter` makes."""

    config: PeftConfig
    tensors: Mapping[str, torch.Tensor]
    """By the names they are saved under."""


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], combination: Combination, base: Path, *, values: bool
) -> Combined:
    """Combine adapters into one.

    Args:
        adapters: at least one.
        weights: one for each.
        combination: how.
        base: directory of the base that they were made for; its configuration is read, its weights are not.
        values: whether to compute, which is done in one thread; without, the tensors are on the meta device.

    Returns:
        The adapter; merging it gives what merging the result of `add_weighted_adapter` on the whole model gives, where
        PEFT does not round that to the dtype of the base first.

    Raises:
        UnsupportedError, BadInputError: PEFT does not combine them, or not without loss; the message names them.
    """
    kind, arguments = combination.type, combination.arguments()
    for adapter in adapters:
        if adapter.head is not None:
            raise UnsupportedError(
                f"{adapter.weights_path} brings a head for a {adapter.head.class_name}, and PEFT combines no heads; "
                "merge it alone, and let a second request have that release as its base"
            )
        if adapter.num_tokens is not None:
            raise UnsupportedError(
                f"{adapter.weights_path} is of a vocabulary of {adapter.num_tokens} tokens, which the base does not "
                "have, and PEFT combines no embeddings; merge it alone, and let a second request have that release as "
                "its base"
            )
        _check(adapter, adapters[0], kind)
        put_on(adapter, skeleton(base), values=False)  # fails on a tensor that is missing or left over
    names = [f"part{number}" for number in range(len(adapters))]
    how = {"combination_type": kind.value, **arguments} if adapters[0].method == "LORA" else {}
    seed = how.pop("seed", 0)
    with _peft(adapters), _reproducibly(), torch.device("cpu" if values else "meta") as device:
        peft_model = _wrap(adapters, names, base, device)
        # The result is initialized like the first adapter before it gets its values, and that draws from the same seed.
        first: Any = peft_model.peft_config[names[0]]
        first.init_lora_weights = read_config(adapters[0].directory).get("init_lora_weights", True)
        torch.default_generator.manual_seed(seed)
        tuner: Any = peft_model.base_model
        tuner.add_weighted_adapter(names, list(weights), ADAPTER_NAME, **how)
        tensors = get_peft_model_state_dict(peft_model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    _check_layers(adapters, names, peft_model)
    config = copy.deepcopy(peft_model.peft_config[ADAPTER_NAME])
    _state_ranks(config, tensors)
    return Combined(config=config, tensors={name: tensor.contiguous() for name, tensor in tensors.items()})


def _check(adapter: Adapter, first: Adapter, kind: CombinationType) -> None:
    """Refuse what PEFT refuses, in words, and what it would leave out or change without a word."""
    path = adapter.directory / ADAPTER_CONFIG
    taken = _COMBINED.get(adapter.method)
    if taken is None:
        raise UnsupportedError(
            f"{path}: PEFT combines adapters of {' or '.join(_COMBINED)}, found {adapter.method}; merge one after the "
            "other: let a second request have the first's release as base"
        )
    if adapter.method != first.method:
        raise UnsupportedError(
            f"{path}: PEFT combines adapters of one method, found {adapter.method} beside {first.method}"
        )
    if adapter.method == "IA3" and kind is not CombinationType.LINEAR:
        raise UnsupportedError(f"{path}: PEFT combines IA3 by weighted sum alone; use type linear (found {kind})")
    if left := sorted(name for name in adapter.tensors if not taken.fullmatch(name)):
        raise UnsupportedError(
            f"{adapter.weights_path}: PEFT combines no tensor such as {left[0]} ({len(left)} in all) and would leave "
            "it out; merge one after the other, or train without it"
        )
    if adapter is first and getattr(adapter.config, "use_rslora", False):
        raise UnsupportedError(
            f"{path}: use_rslora: PEFT {peft.__version__} gives the result the kind of scaling of the first adapter, "
            "which for rsLoRA is sqrt(rank) times too much; put another adapter first, or save this one without "
            "use_rslora and with lora_alpha times sqrt(rank)"
        )


def _wrap(adapters: Sequence[Adapter], names: Sequence[str], base: Path, device: torch.device) -> PeftModel:
    """Let PEFT put all adapters on the skeleton, in float32 as `PeftModel.from_pretrained` does.

    Args:
        adapters: in their order.
        names: what they are called there.
        base: directory of the base, whose weights stay on the meta device.
        device: where the adapters go; without their values when that is the meta device, too.
    """
    # In float32, as a new adapter gets the dtype of the base, and `cat` writes into it as it is.
    model = skeleton(base).float()
    peft_model: PeftModel | None = None
    for name, adapter in zip(names, adapters, strict=True):
        config = copy.deepcopy(adapter.config)
        if peft_model is None:
            peft_model = PeftModel(model, config, adapter_name=name, low_cpu_mem_usage=True)
        else:
            peft_model.add_adapter(name, config, low_cpu_mem_usage=True)
        keep_adapters_on(device, peft_model)
        tensors = {
            key: torch.empty(spec.shape) if device.type == "meta" else read_tensor(adapter.weights_path, spec).float()
            for key, spec in adapter.tensors.items()
        }
        set_peft_model_state_dict(peft_model, tensors, adapter_name=name, low_cpu_mem_usage=True)
    assert peft_model is not None
    return peft_model


def _check_layers(adapters: Sequence[Adapter], names: Sequence[str], peft_model: PeftModel) -> None:
    """Check that every module with one of the adapters has the result: its configuration is the first adapter's."""
    for module, layer in wrapped_modules(peft_model):
        holds = [name for name in (*names, ADAPTER_NAME) if _holds(layer, name)]
        if holds and ADAPTER_NAME not in holds:
            other = adapters[names.index(holds[0])].directory
            raise UnsupportedError(
                f"{adapters[0].directory / ADAPTER_CONFIG}: PEFT takes the configuration of the result from the first "
                f"adapter, and that leaves out {module}, which {other} changes; put that one first"
            )
        for name, adapter in zip(names, adapters, strict=True):
            if variant := getattr(layer, "lora_variant", {}).get(name):
                raise UnsupportedError(
                    f"{adapter.directory / ADAPTER_CONFIG}: PEFT combines plain LoRA alone, and {module} has "
                    f"{type(variant).__name__}"
                )


def _holds(layer: BaseTunerLayer, name: str) -> bool:
    return any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)


def _state_ranks(config: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """State the ranks that differ from the configured one, which PEFT does not read in memory; the scaling is 1."""
    config.target_modules = (
        config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    )
    for name, tensor in tensors.items():
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(embedding_)?A(\.weight)?", name)
        if found is None:
            continue
        module, embedding, suffix = found[1], found[2] or "", found[3] or ""
        rank, rank_of_b = tensor.shape[0], tensors[f"{PREFIX}{module}.lora_{embedding}B{suffix}"].shape[1]
        if rank != rank_of_b:
            raise UnsupportedError(
                f"{module}: PEFT cuts lora_A to rank {rank} and lora_B to {rank_of_b}, as the module has no more; use "
                f"svd_full_matrices: false, or svd_rank: {rank_of_b} or less"
            )
        if rank != config.r:
            pattern = f"^{re.escape(module)}"
            config.rank_pattern[pattern] = config.alpha_pattern[pattern] = rank


@contextlib.contextmanager
def _peft(adapters: Sequence[Adapter]) -> Iterator[None]:
    """Raise what PEFT raises inside as a fault of the adapters, or of how they should be combined."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except REFUSALS as error:
        raise_of_machine(error)
        places = ", ".join(str(adapter.directory) for adapter in adapters)
        raise BadInputError(f"PEFT does not combine {places}: {error}") from error


@contextlib.contextmanager
def _reproducibly() -> Iterator[None]:
    """Compute in one thread, as sums and decompositions depend on how many there are, and keep the random state."""
    num_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(num_before)
