"""How far two models are apart: their logits after the same positions of the same text.

The change of the probability of the token that comes next is the measure of llama.cpp's perplexity tool (its
`tools/perplexity/README.md`: mean and RMS of delta p), which people know from reports on quantized models.

Shape suffixes: T positions, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

NEAR_TIE_MARGIN = 0.25
"""The reference is undecided where its two highest logits are nearer to each other than this: rounding alone may
exchange them (docs/decisions/0003-behavioural-parity.md)."""

_POSITIONS_AT_ONCE = 16
"""Positions whose distributions are held in float64 at the same time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Sums and values of positions, so that the figures of many texts add up; properties are of all positions."""

    num_positions: int
    num_near_ties: int
    num_disagreements: int
    """Positions with another most likely token, where the reference is decided."""
    max_abs_difference: float
    sum_abs_difference: float
    """Of logits: mean over the vocabulary, sum over positions."""
    kl_T: torch.Tensor
    """KL(reference || other), nats, float64."""
    delta_p_T: torch.Tensor
    """Probability of the token that comes next by the other model, less that by the reference; float64."""
    sum_reference_nll: float
    sum_other_nll: float

    @property
    def mean_abs_difference(self) -> float:
        """Mean difference of a logit."""
        return self.sum_abs_difference / self.num_positions

    @property
    def mean_kl(self) -> float:
        """KL(reference || other) in nats."""
        return float(self.kl_T.mean())

    @property
    def kl_p999(self) -> float:
        """99.9 % quantile of KL(reference || other) in nats."""
        return _quantile(self.kl_T, 0.999)

    @property
    def mean_delta_p(self) -> float:
        """Mean change of the probability of the token that comes next."""
        return float(self.delta_p_T.mean())

    @property
    def rms_delta_p(self) -> float:
        """Root of the mean square of the change of that probability."""
        return float(self.delta_p_T.square().mean().sqrt())

    @property
    def delta_p_p001(self) -> float:
        """0.1 % quantile of the change of that probability."""
        return _quantile(self.delta_p_T, 0.001)

    @property
    def delta_p_p999(self) -> float:
        """99.9 % quantile of the change of that probability."""
        return _quantile(self.delta_p_T, 0.999)

    @property
    def top1_agreement(self) -> float:
        """Share of positions with the same most likely token, among those where the reference is decided; 1 if none."""
        num_decided = self.num_positions - self.num_near_ties
        return 1 - self.num_disagreements / num_decided if num_decided else 1.0

    @property
    def reference_nll(self) -> float:
        """Negative log likelihood per token (nats) by the reference."""
        return self.sum_reference_nll / self.num_positions

    @property
    def other_nll(self) -> float:
        """Negative log likelihood per token (nats) by the other model."""
        return self.sum_other_nll / self.num_positions


def compare_logits(reference_TV: torch.Tensor, other_TV: torch.Tensor, target_T: torch.Tensor) -> Divergence:
    """Compare two models after the same positions.

    Args:
        reference_TV: logits of the reference, float32, finite, on the CPU.
        other_TV: logits of the other model.
        target_T: the token that follows each position.

    Returns:
        Figures computed in float64, a few positions at a time.
    """
    parts = (tensor.split(_POSITIONS_AT_ONCE) for tensor in (reference_TV, other_TV, target_T))
    return total(_compare(*part) for part in zip(*parts, strict=True))


def total(divergences: Iterable[Divergence]) -> Divergence:
    """Return the figures of several texts together."""
    each = list(divergences)
    return Divergence(
        num_positions=sum(d.num_positions for d in each),
        num_near_ties=sum(d.num_near_ties for d in each),
        num_disagreements=sum(d.num_disagreements for d in each),
        max_abs_difference=max(d.max_abs_difference for d in each),
        sum_abs_difference=sum(d.sum_abs_difference for d in each),
        kl_T=torch.cat([d.kl_T for d in each]),
        delta_p_T=torch.cat([d.delta_p_T for d in each]),
        sum_reference_nll=sum(d.sum_reference_nll for d in each),
        sum_other_nll=sum(d.sum_other_nll for d in each),
    )


def working_bytes(vocab_size: int) -> int:
    """Return the memory `compare_logits` takes beside its arguments: about eight tensors in float64."""
    return 8 * 8 * vocab_size * _POSITIONS_AT_ONCE


def _compare(reference_TV: torch.Tensor, other_TV: torch.Tensor, target_T: torch.Tensor) -> Divergence:
    difference_TV = (reference_TV - other_TV).abs_()
    best = reference_TV.topk(2, dim=-1)
    decided_T = best.values[:, 0] - best.values[:, 1] >= NEAR_TIE_MARGIN
    differs_T = other_TV.argmax(dim=-1) != best.indices[:, 0]
    log_p_TV = reference_TV.double().log_softmax(dim=-1)
    log_q_TV = other_TV.double().log_softmax(dim=-1)
    target_T1 = target_T.unsqueeze(1)
    log_p_T1, log_q_T1 = log_p_TV.gather(1, target_T1), log_q_TV.gather(1, target_T1)
    return Divergence(
        num_positions=len(target_T),
        num_near_ties=int((~decided_T).sum()),
        num_disagreements=int((differs_T & decided_T).sum()),
        max_abs_difference=float(difference_TV.max()),
        sum_abs_difference=float(difference_TV.mean(dim=-1).sum()),
        sum_reference_nll=-float(log_p_T1.sum()),
        sum_other_nll=-float(log_q_T1.sum()),
        kl_T=(log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1),
        delta_p_T=(log_q_T1.exp() - log_p_T1.exp()).squeeze(1),
    )


def _quantile(values_T: torch.Tensor, share: float) -> float:
    return float(values_T.quantile(share))
