"""LoRA and rsLoRA on linear layers, streamed: W + scaling * B @ A, one weight at a time.

PEFT itself says which modules an adapter changes, with which rank and which scaling: the base's skeleton on the meta
device is wrapped exactly as for training, and the adapter's file must hold exactly the tensors PEFT then expects.

Source: https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732; `Linear.merge` of peft/tuners/lora/layer.py
in PEFT 0.21. Shape suffixes: O output features, I input features, R rank.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer, LoraModel
from transformers import PreTrainedModel

from jobs.errors import BadInputError, UnsupportedError
from workers.checkpoint import TensorSpec, read_json, read_shard
from workers.tensor_io import read_rows

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_ADAPTER = "default"

_SUPPORTED = frozenset(
    {
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
    }
)
"""Fields that decide which delta a weight gets; PEFT evaluates them on the skeleton."""

_ABOUT_TRAINING = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "peft_version",
        "lora_dropout",
    }
)
"""Fields that change nothing in a finished adapter."""

_ALSO_NEUTRAL: dict[str, tuple[Any, ...]] = {"modules_to_save": ([],), "loftq_config": (None,)}
"""What trainers write, besides PEFT's own default, for a field they do not use."""

_PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""Initializations that leave the base's weights as they are. The others move part of the base into the adapter."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


def read_config(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        NotFoundError, BadInputError: it is missing, or no JSON object.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / ADAPTER_CONFIG}: expected a JSON object, found {type(config).__name__}")
    return config


def plan_lora(directory: Path, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> tuple[LoraDelta, ...]:
    """Find the delta of every base weight the adapter changes, from headers and configuration alone.

    Args:
        directory: of the adapter.
        model: skeleton of the base on the meta device; it is wrapped, so it is of no further use.
        shapes: shape of each weight that the base stores, as the model knows it: [O, I] for 4-bit ones, too.

    Returns:
        One delta for each changed weight, in module order.

    Raises:
        UnsupportedError: the adapter needs something this lane does not do; the message names it.
        BadInputError: tensors are missing, left over, or of another base's shape.
    """
    config = _lora_config(directory)
    weights_path = directory / ADAPTER_WEIGHTS
    if not weights_path.exists() and (directory / "adapter_model.bin").exists():
        raise UnsupportedError(
            f"{directory / 'adapter_model.bin'}: pickled adapters are not read; load it with PEFT and save it again, "
            f"which writes {ADAPTER_WEIGHTS}"
        )
    stored = {spec.name: spec for spec in read_shard(weights_path).tensors}
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    deltas = []
    used: set[str] = set()
    for name, layer in _target_layers(directory, model, config):
        weight = f"{name}.weight"
        if weight in tied:
            raise UnsupportedError(
                f"{directory}: the adapter changes {weight}, which the base ties to another tensor; merging into tied "
                "weights is not supported by this version"
            )
        names = (f"{_PREFIX}{name}.lora_A.weight", f"{_PREFIX}{name}.lora_B.weight")
        found = [stored.get(key) for key in names]
        used.update(names)
        if found[0] is None or found[1] is None:
            _raise_missing(weights_path, names[found.index(None)], stored)
        assert found[0] is not None
        assert found[1] is not None
        num_out, num_in = shapes[weight]
        rank = layer.r[_ADAPTER]
        for spec, shape in ((found[0], (rank, num_in)), (found[1], (num_out, rank))):
            if spec.shape != shape:
                raise BadInputError(
                    f"{weights_path}: tensor {spec.name}: expected shape {list(shape)} for a base whose {weight} is "
                    f"{[num_out, num_in]} at rank {rank}, found {list(spec.shape)}; the adapter was trained on "
                    "another base, or its configuration is not its own"
                )
            if spec.dtype not in _FLOATS:
                raise UnsupportedError(
                    f"{weights_path}: tensor {spec.name}: dtype {spec.dtype} is not one of {_FLOATS}"
                )
        scaling = float(layer.scaling[_ADAPTER])
        if not math.isfinite(scaling):
            raise BadInputError(f"{directory / ADAPTER_CONFIG}: the scaling of {name} is {scaling}")
        deltas.append(LoraDelta(weight=weight, a_RI=found[0], b_OR=found[1], scaling=scaling))
    left_over = [name for name in stored if name not in used]
    if left_over:
        raise UnsupportedError(
            f"{weights_path}: {len(left_over)} tensors belong to nothing this adapter's configuration declares, "
            f"first {left_over[0]}; leaving them out would change the model, so the merge is refused"
        )
    return tuple(deltas)


def read_operand(path: Path, spec: TensorSpec) -> torch.Tensor:
    """Read one adapter tensor, lifted to float32 as `PeftModel` does.

    Raises:
        BadInputError: it holds NaN or infinity.
    """
    stored = read_rows(path, spec, 0, spec.shape[0])
    if not bool(torch.isfinite(stored).all()):
        raise BadInputError(
            f"{path}: tensor {spec.name}: expected finite numbers, found NaN or infinity; the training diverged: "
            "use an earlier checkpoint of the adapter"
        )
    return stored.float()


def _lora_config(directory: Path) -> LoraConfig:
    path = directory / ADAPTER_CONFIG
    raw = read_config(directory)
    method = raw.get("peft_type")
    if method != "LORA":
        raise UnsupportedError(f"{path}: peft_type {method!r} is not supported by this version; expected 'LORA'")
    defaults = {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(LoraConfig)
    }
    init = raw.get("init_lora_weights", True)
    if not any(init == plain and type(init) is type(plain) for plain in _PLAIN_INITS):
        raise UnsupportedError(
            f"{path}: init_lora_weights {init!r} changed the base's weights before training, so "
            "the adapter does not fit the published base; save it converted to plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    for field, value in raw.items():
        if field in _SUPPORTED | _ABOUT_TRAINING or field == "init_lora_weights":
            continue
        neutral: tuple[Any, ...] = (None, False, {}, [])
        if field in defaults:
            neutral = (defaults[field], *_ALSO_NEUTRAL.get(field, ()))
        if not any(value == other and type(value) is type(other) for other in neutral):
            known = (
                "is not supported by this version" if field in defaults else f"is unknown to PEFT {peft.__version__}"
            )
            raise UnsupportedError(f"{path}: field {field} = {value!r} {known}; it would change the merge")
    # Everything goes to PEFT as written, so that what it would refuse to load is refused here. The skeleton holds no
    # values to initialize.
    given = {field: value for field, value in raw.items() if field in defaults and field != "auto_mapping"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LoraConfig(**given | {"inference_mode": True, "init_lora_weights": True})
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{path}: PEFT refuses this configuration: {error}") from error


def _target_layers(directory: Path, model: PreTrainedModel, config: LoraConfig) -> list[tuple[str, LoraLayer]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuner = LoraModel(model, {_ADAPTER: config}, _ADAPTER, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise BadInputError(
            f"{directory / ADAPTER_CONFIG}: the adapter does not fit this base, {type(model).__name__}: {error}"
        ) from error
    layers = [(name, layer) for name, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in layers:
        if type(layer) is not Linear or layer.lora_variant:
            kind = type(layer.get_base_layer()).__name__
            raise UnsupportedError(
                f"{directory / ADAPTER_CONFIG}: module {name} ({kind}) takes an adapter layer of type "
                f"{type(layer).__name__}, which this version does not merge; expected plain linear layers"
            )
    return layers


def _raise_missing(path: Path, key: str, stored: Mapping[str, TensorSpec]) -> None:
    example = next(iter(stored), "nothing")
    raise BadInputError(
        f"{path}: expected tensor {key} for a module the configuration targets, found none; the file holds "
        f"{len(stored)} tensors such as {example}: the adapter is incomplete or was trained on another base"
    )
