"""The configuration of an adapter: read as PEFT reads it, and no field of it left out in silence."""

import dataclasses
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import peft
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.methods import MERGED, REFUSED
from workers.adapters.values import check_values
from workers.files.checkpoint import read_json

ADAPTER_CONFIG = "adapter_config.json"
_NEUTRAL: tuple[Any, ...] = (None, False, {}, [])
"""What a field that this PEFT does not know may hold: a newer one wrote down that it is not used."""
_NOT_FOR_PEFT = frozenset({"auto_mapping", "runtime_config"})
"""Fields that PEFT itself leaves aside when it loads an adapter."""
_INERT_FIELDS = "MERGEFLEET_INERT_ADAPTER_FIELDS"
_OF_INITS = frozenset({"eva_config", "corda_config", "lora_ga_config", "loftq_config"})
"""Fields that say how an initialization computes; it is over once an adapter is saved."""
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


def read_config(directory: Path) -> dict[str, Any]:
    """Read `adapter_config.json`.

    Raises:
        NotFoundError, BadInputError: it is missing, or no JSON object.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    if not isinstance(config, dict):
        raise BadInputError(f"{directory / ADAPTER_CONFIG}: expected a JSON object, found {type(config).__name__}")
    return config


def read_peft_config(directory: Path, inert_fields: frozenset[str]) -> tuple[PeftConfig, tuple[str, ...]]:
    """Read the configuration of an adapter as PEFT has it.

    Args:
        directory: of the adapter.
        inert_fields: as in `open_adapter`.

    Returns:
        The configuration, and what a person should know of it.

    Raises:
        As `open_adapter`.
    """
    path = directory / ADAPTER_CONFIG
    raw = read_config(directory)
    method = raw.get("peft_type")
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
    if version_of(saved_by) > version_of(peft.__version__):
        return f"PEFT {saved_by} saved the adapter and knows it: merge it where that version is installed"
    return f"PEFT {saved_by} saved the adapter, so that it is no field of PEFT's but one that a trainer wrote"


def version_of(text: str) -> tuple[int, ...]:
    """Return a version as numbers that compare."""
    return tuple(int(number) for number in re.findall(r"\d{1,9}", text)[:3])


def _check_init(path: Path, init: object) -> None:
    if not any(init == plain and type(init) is type(plain) for plain in _PLAIN_INITS):
        raise UnsupportedError(
            f"{path}: init_lora_weights {init!r} changed the base's weights before training, so "
            "the adapter does not fit the published base; save it converted to plain LoRA "
            "(PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
