"""Whether a base is stored in the 4-bit form that was asked for."""

from jobs.errors import BadInputError, UnsupportedError
from jobs.request import MergeRequest, QuantizationOptions
from workers.bases.model import stored_quantization
from workers.sources.fetch import Source


def stored_as_asked(source: Source, request: MergeRequest, types: frozenset[str]) -> bool:
    """Return whether a base is stored in 4-bit, and check that it is in the way that was asked for.

    Args:
        source: the base.
        request: what is asked of it.
        types: 4-bit types of its tensors.

    Raises:
        BadInputError: configuration and tensors contradict each other.
        UnsupportedError: it is stored in 4-bit, and the request wants other weights than those.
    """
    stored = stored_quantization(source.directory)
    declared = frozenset({stored.quantization.value}) if stored else frozenset()
    if declared != types:
        raise BadInputError(
            f"{source.directory}: config.json says that weights are stored in "
            f"{', '.join(declared) or 'no 4-bit type'}, the tensors say "
            f"{', '.join(sorted(types)) or 'no 4-bit type'}; the checkpoint is inconsistent"
        )
    if stored is None:
        return False
    if request.base_quantization is not stored.quantization:
        raise UnsupportedError(
            f"{source.directory}: the base is stored in {stored.quantization}, so there are no other weights to merge "
            f"into; request base_quantization: {stored.quantization}, or name the 16-bit base (found "
            f"base_quantization: {request.base_quantization})"
        )
    if request.quantization_options not in (QuantizationOptions(), stored.options):
        raise UnsupportedError(
            f"{source.directory}: the base is stored in 4-bit with {stored.options!r}; quantization_options cannot "
            f"change that: leave them out (found {request.quantization_options!r})"
        )
    return True
