"""What was found of a checkpoint beside the release it was made of, held against limits."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jobs.locations import Location
from jobs.parity_policy import MIN_REQUANTIZED_SURVIVAL, Thresholds
from jobs.release import Manifest
from workers.against.accounts import Accounts
from workers.against.configurations import Agreement
from workers.against.figures import Figures
from workers.against.foldings import Foldings
from workers.parity.beside_release import Beside

_NUM_NAMED = 20
"""Failures of one kind that are told one by one."""
NUM_WORST = 5
_ROUNDED = 0.02
"""Error of a weight in numbers with scales folded in: rounding to bfloat16 twice leaves a tenth of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a checkpoint may differ by and still be that release."""

    min_survival: float = MIN_REQUANTIZED_SURVIVAL
    """Smallest share of a weight's delta that is left."""
    max_error: float = 0.5
    """Largest relative error of a weight: another weight of the same size is 1.4 away, zeros are 1."""
    max_mean_kl: float = Thresholds().max_mean_kl
    """Nats, release to checkpoint."""
    min_top1_agreement: float = Thresholds().min_top1_agreement
    max_lost_share: float = 0.5
    """Largest KL to the release, over that from the release to its base: 1 is no nearer to it than the base is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A checkpoint beside a release."""

    checkpoint: Location
    release: Location
    manifest: Manifest
    form: str | None
    """What its weights are stored in, in words; None for plain numbers."""
    base: Location | None
    """What W is from; None where that could not be had."""
    why_no_base: str | None
    limits: Limits
    accounts: Accounts
    figures: tuple[Figures, ...] = ()
    foldings: Foldings = field(default_factory=Foldings)
    agreement: Agreement
    behaviour: Beside | None = None
    wrong_behaviour: str | None = None
    """Why the checkpoint does not run."""
    why_no_behaviour: str | None = None

    @property
    def folded(self) -> Mapping[str, str]:
        """Weights with scales of neighbours in them, by name: their values say nothing by themselves."""
        return self.foldings.weights

    @property
    def weights(self) -> tuple[Figures, ...]:
        """What is stored as codes and was compared weight by weight."""
        return tuple(each for each in self.figures if each.in_form and each.pair.release not in self.folded)

    @property
    def changed(self) -> tuple[Figures, ...]:
        """What is stored as numbers, and as others than the release's; what is folded aside."""
        taken = {*self.foldings.small, *self.folded}
        return tuple(each for each in self.figures if each.num_different and each.pair.release not in taken)

    @property
    def survivals(self) -> tuple[Figures, ...]:
        """Weights that the adapter changed and whose delta can be measured, least of it left first."""
        known = [each for each in self.weights if each.survival is not None]
        return tuple(sorted(known, key=lambda each: each.survival or 0.0))

    @property
    def errors(self) -> tuple[Figures, ...]:
        """All weights in the form, worst error first."""
        return tuple(sorted(self.weights, key=lambda each: -each.error))

    @property
    def median_survival(self) -> float | None:
        """Of the weights that have one."""
        return _median(each.survival for each in self.survivals if each.survival is not None)

    @property
    def median_error(self) -> float | None:
        """Of the weights in the form."""
        return _median(each.error for each in self.weights)

    @property
    def num_below(self) -> int:
        """Weights with less of their delta left than they should have."""
        return sum(not (each.survival or 0.0) >= self.limits.min_survival for each in self.survivals)

    @property
    def failures(self) -> tuple[str, ...]:
        """One sentence for each reason why the checkpoint does not pass; names the tensor or the figure."""
        return (*self._of_accounts(), *self._of_tensors(), *self.agreement.wrong, *self._of_behaviour())

    @property
    def passed(self) -> bool:
        """Whether it is that release, in another form."""
        return not self.failures

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for each thing that decides nothing and that a person should know."""
        remarks = () if self.behaviour is None else self.behaviour.remarks
        told = (*self._of_measuring(), *self._of_folding(), *self._of_tensor_notes())
        return (*told, *self.agreement.notes, *remarks)

    def _of_accounts(self) -> Iterator[str]:
        accounts = self.accounts
        yield from _told([f"tensor {name}: missing" for name in accounts.missing], "tensors are missing")
        wrong = [f"tensor {name}: {what}" for name, what in accounts.misshapen.items()]
        yield from _told(wrong, "tensors have other shapes")
        extra = [f"tensor {name}: the release has none such, nor has its model" for name in accounts.extra]
        yield from _told(extra, "tensors are extra")

    def _of_tensors(self) -> Iterator[str]:
        limits = self.limits
        scaled = self.foldings.unexplained
        errors = [each for each in self.errors if each.pair.release not in scaled]
        other = [each for each in errors if not each.error <= limits.max_error]
        sentences = [
            f"weight {each.pair.release}: {each.error:.3g} of its norm away from the release's, expected at most "
            f"{limits.max_error:g}: another weight"
            for each in other
        ]
        yield from _told(sentences, "weights are others")
        lost = [each for each in self.survivals if not (each.survival or 0.0) >= limits.min_survival]
        sentences = [
            f"weight {each.pair.release}: {each.survival:.3g} of the adapter's delta is left, expected at least "
            f"{limits.min_survival:g} (delta {each.delta or 0.0:.2g}, error {each.error:.2g} of its norm); "
            "quantize it to more bits, leave it in 16 (ignore), or give another min_survival"
            for each in lost
            if each not in other and each.pair.release not in scaled
        ]
        yield from _told(sentences, "weights keep as little")
        sentences = [
            f"tensor {each.pair.release}: {each.num_different} elements are others than the release's "
            f"({each.error:.3g} of its norm), and no weight of its layer takes that back"
            for each in self.changed
            if each.pair.release not in self.foldings.unexplained
        ]
        yield from _told(sentences, "tensors in numbers were changed")
        sentences = [
            f"weight {name}: its {what} are scaled, and no norm and no other weight takes that back"
            for name, what in self.foldings.unexplained.items()
        ]
        yield from _told(sentences, "weights are scaled so")
        sentences = [
            f"weight {each.pair.release}: with its scales taken out it is {each.scaled.error:.3g} of its norm away "
            f"from the release's, expected at most {most:g}: another weight"
            for each in self.figures
            if each.scaled is not None
            and each.pair.release in self.folded
            and not each.scaled.error <= (most := limits.max_error if each.in_form else _ROUNDED)
        ]
        yield from _told(sentences, "scaled weights are others")

    def _of_behaviour(self) -> Iterator[str]:
        found, limits = self.behaviour, self.limits
        if self.wrong_behaviour is not None:
            yield self.wrong_behaviour
        elif found is None and self.folded:
            yield "scales are folded into weights, so that only behaviour can tell, and it was not measured"
        if found is None:
            return
        if not found.mean_kl <= limits.max_mean_kl:
            yield f"mean KL to the release is {found.mean_kl:.3g} nats, expected at most {limits.max_mean_kl:g}"
        if not found.top1_agreement >= limits.min_top1_agreement:
            yield (
                f"top-1 agreement with the release is {found.top1_agreement:.4f}, expected at least "
                f"{limits.min_top1_agreement:g}"
            )
        if found.lost_share is not None and not found.lost_share <= limits.max_lost_share:
            yield (
                f"mean KL to the release is {found.mean_kl:.3g} nats, {found.lost_share:.2g} of what lies between "
                f"release and base ({found.adapter_kl:.3g}), expected at most {limits.max_lost_share:g}: it moves the "
                "model about as far as the adapter does"
            )

    def _of_measuring(self) -> Iterator[str]:
        if self.base is None:
            yield f"what is left of the adapter was NOT measured, errors only: {self.why_no_base}"
        unknown = [each.pair.release for each in self.weights if each.delta is None]
        if self.base is not None and unknown:
            yield (
                f"{len(unknown)} weights were measured by their errors only, as the base does not have them one by one "
                f"in this shape: {unknown[0]}"
            )
        if self.behaviour is None and self.why_no_behaviour is not None:
            yield f"behaviour was NOT measured: {self.why_no_behaviour}"

    def _of_folding(self) -> Iterator[str]:
        if not self.folded:
            return
        yield (
            f"the tool has folded scales into {len(self.foldings.small)} norms and biases and {len(self.folded)} "
            "weights (AWQ and SmoothQuant do): weight by weight these are others by design, their survival is not "
            "told, and only behaviour says whether they compute the same"
        )
        taken_back = [f"{name}: changed, and taken back by {what}" for name, what in self.foldings.small.items()]
        yield from _told(taken_back, "norms and biases are taken back so")

    def _of_tensor_notes(self) -> Iterator[str]:
        cast = [each.pair.release for each in self.figures if each.cast and not each.num_different]
        if cast:
            yield f"{len(cast)} tensors in numbers have another dtype, and the values that casting gives: {cast[0]}"
        if self.accounts.left_out:
            names = self.accounts.left_out
            yield f"{len(names)} tensors that the model does not take are left out: {names[0]}"
        if self.accounts.fixed:
            yield (
                f"{len(self.accounts.fixed)} scales of activations or of the KV cache are fixed: answers here are "
                "those of the weights alone"
            )


def _told(sentences: Sequence[str], rest: str) -> Iterator[str]:
    yield from sentences[:_NUM_NAMED]
    if len(sentences) > _NUM_NAMED:
        yield f"{len(sentences) - _NUM_NAMED} more {rest}"


def _median(values: Iterable[float]) -> float | None:
    each = list(values)
    return statistics.median(each) if each else None
