"""Adapters on a model: put on by PEFT itself, with every tensor accounted for, and taken off again."""

import contextlib
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.adapter import ADAPTER_WEIGHTS, FLOATS, PREFIX, Adapter, read_tensor, refusals, same_values
from workers.adapters.causes import cause_of, cause_of_experts
from workers.adapters.config import ADAPTER_CONFIG, read_config, version_of
from workers.adapters.heads import give_head
from workers.adapters.methods import SHAPED_BY_VALUES, WEIGHED
from workers.adapters.resizing import resize_vocabulary

ADAPTER_NAME = "default"
_ORIENTED = (0, 19, 1)
"""Version of PEFT from which on it reads LoRA on three-dimensional parameters as it does now."""


@dataclass(frozen=True)
class Wrapped:
    """A model that wears an adapter."""

    model: PeftModel
    loaded: frozenset[str]
    """Names in the wrapped model of the tensors that took their values from the adapter's file."""


def match(adapter: Adapter, model: PreTrainedModel) -> None:
    """Hold what an adapter targets against the name of each module, as PEFT does before it makes a layer.

    Args:
        adapter: as its base takes it.
        model: skeleton of the base; not changed.

    Raises:
        UnsupportedError, BadInputError: a pattern cannot be read.
    """
    config: Any = copy.deepcopy(adapter.config)
    names = [name for name, _ in model.named_modules() if name]
    if config.target_modules is None:  # PEFT takes some by the kind of the model; these are all
        config.target_modules = {name.rpartition(".")[2] for name in names}
    with refusals(adapter, f"{ADAPTER_CONFIG}: does not fit this base, {type(model).__name__}"):
        for name in names:
            check_target_module_exists(config, name)


def put_on(
    adapter: Adapter, model: PreTrainedModel, *, values: bool, offloaded_to: torch.device | None = None
) -> Wrapped:
    """Let PEFT wrap a model and load the adapter, exactly as `PeftModel.from_pretrained` does.

    Args:
        adapter: to put on.
        model: of its base; it is wrapped, so it is of no further use alone.
        values: whether to load the adapter's values. Without, only names and shapes are accounted for (nothing, where
            those follow from the base's values), and the model is a skeleton: on the meta device, or all zeros for a
            method that computes with values.
        offloaded_to: where the weights of an offloaded model come when they are needed, and the adapter stays; only for
            adapters that are streamed, as others look at the weights they change.

    Returns:
        The wrapped model, in evaluation mode.

    Raises:
        UnsupportedError, BadInputError: adapter and base do not fit, or a tensor is missing or left over; the message
            names it.
    """
    adapter = adapter.for_peft()
    if expert := cause_of_experts(adapter.tensors, adapter.method, adapter.config, model):
        raise UnsupportedError(f"{adapter.weights_path}: tensor {expert[0]}: {expert[1]}")
    config = copy.deepcopy(adapter.config)
    if hasattr(config, "progressbar"):
        config.progressbar = False
    on_meta = not values and adapter.method not in WEIGHED
    give_head(model, adapter.head, on_meta=not values)
    resize_vocabulary(model, adapter.num_tokens)
    with refusals(adapter, f"{ADAPTER_CONFIG}: does not fit this base, {type(model).__name__}"), _device(on_meta):
        peft_model = PeftModel(model, config, low_cpu_mem_usage=on_meta or offloaded_to is not None)
    if not values and adapter.method in SHAPED_BY_VALUES:
        return Wrapped(peft_model, frozenset())
    copies = _copies_of_tokens(adapter, peft_model)
    tensors = {}
    for name, spec in adapter.tensors.items():
        if name in copies:
            continue
        if not values:
            tensors[name] = torch.zeros(spec.shape, dtype=spec.dtype, device="meta" if on_meta else "cpu")
        elif offloaded_to is not None:
            tensors[name] = read_tensor(adapter.weights_path, spec).float().to(offloaded_to)
        else:
            tensors[name] = read_tensor(adapter.weights_path, spec)
    if offloaded_to is not None:
        keep_adapters_on(offloaded_to, peft_model)
    _check_orientation(adapter, peft_model)
    _check_tensors(adapter, peft_model)
    names = set(peft_model.state_dict())
    with refusals(adapter, f"{ADAPTER_WEIGHTS}: PEFT cannot load it"):
        found: Any = set_peft_model_state_dict(peft_model, tensors, low_cpu_mem_usage=offloaded_to is not None)
    _account_for(adapter, peft_model, found.missing_keys, found.unexpected_keys)
    return Wrapped(peft_model.eval(), frozenset(names.difference(found.missing_keys)))


def wrapped_modules(peft_model: PeftModel) -> list[tuple[str, Any]]:
    """Return the outermost layers that hold adapters or trained copies, each with the name of what it wraps."""
    wrapped: list[tuple[str, Any]] = []
    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not (
            wrapped and name.startswith(f"{wrapped[-1][0]}.")
        ):
            wrapped.append((name, module))
    return wrapped


def take_off(adapter: Adapter, peft_model: PeftModel, name: str, *, merge: bool) -> nn.Module:
    """Take the adapter off one module, as `merge_and_unload` of PEFT 0.21 does.

    Args:
        adapter: that was put on.
        peft_model: loses the wrapped module.
        name: of the module.
        merge: whether it takes what the adapter adds with it.

    Returns:
        The module, plain again and back in its place.

    Raises:
        UnsupportedError, BadInputError: PEFT refuses to merge it.
    """
    tree = peft_model.get_base_model()
    module: Any = tree.get_submodule(name)
    plain: nn.Module
    with refusals(adapter, f"{ADAPTER_WEIGHTS}: module {name} cannot be merged"):
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
        else:
            if merge:
                module.merge(safe_merge=False)
            plain = module.get_base_layer()
    tree.set_submodule(name, plain)
    return plain


def keep_adapters_on(device: torch.device, peft_model: PeftModel) -> None:
    """Stop PEFT from putting an adapter where its base weight is: for an offloaded one, that is the meta device."""
    for layer in peft_model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer._move_adapter_to_device_of_base_layer = functools.partial(  # type: ignore[method-assign] # noqa: SLF001
                layer._move_adapter_to_device_of_base_layer,  # noqa: SLF001
                device=device,
            )


def _account_for(adapter: Adapter, peft_model: PeftModel, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    if unexpected:
        stored = {name: spec.name for name, spec in adapter.tensors.items()}
        first = min(unexpected)
        cause = cause_of(first, adapter.method, adapter.config, peft_model.get_base_model())
        name = stored.get(first, first)
        raise UnsupportedError(
            f"{adapter.origin(name)}: {len(unexpected)} tensors belong to nothing that its configuration declares, "
            f"first {name}; {cause}"
        )
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(adapter.method)]
    parameters = dict(peft_model.named_parameters(remove_duplicate=False))
    not_loaded = set(missing)
    # One parameter may stand under several names (a bank of vectors that all layers share); once is enough.
    loaded = {id(parameter) for name, parameter in parameters.items() if name not in not_loaded}
    left = [
        name
        for name, parameter in parameters.items()
        if name in not_loaded and prefix in name and ADAPTER_NAME in name and id(parameter) not in loaded
    ]
    if left:
        _raise_missing(adapter, [name.replace(f".{ADAPTER_NAME}", "") for name in left])


def _copies_of_tokens(adapter: Adapter, peft_model: PeftModel) -> frozenset[str]:
    """Return the tensors that PEFT saves once more for a layer with tied tokens, and does not take when it loads."""
    names = {id(module): name for name, module in peft_model.named_modules()}
    found = set()
    for module in peft_model.modules():
        if isinstance(module, TrainableTokensLayer) and module.tied_adapter is not None:
            double, own = (f"{names[id(layer)]}.trainable_tokens_delta" for layer in (module, module.tied_adapter))
            if not {double, own} <= adapter.tensors.keys():
                continue
            if not same_values(adapter.weights_path, adapter.tensors[double], adapter.tensors[own]):
                raise BadInputError(
                    f"{adapter.weights_path}: tensors {adapter.tensors[double].name} and {adapter.tensors[own].name} "
                    "differ, and the configuration ties their layers; save the adapter again with one of them"
                )
            found.add(double)
    return frozenset(found)


def _check_orientation(adapter: Adapter, peft_model: PeftModel) -> None:
    """Check that LoRA on parameters of three dimensions (E experts) was saved in the order that this PEFT reads.

    PEFT takes [E, I, O] for I inputs and O outputs, or [E, O, I]. Up to 0.18 it took the first of every class, from
    0.19.1 on of those that say `is_transposed`, and 0.19.0 of the others. Shapes tell the two apart where I is not O;
    the version does where they are equal. Source: `ParamWrapper.update_layer` of peft/tuners/lora/layer.py in these
    versions, and https://github.com/huggingface/peft/pull/3165.
    """
    layers = {
        name: module
        for name, module in peft_model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3
    }
    if not layers:
        return
    saved_by = read_config(adapter.directory).get("peft_version")
    version = version_of(saved_by) if isinstance(saved_by, str) else ()  # 0.17 does not write it
    for name, layer in layers.items():
        a_RI, b_OR = (adapter.tensors.get(f"{PREFIX}{name}.lora_{half}.weight") for half in "AB")
        if a_RI is None or b_OR is None or len(a_RI.shape) != 2 or len(b_OR.shape) != 2:
            continue
        found, expected = (b_OR.shape[0], a_RI.shape[1]), (layer.out_features, layer.in_features)
        ambiguous = layer.out_features == layer.in_features
        transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False))
        as_now = version[:3] != (0, 19, 0) if transposed else version >= _ORIENTED
        if found == expected and (as_now or not ambiguous):
            continue
        if found == expected[::-1]:
            raise UnsupportedError(
                f"{adapter.weights_path}: tensors {a_RI.name} and {b_OR.name} were saved by "
                f"{f'PEFT {saved_by}' if saved_by else 'a version of PEFT that the configuration does not name'}, "
                f"which took inputs and outputs of {name}.{layer.parameter_name} the other way round than "
                f"PEFT {peft.__version__} does, so that the same tensors are another delta; merge it where the version "
                "is installed that trained it"
            )


def _check_tensors(adapter: Adapter, peft_model: PeftModel) -> None:
    """Hold the file against what PEFT would save of this model.

    Names of its method's own tensors may differ where PEFT converts what older versions saved; those are accounted for
    when they are loaded.
    """
    with refusals(adapter, f"{ADAPTER_CONFIG}: cannot be saved again"):
        expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for name in sorted(adapter.tensors.keys() & expected.keys()):
        spec = adapter.tensors[name]
        if tuple(expected[name].shape) != spec.shape:
            raise BadInputError(
                f"{adapter.weights_path}: tensor {name}: expected shape {list(expected[name].shape)} for this base and "
                f"configuration, found {list(spec.shape)}; the adapter was trained on another base, or the "
                "configuration is not its own"
            )
        if expected[name].is_floating_point() and spec.dtype not in FLOATS:
            raise UnsupportedError(
                f"{adapter.weights_path}: tensor {name}: dtype {spec.dtype} is not one of {', '.join(map(str, FLOATS))}"
            )
    missing = expected.keys() - adapter.tensors.keys()
    if not adapter.tensors.keys() < expected.keys():
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(adapter.method)]
        missing = {name for name in missing if prefix not in name}
    if missing:
        _raise_missing(adapter, sorted(missing))


def _raise_missing(adapter: Adapter, names: Sequence[str]) -> None:
    raise BadInputError(
        f"{adapter.weights_path}: expected tensor {names[0]} for a module the configuration targets, found none "
        f"({len(names)} such tensors); the file holds {len(adapter.tensors)} tensors such as "
        f"{next(iter(adapter.tensors), 'nothing')}: the adapter is incomplete or was trained on another base"
    )


def _device(on_meta: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.device("meta") if on_meta else contextlib.nullcontext()
