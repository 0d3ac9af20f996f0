"""The parity report that let a release out: what each check found."""

from typing import Annotated, Literal

from pydantic import Field

from jobs.combination import Combination
from jobs.frozen import Frozen, Sha256, is_empty, is_none
from jobs.kept import KeptWeights
from jobs.locations import LocationField
from jobs.parity_policy import Thresholds
from jobs.request import BaseQuantization


class TensorCheck(Frozen):
    """The arithmetic check of one merged tensor, on the bytes that ship."""

    tensor: str
    changed: bool
    """Whether its bytes are others than those of W, the weights it was merged into."""
    targeted: bool = False
    """Whether it was compared with what the adapter says of it; every other tensor has to be W, bit for bit."""
    max_abs_error: float
    """Largest `|merged - exact|`, exact in float64."""
    rounding_excess: float
    """Largest `|merged - exact|` over what one correct rounding may leave: at most 1 when right, and 1 where each
    element is the value nearest to the exact one."""
    num_bad_elements: Annotated[int, Field(ge=0)] = 0
    """Elements whose error is above the bound."""
    weight_norm: float = 0.0
    """Frobenius norm of W."""
    delta_norm: float = 0.0
    """Frobenius norm of the exact delta."""
    quantization_error: float | None = Field(default=None, exclude_if=is_none)
    """Frobenius norm of what 4 bits changed of W; None where W did not go through them, or came in them."""
    requantization_error: float | None = Field(default=None, exclude_if=is_none)
    """Frobenius norm of what quantizing the merged weight again changed of it; None where that was not done."""
    survival: float | None = None
    """<merged - W, delta> / <delta, delta>: how much of the delta outlived the rounding; None without a delta, or
    where the merged tensor holds no numbers."""


class PromptCheck(Frozen):
    """One prompt through the reference and through the merged checkpoint."""

    prompt: str
    reference_text: str
    """Greedy continuation by base + adapter."""
    merged_text: str
    """Greedy continuation by the merged checkpoint."""
    num_positions: Annotated[int, Field(ge=1)]
    """Positions of prompt and reference's continuation that are compared: those after each of which both models were
    asked for the next token. What begins as an earlier prompt does (a chat template's system prompt) counts once."""
    num_near_ties: Annotated[int, Field(ge=0)]
    max_abs_logit_difference: float
    mean_abs_logit_difference: float
    mean_kl: float
    """KL(reference || merged) in nats, mean over positions."""
    top1_agreement: float
    """Share of positions with the same most likely token, near ties left out."""
    reference_nll: float
    """Mean negative log likelihood (nats) of the tokens of prompt and reference's continuation."""
    merged_nll: float
    adapter_kl: float | None = Field(default=None, exclude_if=is_none)
    """KL(reference || its base without the adapter) on this prompt; None in reports of earlier versions."""
    rms_delta_p: float | None = Field(default=None, exclude_if=is_none)
    """As in `BehaviourCheck`."""


class HeldOutCheck(Frozen):
    """Held-out texts through the reference and through the merged checkpoint; means over the completions' tokens."""

    num_texts: int
    num_positions: int
    base_nll: float
    """Negative log likelihood (nats) of a token by the reference's base without the adapter."""
    reference_nll: float
    merged_nll: float
    mean_kl: float
    """KL(reference || merged) in nats."""
    top1_agreement: float
    """Share of positions with the same most likely token, near ties left out."""


class BehaviourCheck(Frozen):
    """The merged checkpoint, loaded by plain transformers, against base + adapter through PEFT."""

    reference: str
    """What it is compared with, in words."""
    gates: bool
    """Whether the thresholds apply, or the comparison is for information."""
    prompts: tuple[PromptCheck, ...]
    max_abs_logit_difference: float
    mean_kl: float
    """KL(reference || merged) in nats, mean over all positions."""
    adapter_kl: float
    """KL(reference || its base without the adapter): how far the adapter itself moves the model, to compare with."""
    top1_agreement: float
    num_positions: int
    num_near_ties: int
    """Positions left out of the agreement because the reference itself is undecided there."""
    near_tie_margin: float
    """Undecided: its two highest logits are nearer to each other than this."""
    reference_nll: float
    merged_nll: float
    held_out: HeldOutCheck | None = Field(default=None, exclude_if=is_none)
    """None where the request brings no texts."""
    lost_share: float | None = Field(default=None, exclude_if=is_none)
    """mean_kl over adapter_kl: 0 where nothing of the adapter's effect is lost, 1 where the merged checkpoint answers
    as the base does. None where the adapter has no effect at all, and, as all below, in reports of earlier versions."""
    rounding_kl: float | None = Field(default=None, exclude_if=is_none)
    """KL(reference || reference with its weights merged and rounded to the output's dtype by PEFT and torch), mean over
    the same positions: what a correct merge loses. Measured for the reference that gates."""
    proves_adapter: bool | None = Field(default=None, exclude_if=is_none)
    """Whether a merge without the adapter would have failed here; None where it was not asked."""
    kl_p999: float | None = Field(default=None, exclude_if=is_none)
    """99.9 % quantile of KL(reference || merged) over positions, nats."""
    mean_delta_p: float | None = Field(default=None, exclude_if=is_none)
    """Change of the probability of the token that comes next in the text, merged less reference: mean over positions.
    This and the next three as llama.cpp's perplexity tool reports them of quantized models, there in percent."""
    rms_delta_p: float | None = Field(default=None, exclude_if=is_none)
    """Root of the mean square of the same."""
    delta_p_p001: float | None = Field(default=None, exclude_if=is_none)
    """0.1 % quantile of the same."""
    delta_p_p999: float | None = Field(default=None, exclude_if=is_none)
    """99.9 % quantile of the same."""
    remarks: tuple[str, ...] = Field(default=(), exclude_if=is_empty)
    """How the prompts were asked, and what they do not prove: a sentence each."""


class Alternative(Frozen):
    """The same adapter merged into the base in its other weights, for comparison; it is not published."""

    base_quantization: BaseQuantization
    behaviour: tuple[BehaviourCheck, ...]


class Way(Frozen):
    """One of the two merges of a comparison, beside one of the two references."""

    base_quantization: BaseQuantization
    published: bool
    check: BehaviourCheck


class CombinedAdapter(Frozen):
    """One of several adapters that were combined into one, as it was fetched."""

    adapter: LocationField
    adapter_digest: Sha256
    weight: float


class ParityReport(Frozen):
    """The evidence that the merged checkpoint computes what base + adapter computes."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    request_id: str
    merge_key: Sha256
    base: LocationField
    adapter: LocationField | None = Field(default=None, exclude_if=is_none)
    """None where several were combined."""
    adapters: tuple[CombinedAdapter, ...] | None = Field(default=None, exclude_if=is_none)
    combination: Combination | None = Field(default=None, exclude_if=is_none)
    base_quantization: BaseQuantization
    level: Literal["full", "arithmetic"]
    thresholds: Thresholds
    passed: bool
    failures: tuple[str, ...]
    """One sentence for each reason it did not pass; names the tensor or the figure."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=is_empty)
    """One sentence for each thing that decides nothing and that a person should know before the release is used."""
    kept: KeptWeights | None = Field(default=None, exclude_if=is_none)
    """What is kept in more bits than the form of the release has; None where the request does not ask for that."""
    tensors: tuple[TensorCheck, ...]
    behaviour: tuple[BehaviourCheck, ...] = ()
    alternative: Alternative | None = Field(default=None, exclude_if=is_none)
    """Where the request asks to compare."""

    @property
    def ways(self) -> tuple[Way, ...]:
        """The rows of a comparison: by reference, this release and then the alternative; none without one."""
        if self.alternative is None:
            return ()
        merges = (
            (True, self.base_quantization, self.behaviour),
            (False, self.alternative.base_quantization, self.alternative.behaviour),
        )
        rows = (
            Way(base_quantization=quantization, published=published, check=check)
            for published, quantization, checks in merges
            for check in checks
        )
        return tuple(sorted(rows, key=lambda row: row.check.reference))


class ParitySummary(Frozen):
    """The figures of a parity report that go into the manifest."""

    level: Literal["full", "arithmetic"]
    num_tensors: int
    num_changed_tensors: int
    rounding_excess: float
    min_survival: float | None
    mean_kl: float | None
    top1_agreement: float | None
    kl_p999: float | None = Field(default=None, exclude_if=is_none)
    """This and the rest as in `BehaviourCheck`; None at level `arithmetic` and in manifests of earlier versions."""
    adapter_kl: float | None = Field(default=None, exclude_if=is_none)
    lost_share: float | None = Field(default=None, exclude_if=is_none)
    proves_adapter: bool | None = Field(default=None, exclude_if=is_none)
    num_positions: int | None = Field(default=None, exclude_if=is_none)
