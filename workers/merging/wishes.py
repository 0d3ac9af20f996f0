"""What a request may not ask of its base and its adapter."""

from jobs.errors import UnsupportedError
from jobs.request import MergeRequest
from workers.adapters.adapter import Adapter
from workers.adapters.methods import UNSTABLE
from workers.merging.base_plan import BasePlan


def check_wishes(base: BasePlan, request: MergeRequest, opened: Adapter) -> None:
    """Refuse what cannot be done with a base and an adapter, or not without saying so.

    Args:
        base: planned.
        request: settled.
        opened: the adapter, fitted to the base.

    Raises:
        UnsupportedError: says what is asked for, why it is not done, and what to request.
    """
    if opened.method in UNSTABLE and not request.accept_unstable:
        raise UnsupportedError(
            f"{opened.directory}: peft_type {opened.method!r}: {UNSTABLE[opened.method]}; it computes "
            "something else on another machine. Train anew by another method, or request accept_unstable: true for the "
            "weights that it gives on the worker"
        )
    if request.parity.level == "full" and not base.answers_prompts:
        raise UnsupportedError(
            f"{base.source.directory}: its model does not continue text, so parity level full cannot ask "
            "it anything; request parity level: arithmetic, which compares every tensor"
        )
    if request.parity.level == "full" and opened.head is not None:
        raise UnsupportedError(
            f"{opened.directory}: with the head that it brings, the release is a {opened.head.class_name}, which does "
            "not continue text, so parity level full cannot ask it anything; request parity level: arithmetic, which "
            "compares every tensor"
        )
    if request.compare and base.form is not None:
        raise UnsupportedError(
            f"{base.source.directory}: the base is stored in {base.form.words} and has no other weights to compare "
            "with; leave out compare, or name the 16-bit base"
        )
