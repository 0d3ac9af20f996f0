"""An adapter as a base takes it: names, tensors trained beside it and vocabulary, held against the base's model."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import PreTrainedModel

from jobs.errors import UnsupportedError
from workers.adapters.adapter import FLOATS, Adapter, refusals
from workers.adapters.causes import OF_TASKS
from workers.adapters.config import ADAPTER_CONFIG
from workers.adapters.heads import Head, find_head, give_head
from workers.adapters.names import Fitted, fit_names
from workers.adapters.resizing import check_indices, num_tokens_of, plain_name, trained_indices
from workers.files.layout import TensorSpec


def fit(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], skeleton: Callable[[], PreTrainedModel]) -> Adapter:
    """Return an adapter with the names and the vocabulary that a base has.

    Args:
        adapter: as it was opened.
        shapes: of all tensors of the base's model, by name.
        skeleton: makes the base's model on the meta device; asked where the names and shapes alone do not fit, and not
            changed.

    Raises:
        UnsupportedError: a tensor that was trained beside the adapter is none of the base's, or what it brings of
            another vocabulary is not enough.
        BadInputError: its configuration cannot be read for the base's names.
    """
    where = str(adapter.weights_path)
    task = getattr(adapter.config, "task_type", None)
    plain_model = functools.cache(skeleton)
    head = find_head(where, task, adapter.tensors, shapes, plain_model)
    if head is not None:
        shapes = head.shapes_with(shapes)

    @functools.cache
    def model() -> PreTrainedModel:
        made = skeleton()
        give_head(made, head, on_meta=True)
        return made

    with refusals(adapter, f"{ADAPTER_CONFIG}: does not fit this base"):
        fitted = fit_names(adapter.config, adapter.tensors, shapes, model)
    num_tokens = num_tokens_of(where, fitted.tensors, shapes, model)
    if any(trained_indices(fitted.config)):
        embedding: Any = model().get_input_embeddings()
        config_path = str(adapter.directory / ADAPTER_CONFIG)
        check_indices(config_path, fitted.config, num_tokens or embedding.weight.shape[0])
    parameters = functools.cache(lambda: frozenset(dict(model().named_parameters(remove_duplicate=False))))
    for name, spec in fitted.tensors.items():
        plain = plain_name(name)
        if plain is not None and plain in shapes and plain not in parameters():
            raise UnsupportedError(
                f"{adapter.origin(spec.name)}: tensor {spec.name} is a buffer of the base's model, {plain}, and a "
                "merge changes parameters alone; save the adapter without it"
            )
        if plain in shapes and spec.dtype not in FLOATS:
            raise UnsupportedError(
                f"{adapter.origin(spec.name)}: tensor {spec.name}: expected one of {', '.join(map(str, FLOATS))} for "
                f"{plain} of the base, found {spec.dtype}; save it as such"
            )
        if spec.name in adapter.beside:
            expected = spec.shape if num_tokens is not None and plain in shapes else shapes.get(plain or "")
            if plain is not None and spec.shape != expected:
                raise _misfit(adapter, spec, plain, expected, type(model()).__name__)
    notes = (*adapter.notes, *_notes(fitted, num_tokens, head, plain_model))
    return dataclasses.replace(
        adapter, config=fitted.config, tensors=fitted.tensors, num_tokens=num_tokens, head=head, notes=notes
    )


def _notes(
    fitted: Fitted, num_tokens: int | None, head: Head | None, skeleton: Callable[[], PreTrainedModel]
) -> Iterator[str]:
    """Yield what a person should know of how an adapter fits."""
    if fitted.moved:
        old, new = next(iter(fitted.moved.items()))
        num_moved = len(fitted.moved)
        yield f"{num_moved} modules of the adapter have another name in this base, such as {old}, which is {new}"
    if fitted.tower is not None:
        yield f"the adapter is of the text model alone; modules outside of {fitted.tower} are left as they are"
    task = str(getattr(fitted.config, "task_type", None))
    if head is not None:
        yield (
            f"the release is a {head.class_name}, with the head that the adapter brings for {head.num_labels} labels "
            f"in the place of that of {type(skeleton()).__name__}"
        )
        if head.needs_padding and getattr(skeleton().config.get_text_config(), "pad_token_id", None) is None:
            yield (
                "config.json has no pad_token_id, without which a model for sequences takes one at a time: set it to "
                "the one that the training padded with"
            )
    elif task in OF_TASKS and not type(skeleton()).__name__.endswith(OF_TASKS[task].removeprefix("AutoModel")):
        yield (
            f"the adapter was trained for task_type {task}, and the base is a {type(skeleton()).__name__}: the release "
            "is one, too, without the head of that task"
        )
    if num_tokens is not None:
        yield f"the vocabulary is the adapter's: {num_tokens} tokens"


def _misfit(
    adapter: Adapter, spec: TensorSpec, plain: str, expected: tuple[int, ...] | None, model: str
) -> UnsupportedError:
    """Say why a tensor that was trained beside an adapter is not exactly one of the base's."""
    where = f"{adapter.origin(spec.name)}: tensor {spec.name} was trained beside the adapter"
    if expected is None:
        return UnsupportedError(
            f"{where}, and {model} has no parameter {plain}; name the base that has it, or move the file elsewhere if "
            "the model does not need it"
        )
    return UnsupportedError(
        f"{where}: expected shape {list(expected)}, as {plain} of this base has, found {list(spec.shape)}; it was "
        "trained on another base"
    )
