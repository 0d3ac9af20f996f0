"""What a reference answered, and what it says about a merged checkpoint: figures of all texts, as a check."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from jobs.parity_policy import Thresholds
from jobs.parity_report import BehaviourCheck, HeldOutCheck, PromptCheck
from workers.parity.divergence import NEAR_TIE_MARGIN, Divergence, total
from workers.parity.effect import effect_remarks, proves_adapter
from workers.parity.prompts import Prompts
from workers.parity.references import Reference
from workers.parity.texts import Text


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What one reference said."""

    reference: Reference
    texts: tuple[Text, ...]
    """Prompts with its continuations, then held-out texts."""
    effects: tuple[Divergence, ...]
    """From it to its base without the adapter, by text."""
    roundings: tuple[Divergence, ...]
    """From it to itself, merged and rounded, by prompt; only of the one that gates."""
    strangers: frozenset[str]
    """Names of tensors that the base stores and its model does not take."""


def summarize_answers(
    prompts: Prompts,
    answers: Answers,
    divergences: Sequence[Divergence],
    merged: Sequence[tuple[int, ...]],
    *,
    remarks: tuple[str, ...],
    thresholds: Thresholds,
    dtype: torch.dtype,
) -> BehaviourCheck:
    """Return the check of a merged checkpoint against one reference.

    Args:
        prompts: what was asked.
        answers: of the reference.
        divergences: from it to the merged checkpoint, by text.
        merged: the merged checkpoint's own continuations, by prompt.
        remarks: on how it was asked.
        thresholds: of the request: they decide what the check proves.
        dtype: of the merged checkpoint.
    """
    num_prompts = len(prompts.token_ids)
    checks = tuple(
        PromptCheck(
            prompt=prompt,
            reference_text=prompts.show(text.continuation_ids),
            merged_text=prompts.show(merged_ids),
            num_positions=divergence.num_positions,
            num_near_ties=divergence.num_near_ties,
            max_abs_logit_difference=divergence.max_abs_difference,
            mean_abs_logit_difference=divergence.mean_abs_difference,
            mean_kl=divergence.mean_kl,
            top1_agreement=divergence.top1_agreement,
            reference_nll=divergence.reference_nll,
            merged_nll=divergence.other_nll,
            adapter_kl=effect.mean_kl,
            rms_delta_p=divergence.rms_delta_p,
        )
        for prompt, text, merged_ids, divergence, effect in zip(
            prompts.texts,
            answers.texts[:num_prompts],
            merged,
            divergences[:num_prompts],
            answers.effects[:num_prompts],
            strict=True,
        )
    )
    found, effect = total(divergences[:num_prompts]), total(answers.effects[:num_prompts])
    check = BehaviourCheck(
        reference=answers.reference.words,
        gates=answers.reference.gates,
        prompts=checks,
        max_abs_logit_difference=found.max_abs_difference,
        mean_kl=found.mean_kl,
        adapter_kl=effect.mean_kl,
        top1_agreement=found.top1_agreement,
        near_tie_margin=NEAR_TIE_MARGIN,
        num_positions=found.num_positions,
        num_near_ties=found.num_near_ties,
        reference_nll=found.reference_nll,
        merged_nll=found.other_nll,
        held_out=_summarize_held_out(answers.effects[num_prompts:], divergences[num_prompts:]),
        lost_share=found.mean_kl / effect.mean_kl if effect.mean_kl > 0 else None,
        kl_p999=found.kl_p999,
        mean_delta_p=found.mean_delta_p,
        rms_delta_p=found.rms_delta_p,
        delta_p_p001=found.delta_p_p001,
        delta_p_p999=found.delta_p_p999,
    )
    if not answers.reference.gates:
        return check
    check = check.model_copy(update={"rounding_kl": total(answers.roundings).mean_kl})
    told = (*effect_remarks(check, thresholds, str(dtype).removeprefix("torch.")), *remarks)
    return check.model_copy(update={"proves_adapter": proves_adapter(check, thresholds), "remarks": told})


def _summarize_held_out(effects: Sequence[Divergence], divergences: Sequence[Divergence]) -> HeldOutCheck | None:
    if not divergences:
        return None
    found = total(divergences)
    return HeldOutCheck(
        num_texts=len(divergences),
        num_positions=found.num_positions,
        base_nll=total(effects).other_nll,
        reference_nll=found.reference_nll,
        merged_nll=found.other_nll,
        mean_kl=found.mean_kl,
        top1_agreement=found.top1_agreement,
    )
