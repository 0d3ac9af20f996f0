"""Heads that classify, trained with an adapter on a model that continues text: the release is a model of that class.

PEFT trains such a head in a model of another class of transformers, whose modules are the same but for its head
(`GenericForSequenceClassification` and `GenericForTokenClassification` of transformers/modeling_layers.py, 5.23). That
class is asked which tensors it has; a model of the base gets its head in the place of the one that it has.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)

from jobs.errors import UnsupportedError
from workers.adapters.names import PREFIX
from workers.bases.model import quiet_transformers
from workers.files.layout import TensorSpec

_CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "TOKEN_CLS": MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}
"""transformers' tables of classes by configuration, by PEFT's name of the task."""
_HEADS = ("score", "classifier")
"""What classes of transformers call such heads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What takes the place of a model's head."""

    class_name: str
    """Of transformers, for the model that has it."""
    module: str
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by their names in the model and in files."""
    dropped: frozenset[str]
    """Names in the model of what the base's head has."""
    needs_padding: bool
    """Whether the model asks its configuration which token is padding."""

    @property
    def num_labels(self) -> int:
        """How many classes there are; a reward model has one."""
        return self.shapes[f"{self.module}.weight"][0]

    def shapes_with(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a model's tensors once it has this head."""
        return {name: shape for name, shape in shapes.items() if name not in self.dropped} | dict(self.shapes)


def find_head(
    where: str,
    task: str | None,
    tensors: Mapping[str, TensorSpec],
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: Callable[[], PreTrainedModel],
) -> Head | None:
    """Return the head that an adapter brings and its base lacks, or None where it brings none that fits.

    Args:
        where: the adapter's file, for messages.
        task: PEFT's name of the task that it was trained for.
        tensors: of the adapter, by PEFT's names.
        shapes: of all tensors of the base's model, by name.
        skeleton: makes the base's model; asked only where a tensor is called as one of a head.

    Raises:
        UnsupportedError: a part of the head is missing.
    """
    brought = {name.removeprefix(PREFIX): spec.shape for name, spec in tensors.items()}
    module = next((head for head in _HEADS if f"{head}.weight" in brought and f"{head}.weight" not in shapes), None)
    classes = _CLASSES.get(str(task))
    if module is None or classes is None or len(brought[f"{module}.weight"]) != 2:
        return None
    own = {name: shape for name, shape in brought.items() if name.startswith(f"{module}.")}
    model = skeleton()
    kind: Any = classes.get(type(model.config), None)
    output = model.get_output_embeddings()
    if kind is None or isinstance(kind, tuple) or output is None:
        return None
    target = _shapes_of(kind, model, own[f"{module}.weight"][0])
    added = {name: shape for name, shape in target.items() if shapes.get(name) != shape}
    dropped = shapes.keys() - target.keys()
    ends = {id(parameter) for parameter in output.parameters(recurse=False)}
    of_head = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in ends}
    if not added or not dropped <= of_head or any(not name.startswith(f"{module}.") for name in added):
        return None
    if missing := added.keys() - own.keys():
        raise UnsupportedError(
            f"{where}: the adapter brings {module}.weight for a {kind.__name__}, and not {min(missing)}, which that "
            f"class has, too; save it with {module} in modules_to_save, or correct task_type ({task})"
        )
    if own != added:
        return None
    return Head(
        class_name=kind.__name__,
        module=module,
        shapes=added,
        dropped=frozenset(dropped),
        needs_padding=classes is MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )


def give_head(model: PreTrainedModel, head: Head | None, *, on_meta: bool) -> None:
    """Put a head in the place of the one that a model has; its values are zero until the adapter's are loaded.

    Args:
        model: of the base; changed, unless it has that head.
        head: None leaves the model as it is.
        on_meta: whether it is to have no values.
    """
    if head is None or hasattr(model, head.module):
        return
    for owner in {name.rpartition(".")[0] for name in head.dropped}:
        parent, _, key = owner.rpartition(".")
        delattr(model.get_submodule(parent), key)
    num_labels, num_features = head.shapes[f"{head.module}.weight"]
    dtype = next(model.parameters()).dtype
    with torch.device("meta" if on_meta else "cpu"):
        layer = nn.Linear(num_features, num_labels, bias=f"{head.module}.bias" in head.shapes, dtype=dtype)
    for parameter in layer.parameters():
        parameter.requires_grad = False
        parameter.zero_()
    model.add_module(head.module, layer)


def _shapes_of(kind: Any, model: PreTrainedModel, num_labels: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors that a class of transformers has for a model's configuration."""
    config = type(model.config).from_dict(model.config.to_dict() | {"id2label": None, "label2id": None})
    config.num_labels = num_labels
    with torch.device("meta"), quiet_transformers():
        made = kind._from_config(config)  # noqa: SLF001 - as skeleton() of bases/model.py
    return {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
