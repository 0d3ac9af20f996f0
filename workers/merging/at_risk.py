"""Weights that may be kept in more bits than the form of a release has, and what is refused of that in a plan."""

from collections.abc import Collection, Iterator

from jobs.errors import UnsupportedError
from jobs.kept import Keep
from jobs.request import MergeRequest
from workers.bases.declarations import DECLARING_FILES
from workers.bases.forms import WideningForm
from workers.merging.base_plan import BasePlan
from workers.merging.storage import BaseStorage, WeightStorage, stored_alike


def at_risk(storage: WeightStorage, names: Collection[str]) -> Iterator[tuple[str, ...]]:
    """Yield the weights that are kept in more bits together, if at all.

    Args:
        storage: of the release, nothing in it kept so far.
        names: of the weights in it that the adapter changes: no other delta can be lost.
    """
    alike = stored_alike(storage.in_form)
    yield from dict.fromkeys(alike[name] for name in names)


def check_keep(base: BasePlan, request: MergeRequest, storage: WeightStorage, names: Collection[str]) -> None:
    """Refuse to keep weights in more bits where the form has no words for that, or nothing proves that it loads.

    Args:
        base: planned.
        request: settled.
        storage: of the release.
        names: of the weights in it that the adapter changes.

    Raises:
        UnsupportedError: says why, and what to request.
    """
    if request.keep is None:
        return
    place, form = base.source.directory, storage.form
    if not isinstance(form, WideningForm):
        raise UnsupportedError(
            f"{place}: keep: {request.keep} is not done in {form.words}, as transformers loads no such release, so "
            "that nothing proves it; leave keep out, or request another form as output"
        )
    beside = [name for name in DECLARING_FILES if (place / name).is_file()]
    if isinstance(storage, BaseStorage) and beside:
        raise UnsupportedError(
            f"{place / beside[0]}: declares the form of the weights beside config.json, and keep: {request.keep} "
            "amends that one alone; move the declaration to config.json, or leave keep out"
        )
    weights = {name: storage.in_form[name] for group in at_risk(storage, names) for name in group}
    if weights and isinstance(storage, BaseStorage):  # a form that is asked for has no other words than these
        form.check_wider(weights, in_8_bits=request.keep is Keep.IN_8_BITS)
