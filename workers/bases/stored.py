"""What of a base is stored in a form, and whether that is what was asked for."""

from collections.abc import Mapping
from pathlib import Path

from jobs.errors import BadInputError, MergefleetError, UnsupportedError
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.bases.forms import StoredForm, StoredParts
from workers.bases.forms.declared import declared_form
from workers.bases.four_bit import quantized_names
from workers.bases.model import stored_quantization
from workers.files.layout import TensorSpec
from workers.sources.fetch import Source


def usual_quantization(directory: Path) -> BaseQuantization:
    """Return what the delta is added to where a request leaves that to the base.

    Args:
        directory: of the base.

    Returns:
        What adapters on it have seen: the weights it is stored in, where those are quantized; and NF4 of others, as
        most adapters are trained by QLoRA.
    """
    if declared_form(directory) is None:
        return BaseQuantization.NF4
    stored = stored_quantization(directory)
    return BaseQuantization.STORED if stored is None else stored.quantization


def stored_as_asked(source: Source, request: MergeRequest, specs: Mapping[str, TensorSpec]) -> StoredForm | None:
    """Return the form a base is stored in, None for plain numbers, and check that its weights are those asked for.

    Args:
        source: the base.
        request: what is asked of it.
        specs: of its tensors, by name.

    Raises:
        BadInputError: configuration and tensors contradict each other.
        UnsupportedError: it is stored in a form, and the request wants other weights than those.
    """
    form = declared_form(source.directory)
    stored = stored_quantization(source.directory)
    declared = frozenset({stored.quantization.value}) if stored else frozenset()
    types = frozenset(quantized_names(specs).values())
    if declared != types:
        raise BadInputError(
            f"{source.directory}: config.json says that weights are stored in "
            f"{', '.join(declared) or 'no 4-bit type'}, the tensors say "
            f"{', '.join(sorted(types)) or 'no 4-bit type'}; the checkpoint is inconsistent"
        )
    if form is None:
        return None
    own = stored.quantization if stored else BaseQuantization.STORED
    if request.base_quantization not in (own, BaseQuantization.STORED):
        raise UnsupportedError(
            f"{source.directory}: the base is stored in {stored.quantization if stored else form.words}, so there are "
            f"no other weights to merge into; request base_quantization: {own}, or name the 16-bit base (found "
            f"base_quantization: {request.base_quantization})"
        )
    if stored is None and request.quantization_options != QuantizationOptions():
        raise UnsupportedError(
            f"{source.directory}: the base is stored in {form.words}, and nothing is converted to 4-bit: leave "
            f"quantization_options out (found {request.quantization_options!r})"
        )
    if stored is not None and request.quantization_options not in (QuantizationOptions(), stored.options):
        raise UnsupportedError(
            f"{source.directory}: the base is stored in 4-bit with {stored.options!r}; quantization_options cannot "
            f"change that: leave them out (found {request.quantization_options!r})"
        )
    return form


def weights_in_form(
    source: Source, form: StoredForm | None, specs: Mapping[str, TensorSpec]
) -> Mapping[str, StoredParts]:
    """Return the weights of a base that are stored in a form, by name; raises as `StoredForm.weights`.

    Args:
        source: the base.
        form: of it; None where all its weights are plain numbers.
        specs: of its tensors, by name.
    """
    try:
        return {} if form is None else form.weights(specs)
    except MergefleetError as error:
        raise type(error)(f"{source.directory}: {error}") from error


def check_shapes(
    source: Source,
    specs: Mapping[str, TensorSpec],
    in_form: Mapping[str, StoredParts],
    weight_of: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that weights and model are of the same shapes.

    Args:
        source: the base.
        specs: of its tensors, by name.
        in_form: its weights that are stored in a form.
        weight_of: by stored tensor, which of those it is a part of.
        shapes: of what the model takes as it is, by stored name.

    Raises:
        BadInputError: one has another shape than in the model.
        UnsupportedError: of one, nothing tells the shape.
    """
    found = {name: spec.stated.shape if spec.stated else spec.shape for name, spec in specs.items()}
    found = {name: shape for name, shape in found.items() if name not in weight_of}
    found |= {name: parts.shape for name, parts in in_form.items() if parts.shape is not None}
    for name, shape in found.items():
        if shape != shapes.get(name, shape):
            raise BadInputError(
                f"{source.directory}: tensor {name} has shape {list(shape)}, config.json makes it "
                f"{list(shapes[name])}; weights and configuration are not of the same model"
            )
    for name, parts in in_form.items():
        if name not in found and name not in shapes and parts.at_most is None:
            raise UnsupportedError(
                f"{source.directory}: tensor {name} is stored in codes that do not tell its shape, and belongs to no "
                "module of the model, so nothing says what it becomes; store the base without it, or name one in 16 "
                "bits"
            )
