"""Adapters as PEFT saves them: read under the same suspicion as a base, and put on a model by PEFT itself."""

import contextlib
import copy
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters import names as adapter_names
from workers.adapters.causes import cause_of, cause_of_experts
from workers.adapters.methods import MERGED, REFUSED, SHAPED_BY_VALUES, WEIGHED
from workers.adapters.resizing import resize_vocabulary
from workers.adapters.values import check_values
from workers.bases.conversions import Conversions
from workers.files.checkpoint import read_json, read_shard
from workers.files.layout import TensorSpec
from workers.files.tensor_io import read_rows
from workers.numerics.device import raise_of_machine
from workers.sources.adapter_files import foreign_kind

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_NAME = "default"
PREFIX = adapter_names.PREFIX
"""What PEFT puts before the name of every module it saves tensors of."""

_NEUTRAL: tuple[Any, ...] = (None, False, {}, [])
"""What a field that this PEFT does not know may hold: a newer one wrote down that it is not used."""

_NOT_FOR_PEFT = frozenset({"auto_mapping", "runtime_config"})
"""Fields that PEFT itself leaves aside when it loads an adapter."""

_INERT_FIELDS = "MERGEFLEET_INERT_ADAPTER_FIELDS"

_OF_INITS = frozenset({"eva_config", "corda_config", "lora_ga_config", "loftq_config"})
"""Fields that say how an initialization computes; it is over once an adapter is saved."""

_ORIENTED = (0, 19, 1)
"""Version of PEFT from which on it reads LoRA on three-dimensional parameters as it does now."""

_ALTERS_THE_MODEL = ("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "megatron_config")
"""Fields of LoRA whose effect is no weight of the base's own model, or that belong to other model classes."""

_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base's weights as they are. The others move part of the base into the adapter."""

REFUSALS = (
    ArithmeticError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
    re.error,
)
"""What PEFT raises on an adapter that it cannot use, depending on where it stumbles."""

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the tensors of an adapter are stored in; integers are codes that mean nothing without their scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraDelta:
    """What is added to one base weight: scaling * B @ A."""

    weight: str
    """Name of the base tensor, [O, I]."""
    a_RI: TensorSpec
    b_OR: TensorSpec
    scaling: float

    @property
    def rank(self) -> int:
        """Rank of the delta."""
        return self.a_RI.shape[0]


@dataclass(frozen=True)
class Adapter:
    """One adapter, configuration and headers read."""

    directory: Path
    method: str
    """PEFT's name of it, such as `LORA`."""
    config: PeftConfig
    """Never handed out as it is: PEFT writes into the one it wraps a model with."""
    tensors: Mapping[str, TensorSpec]
    """By the names that PEFT gives them; a spec has the name that is stored."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """As in `open_adapter`."""
    num_tokens: int | None = None
    """Size of the vocabulary that it was trained with; None where it is the base's."""
    inert_fields: frozenset[str] = frozenset()
    """Fields of a configuration that the operator knows to change nothing."""
    left_behind: frozenset[str] = frozenset()
    """Tensors of its file that no release takes, by the names stored; a note tells them."""
    deltas: Mapping[str, LoraDelta] = field(default_factory=dict)
    """What is added to the base's files without PEFT, by the names of weights there (`lanes/stored.py`)."""
    conversions: Conversions | None = None
    """Between these files and the base's model, where there are such deltas."""
    notes: tuple[str, ...] = ()
    """What a person should know of it who did not write its files."""

    def for_peft(self) -> "Adapter":
        """Return what of it PEFT puts on a model."""
        own = {spec.name for delta in self.deltas.values() for spec in (delta.a_RI, delta.b_OR)}
        return dataclasses.replace(self, tensors={n: spec for n, spec in self.tensors.items() if spec.name not in own})

    def origin(self, stored: str) -> str:
        """Return the file that a tensor comes from, for messages; by the name it is stored under."""
        return f"{self.directory}: {self.beside[stored]}" if stored in self.beside else str(self.weights_path)

    @property
    def weights_path(self) -> Path:
        """The file of its tensors."""
        return self.directory / ADAPTER_WEIGHTS

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.num_bytes for spec in self.tensors.values())


@dataclass(frozen=True)
class Wrapped:
    """A model that wears an adapter."""

    model: PeftModel
    loaded: frozenset[str]
    """Names in the wrapped model of the tensors that took their values from the adapter's file."""


def open_adapter(
    directory: Path, inert_fields: frozenset[str] = frozenset(), beside: Mapping[str, str] = MappingProxyType({})
) -> Adapter:
    """Read the configuration and the headers of an adapter.

    Args:
        directory: of the adapter.
        inert_fields: of the configuration, that PEFT may not know: the operator says that they change nothing.
        beside: files that tensors come from which were trained beside the adapter, by the names stored.

    Raises:
        NotFoundError: a file is missing.
        UnsupportedError: the method, or something the configuration asks for, cannot be merged; the message names it.
        BadInputError: configuration or weights are malformed.
    """
    config, notes = _read_peft_config(directory, inert_fields)
    path = directory / ADAPTER_WEIGHTS
    method = PeftType(config.peft_type).value
    shard = read_shard(path)
    if found := foreign_kind(spec.name for spec in shard.tensors):
        tensor, kind, advice = found
        raise UnsupportedError(f"{path}: tensor {tensor}: this is {kind}, not one of PEFT; {advice}")
    named = adapter_names.name_as_peft(str(path), method, shard.tensors, beside, functools.partial(_same, path))
    if named.left_behind:
        first, *others = named.left_behind
        more = f" and {len(others)} more" if others else ""
        notes += (f"a value head is left behind, which only the training needed: {first}{more}",)
    return Adapter(
        directory=directory,
        method=method,
        config=config,
        tensors=named.tensors,
        beside=beside,
        inert_fields=inert_fields,
        left_behind=frozenset(named.left_behind),
        notes=notes,
    )


def _same(path: Path, one: TensorSpec, other: TensorSpec) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(
        read_tensor(path, one), read_tensor(path, other)
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        NotFoundError, BadInputError: it is missing, or no JSON object.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / ADAPTER_CONFIG}: expected a JSON object, found {type(config).__name__}")
    return config


def read_tensor(path: Path, spec: TensorSpec) -> torch.Tensor:
    """Read one adapter tensor, as stored.

    Raises:
        BadInputError: it holds NaN or infinity.
    """
    stored = read_rows(path, spec, 0, spec.shape[0] if spec.shape else 1)
    if spec.dtype.is_floating_point and stored.numel() and not all(map(math.isfinite, torch.aminmax(stored.float()))):
        raise BadInputError(
            f"{path}: tensor {spec.name}: expected finite numbers, found NaN or infinity; the training diverged: "
            "use an earlier checkpoint of the adapter"
        )
    return stored


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


def _read_peft_config(directory: Path, inert_fields: frozenset[str]) -> tuple[PeftConfig, tuple[str, ...]]:
    path = directory / ADAPTER_CONFIG
    raw = read_config(directory)
    method = raw.get("peft_type")
    if method is None and "fine_tune_type" in raw:
        raise UnsupportedError(
            f"{path}: fine_tune_type {raw['fine_tune_type']!r}: this is an adapter of MLX, not one of PEFT; merge it "
            "with MLX itself (mlx_lm.fuse)"
        )
    if not isinstance(method, str) or method not in MERGED:
        reason = REFUSED.get(method) if isinstance(method, str) else None
        raise UnsupportedError(
            f"{path}: peft_type {method!r}: {reason}"
            if reason
            else f"{path}: peft_type {method!r} is unknown to this version; expected one of {', '.join(sorted(MERGED))}"
        )
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    known = {entry.name for entry in dataclasses.fields(config_class)}
    unknown = _unknown_fields(path, raw, known, inert_fields)
    if "init_lora_weights" in known:
        _check_init(path, raw.get("init_lora_weights", True))
        raw["init_lora_weights"] = True  # the values come from the file
        # PEFT writes such a field as an object; it is to refuse anything else.
        for name in (name for name in _OF_INITS & raw.keys() if isinstance(raw[name], dict)):
            del raw[name]
    for name in _ALTERS_THE_MODEL:
        if name in known and raw.get(name):
            raise UnsupportedError(
                f"{path}: field {name} = {raw[name]!r} is not supported by this version; it would change the merge"
            )
    given = {name: value for name, value in raw.items() if name in known - _NOT_FOR_PEFT}
    kinds = {entry.name: getattr(entry.type, "__name__", str(entry.type)) for entry in dataclasses.fields(config_class)}
    check_values(path, given, kinds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: PeftConfig = config_class(**given | {"inference_mode": True})
    except REFUSALS as error:
        raise BadInputError(f"{path}: PEFT refuses this configuration: {error}") from error
    notes = (
        f"field {name} of {ADAPTER_CONFIG} is taken to change nothing, as {_INERT_FIELDS} says" for name in unknown
    )
    return config, tuple(notes)


def _unknown_fields(
    path: Path, raw: Mapping[str, Any], known: Collection[str], inert_fields: Collection[str]
) -> list[str]:
    """Return the fields that this PEFT does not know, all of which the operator knows to change nothing."""
    unknown = []
    for name, value in raw.items():
        if name in known or any(value == other and type(value) is type(other) for other in _NEUTRAL):
            continue
        if name not in inert_fields:
            raise UnsupportedError(
                f"{path}: field {name} = {value!r} is unknown to PEFT {peft.__version__}, and may change the merge; "
                f"{_known_to(raw)}; take it out if it changes nothing, or name it in {_INERT_FIELDS}"
            )
        unknown.append(name)
    return unknown


def _known_to(raw: Mapping[str, Any]) -> str:
    """Say which version of PEFT knows a field that this one does not."""
    saved_by = raw.get("peft_version")
    if not isinstance(saved_by, str):
        return "the configuration does not say which version of PEFT saved it"
    if _version(saved_by) > _version(peft.__version__):
        return f"PEFT {saved_by} saved the adapter and knows it: merge it where that version is installed"
    return f"PEFT {saved_by} saved the adapter, so that it is no field of PEFT's but one that a trainer wrote"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d{1,9}", text)[:3])


def _check_init(path: Path, init: object) -> None:
    if not any(init == plain and type(init) is type(plain) for plain in _PLAIN_INITS):
        raise UnsupportedError(
            f"{path}: init_lora_weights {init!r} changed the base's weights before training, so "
            "the adapter does not fit the published base; save it converted to plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
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
            if not _same(adapter.weights_path, adapter.tensors[double], adapter.tensors[own]):
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
    version = _version(saved_by) if isinstance(saved_by, str) else ()  # 0.17 does not write it
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


@contextlib.contextmanager
def refusals(adapter: Adapter, words: str) -> Iterator[None]:
    """Whatever PEFT stumbles over inside is the adapter's fault, or the base's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise UnsupportedError(f"{adapter.directory}: {adapter.method} needs another package here: {error}") from error
    except KeyError as error:
        raise BadInputError(f"{adapter.directory}/{words}: nothing is there under {error}") from error
    except REFUSALS as error:
        raise_of_machine(error)
        raise BadInputError(f"{adapter.directory}/{words}: {error}") from error


def _device(on_meta: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.device("meta") if on_meta else contextlib.nullcontext()
