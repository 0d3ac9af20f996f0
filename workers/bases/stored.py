"""Whether a base is stored in the form that was asked for."""

from collections.abc import Mapping

from jobs.errors import BadInputError, UnsupportedError
from jobs.request import BaseQuantization, MergeRequest, QuantizationOptions
from workers.bases.forms import StoredForm
from workers.bases.forms.declared import declared_form
from workers.bases.four_bit import quantized_names
from workers.bases.model import stored_quantization
from workers.files.layout import TensorSpec
from workers.sources.fetch import Source


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
    if stored is not None and request.quantization_options not in (QuantizationOptions(), stored.options):
        raise UnsupportedError(
            f"{source.directory}: the base is stored in 4-bit with {stored.options!r}; quantization_options cannot "
            f"change that: leave them out (found {request.quantization_options!r})"
        )
    return form
