"""Names of an adapter's tensors: as PEFT saves them today, and as the model of a base has them.

Trainers save names with the wrappers of a training run in them; transformers moves modules from one version to the
next. Both are undone here, for names alone: no tensor changes.
"""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from jobs.errors import BadInputError, UnsupportedError
from workers.adapters.patterns import move_ends, move_patterns
from workers.files.layout import TensorSpec

PREFIX = "base_model.model."
"""What PEFT puts before the name of every module it saves tensors of."""
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""What torch.compile, FSDP, activation checkpointing and Lightning put into names, anywhere."""
_OUTERMOST = "module"
"""What DistributedDataParallel puts before all names."""
_PEFTS = ["base_model", "model"]
"""The parts of `PREFIX`."""
_LAYER = "base_layer"
"""What PEFT calls a layer inside of what it has put in its place."""
_TOKENS = "trainable_tokens_"
_MAGNITUDE = "lora_magnitude_vector"
"""Of DoRA."""
_VALUE_HEAD = re.compile(r"(base_model\.model\.)?(v_head|value_head)\..+")
_TEXT_MODELS = frozenset({"model", "transformer", "language_model", "text_model"})
"""What classes of language models call the part below their head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """Tensors by the names that PEFT would save them under."""

    tensors: Mapping[str, TensorSpec]
    left_behind: tuple[str, ...]
    """Names, as stored, of those that are of a value head: training needs it, and the model does not."""


def name_as_peft(
    where: str,
    method: str,
    specs: Sequence[TensorSpec],
    origins: Mapping[str, str],
    same: Callable[[TensorSpec, TensorSpec], bool],
) -> Named:
    """Find the names that PEFT would save tensors under, by the names that they are stored under.

    Args:
        where: the file, for messages.
        method: PEFT's name of it.
        specs: of the file.
        origins: of tensors that come from files beside the adapter's: their names, by tensor.
        same: whether two tensors of the file are equal.

    Raises:
        BadInputError: two tensors that differ have one name, or a tensor is empty.
        UnsupportedError: the file holds several adapters.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(method)]
    tensors: dict[str, TensorSpec] = {}
    left_behind = []
    adapters: dict[str, str] = {}
    for spec in specs:
        name, adapter = _as_peft(spec.name, prefix)
        if _VALUE_HEAD.fullmatch(name):
            left_behind.append(spec.name)
            continue
        if 0 in spec.shape:
            raise BadInputError(
                f"{origins.get(spec.name, where)}: tensor {spec.name} is empty, of shape {list(spec.shape)}: DeepSpeed "
                "ZeRO-3 saves adapters so when its parameters are not gathered first; save it anew with "
                "stage3_gather_16bit_weights_on_model_save, or make it of the training checkpoint with zero_to_fp32.py"
            )
        if ".original_module." in name:
            continue  # the base's, beside a copy that was trained in its place
        if name in tensors and same(tensors[name], spec):
            continue  # PEFT saves an embedding that was trained and resized twice
        if name in tensors:
            both = " and ".join(
                f"{each.name} (of {origins[each.name]})" if each.name in origins else each.name
                for each in (tensors[name], spec)
            )
            raise BadInputError(
                f"{where}: tensors {both} are one and the same to PEFT, {name}, and "
                "nothing says which counts; save the adapter again with one of them"
            )
        tensors[name] = spec
        if adapter is not None:
            adapters.setdefault(adapter, spec.name)
    if len(adapters) > 1:
        raise UnsupportedError(
            f"{where}: holds tensors of {len(adapters)} adapters, {' and '.join(sorted(adapters))} (such as "
            f"{' and '.join(sorted(adapters.values())[:2])}); save the one to merge with save_pretrained("
            "selected_adapters=[...])"
        )
    return Named(tensors=tensors, left_behind=tuple(left_behind))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """An adapter's configuration and tensors by the names that the model of a base has."""

    config: PeftConfig
    tensors: Mapping[str, TensorSpec]
    moved: Mapping[str, str]
    """New names of modules and tensors by those in the adapter; empty where all of them fit."""
    tower: str | None
    """The one part of the model that the adapter was trained on, where it is of that part alone."""


def fit_names(
    config: PeftConfig,
    tensors: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: Callable[[], PreTrainedModel],
) -> Fitted:
    """Rename what a base's model has under another name.

    An adapter's module is called what its weight was called when it was trained; transformers knows what becomes of
    such names when it loads an old checkpoint. An adapter of a text model fits the same model in a larger one.

    Args:
        config: of the adapter; not changed.
        tensors: by PEFT's names.
        shapes: of all tensors of the base's model, by name.
        skeleton: makes the base's model; asked only where names do not fit.
    """
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)]
    modules = _modules(shapes)
    known = modules | shapes.keys()
    owners = {name: owner_of(name, prefix) for name in tensors}
    unknown = {owner for owner in owners.values() if owner is not None and owner not in known}
    if not unknown:
        return Fitted(config=config, tensors=tensors, moved={}, tower=None)
    model = skeleton()
    find = _Finder(model, modules, shapes)
    moved = {owner: found for owner in sorted(unknown) if (found := find(owner)) is not None}
    taken = (set(owners.values()) - unknown) & set(moved.values())
    if taken or len(set(moved.values())) != len(moved):
        moved = {}  # two would become one: these are no names of an older version
    renamed = {}
    for name, spec in tensors.items():
        owner = owners[name]
        renamed[_renamed(name, owner, moved[owner]) if owner in moved else name] = spec
    if not moved:
        return Fitted(config=config, tensors=tensors, moved={}, tower=None)
    config = copy.deepcopy(config)
    move_patterns(config, {old: new for old, new in moved.items() if new in modules})
    move_ends(config, moved, modules)
    tower = _narrow(config, find, {owner_of(name, prefix) for name in renamed} - {None}, moved)
    return Fitted(config=config, tensors=renamed, moved=moved, tower=tower)


class _Finder:
    """Finds what the model calls a module or tensor that an adapter has under another name."""

    def __init__(self, model: PreTrainedModel, modules: frozenset[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._modules = modules
        self._shapes = shapes
        transforms = get_model_conversion_mapping(model)
        self._rename: Any = functools.partial(
            rename_source_key,
            weight_renamings=[transform for transform in transforms if isinstance(transform, WeightRenaming)],
            weight_converters=[],
            base_model_prefix=model.base_model_prefix,
            meta_state_dict=model.state_dict(),
        )
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        names = {id(module): name for name, module in model.named_modules()}
        self.decoder: str | None = names.get(id(decoder)) or None
        head = model.get_output_embeddings()
        self.head: str | None = None if head is None else names.get(id(head))

    def __call__(self, name: str) -> str | None:
        """Return the name in the model, or None where it has none."""
        for candidate, suffix in ((name, ""), (name, ".weight")):
            renamed = str(self._rename(candidate + suffix)[0])
            if renamed in self._shapes:
                return renamed.removesuffix(suffix)
        if self.decoder is not None:
            first, _, rest = name.partition(".")
            for inner in (name, *([rest] if first in _TEXT_MODELS else [])):
                candidate = f"{self.decoder}.{inner}"
                if candidate in self._shapes or candidate in self._modules:
                    return candidate
        return None


def _as_peft(name: str, prefix: str) -> tuple[str, str | None]:
    """Return PEFT's name of a tensor, and the adapter's own name where it was in it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == _OUTERMOST:
        del parts[0]
    # What held PEFT's model in the training: `model` of Lightning, `policy`, `pretrained_model` of TRL.
    while (place := next((i for i in range(1, len(parts)) if parts[i : i + 2] == _PEFTS), 0)) > 0:
        del parts[:place]
    adapter = None
    for place, part in enumerate(parts[:-1]):
        following = parts[place + 1]
        rest = len(parts) - place - 1
        if part == "modules_to_save":
            del parts[place : place + (2 if following == "default" and rest > 1 else 1)]
            break
        if part.startswith((prefix, _TOKENS)):
            named = following == "default"
            if prefix == "lora_":
                named |= part in ("lora_A", "lora_B", _MAGNITUDE) and rest == 2
                named |= part in ("lora_embedding_A", "lora_embedding_B") and rest == 1
            if named:
                adapter = following
                del parts[place + 1]
            if part == _MAGNITUDE and parts[place + 1 :] == ["weight"]:
                del parts[place + 1]  # what PEFT saves of a layer with one parameter has the name of the layer
            break
    whole = ".".join(parts)
    return whole if whole.startswith("base_model.") else f"{PREFIX}{whole}", adapter


def owner_of(name: str, prefix: str) -> str | None:
    """Return the module that a tensor of a tuner belongs to, or the name in the model of any other tensor.

    Args:
        name: as PEFT has it.
        prefix: of the method's own tensors, such as `lora_`.
    """
    if not name.startswith(PREFIX):
        return None
    parts = [part for part in name[len(PREFIX) :].split(".") if part != _LAYER]
    for place, part in enumerate(parts):
        if part.startswith((prefix, _TOKENS)) or part == "token_adapter":
            return ".".join(parts[:place])
    return ".".join(parts)


def _renamed(name: str, owner: str, new: str) -> str:
    """Give a tensor's owner its new name; the layers that PEFT has put between stay as far from the end."""
    parts = name[len(PREFIX) :].split(".")
    inner = [part for part in parts if part != _LAYER][len(owner.split(".")) :]
    renamed = [*new.split("."), *inner]
    for place, part in enumerate(reversed(parts)):
        if part == _LAYER:
            renamed.insert(len(renamed) - place, part)
    return f"{PREFIX}{'.'.join(renamed)}"


def _modules(shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    found = set()
    for name in shapes:
        owner = name.rpartition(".")[0]
        while owner and owner not in found:
            found.add(owner)
            owner = owner.rpartition(".")[0]
    return frozenset(found)


def _narrow(config: Any, find: _Finder, owners: set[str | None], moved: Mapping[str, str]) -> str | None:
    """Leave alone what the configuration would target outside of the text model, for an adapter of that alone."""
    tower: str | None = find.decoder
    if tower is None or not all(new.startswith(f"{tower}.") for new in moved.values()):
        return None
    outside = {owner for owner in owners if owner is not None and not owner.startswith(f"{tower}.")}
    if not outside <= {find.head, f"{find.head}.weight"} or not hasattr(config, "exclude_modules"):
        return None
    excluded = rf"(?!{re.escape(tower)}\.|{re.escape(str(find.head))}$).*"
    given = config.exclude_modules
    if isinstance(given, str):
        config.exclude_modules = f"(?:{given})|{excluded}"
    else:
        listed = [rf"(?:.*\.)?{re.escape(name)}" for name in given or ()]
        config.exclude_modules = "|".join([*listed, excluded])
    return tower
