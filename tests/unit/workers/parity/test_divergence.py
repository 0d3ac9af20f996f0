"""KL divergence, agreement and quantiles against float64 by hand."""

import numpy as np
import pytest
import torch

from workers.parity.divergence import NEAR_TIE_MARGIN, compare_logits, total


def logits(num_positions: int, seed: int) -> torch.Tensor:
    return torch.randn(num_positions, 50, generator=torch.Generator().manual_seed(seed)) * 4


def test_figures_are_those_of_torch_in_float64():
    reference, other = logits(40, seed=0), logits(40, seed=1)
    targets = torch.arange(40) % 50
    found = compare_logits(reference, other, targets)
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert found.num_positions == 40
    assert found.mean_kl == pytest.approx(float(kl))
    assert found.reference_nll == pytest.approx(float(torch.nn.functional.nll_loss(p, targets)))
    assert found.other_nll == pytest.approx(float(torch.nn.functional.nll_loss(q, targets)))
    assert found.max_abs_difference == float((reference - other).abs().max())
    assert found.mean_abs_difference == pytest.approx(float((reference - other).abs().mean()))


def test_quantiles_and_the_right_tokens_probability_are_those_of_numpy():
    reference, other = logits(40, seed=0), logits(40, seed=1)
    targets = torch.arange(40) % 50
    found = compare_logits(reference, other, targets)
    p, q = (each.double().softmax(-1).numpy() for each in (reference, other))
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    delta_p = (q - p)[np.arange(40), targets.numpy()]
    assert found.kl_p999 == pytest.approx(np.quantile(kl, 0.999))
    assert found.mean_delta_p == pytest.approx(delta_p.mean())
    assert found.rms_delta_p == pytest.approx(np.sqrt((delta_p**2).mean()))
    assert found.delta_p_p001 == pytest.approx(np.quantile(delta_p, 0.001))
    assert found.delta_p_p999 == pytest.approx(np.quantile(delta_p, 0.999))


def test_equal_logits_do_not_diverge():
    same = logits(3, seed=2)
    found = compare_logits(same, same.clone(), torch.zeros(3, dtype=torch.int64))
    assert (found.mean_kl, found.max_abs_difference, found.top1_agreement) == (0, 0, 1)


def test_adding_a_constant_is_no_divergence_of_the_distribution():
    reference = logits(3, seed=2)
    assert compare_logits(reference, reference + 1, torch.zeros(3, dtype=torch.int64)).mean_kl < 1e-10


def test_near_ties_are_left_out_of_the_agreement():
    reference = torch.tensor([[5.0, 5.0 - NEAR_TIE_MARGIN / 2, 0.0], [5.0, 3.0, 0.0], [5.0, 3.0, 0.0]])
    other = torch.tensor([[0.0, 5.0, 0.0], [5.0, 3.0, 0.0], [3.0, 5.0, 0.0]])
    found = compare_logits(reference, other, torch.zeros(3, dtype=torch.int64))
    assert (found.num_near_ties, found.num_disagreements) == (1, 1)
    assert found.top1_agreement == 0.5


def test_agreement_is_whole_where_everything_is_a_near_tie():
    flat = torch.zeros(2, 3)
    assert compare_logits(flat, flat + torch.eye(3)[:2], torch.zeros(2, dtype=torch.int64)).top1_agreement == 1


def test_texts_add_up():
    reference, other = logits(30, seed=3), logits(30, seed=4)
    targets = torch.arange(30)
    whole = compare_logits(reference, other, targets)
    parts = total(
        [
            compare_logits(reference[:7], other[:7], targets[:7]),
            compare_logits(reference[7:], other[7:], targets[7:]),
        ]
    )
    assert parts.mean_kl == pytest.approx(whole.mean_kl)
    assert parts.kl_p999 == pytest.approx(whole.kl_p999)
    assert parts.rms_delta_p == pytest.approx(whole.rms_delta_p)
    assert parts.num_positions == whole.num_positions
    assert parts.num_disagreements == whole.num_disagreements
    assert parts.max_abs_difference == whole.max_abs_difference
