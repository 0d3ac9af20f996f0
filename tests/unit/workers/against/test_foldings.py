"""Scales that tools fold into norms and weights, told apart from what rounding and faults do."""

import math

import pytest
import torch

from workers.against.accounts import Pair
from workers.against.figures import Figures, Scaled
from workers.against.foldings import Changed, changed, explain, layer_of, ratios_of
from workers.against.scales import Marginals, follows, is_scaled, is_spread, matches, spread

RANDOM = torch.Generator().manual_seed(3)
NORM = "model.layers.0.input_layernorm.weight"


def normal(*shape):
    return torch.randn(*shape, generator=RANDOM, dtype=torch.float64)


def scales(size, *, widest=2.0):
    return torch.exp(torch.empty(size, dtype=torch.float64).uniform_(-1, 1, generator=RANDOM) * math.log(widest))


def marginals(release, checkpoint, axis):
    products = (checkpoint * checkpoint, release * checkpoint, release * release)
    return Marginals(*(each.sum(axis) for each in products))


def noisy(weight, share):
    return weight + share * weight.norm() / math.sqrt(weight.numel()) * normal(*weight.shape)


@pytest.mark.parametrize("share", [0.005, 0.03, 0.1, 0.3])
def test_noise_is_no_scaling(share):
    """Of 8 to 2 bits."""
    weight = normal(48, 64)
    other = noisy(weight, share)
    columns, rows = (marginals(weight, other, axis) for axis in (0, 1))
    assert not is_scaled(columns, rows, float((other - weight).square().sum()))


@pytest.mark.parametrize("axis", [0, 1])
def test_scales_of_columns_or_rows_are_found_and_fitted(axis):
    weight = normal(48, 64)
    found = scales(weight.shape[1 - axis])
    scaled = noisy(weight * (found if axis == 0 else found[:, None]), 0.1)
    columns, rows = (marginals(weight, scaled, each) for each in (0, 1))
    assert is_scaled(columns, rows, float((scaled - weight).square().sum()))
    fitted = (columns, rows)[axis].fitted
    assert is_spread(fitted, 0.1, weight.shape[axis])
    assert matches(fitted, found)
    assert not matches(fitted, scales(len(found)))


@pytest.mark.parametrize("widest", [1.03, 1.2, 4.0])
def test_columns_follow_their_norm_however_little_that_was_changed(widest):
    weight, ratio = normal(96, 64), scales(64, widest=widest)
    columns = marginals(weight, noisy(weight * ratio, 0.1), 0)
    assert follows(columns, ratio, 96)
    assert follows(columns, 7 * ratio, 96)  # but for one factor
    assert not follows(columns, scales(64, widest=widest), 96)
    assert not follows(columns, 1 / ratio, 96)
    assert not follows(marginals(weight, noisy(weight, 0.1), 0), ratio, 96)


def test_columns_do_not_follow_one_element():
    """A fault in a norm."""
    weight, ratio = normal(96, 64), torch.ones(64, dtype=torch.float64)
    ratio[7] = 1.5
    assert not follows(marginals(weight, noisy(weight, 0.05), 0), ratio, 96)


def test_spread_is_that_of_most():
    assert spread(torch.tensor([1.0, 1.0, 1.0, 50.0])) == 0
    assert spread(torch.tensor([0.5, 1.0, 1.5])) == pytest.approx(0.5)
    assert spread(torch.zeros(3)) == 0
    assert spread(torch.tensor([0.0, 0.0, 1.0])) == math.inf


def figures(name, *, columns=None, rows=None, norms=(), in_form=True):
    return Figures(
        pair=Pair(release=name, checkpoint=name),
        in_form=in_form,
        num_different=0,
        cast=False,
        error=0.5,
        delta=0.1,
        survival=0.9,
        scaled=Scaled(columns_I=columns, rows_O=rows, norms=tuple(f"0 {norm}" for norm in norms), error=0.1),
    )


def test_rows_and_columns_that_take_each_other_back():
    """Up and down of one layer; those of another do not count."""
    found = scales(32)
    up = figures("model.layers.0.mlp.up_proj.weight", rows=1 / found)
    down = figures("model.layers.0.mlp.down_proj.weight", columns=3 * found)
    elsewhere = figures("model.layers.1.mlp.down_proj.weight", columns=found)
    foldings = explain([up, down, elsewhere], [])
    assert foldings.weights == {
        "model.layers.0.mlp.up_proj.weight": "rows by the columns of model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.down_proj.weight": "columns by the rows of model.layers.0.mlp.up_proj.weight",
    }
    assert foldings.unexplained == {"model.layers.1.mlp.down_proj.weight": "columns"}


def test_small_gains_that_nothing_takes_back_are_left_to_the_error():
    """As new extremes move whole rows of a weight that lies on a grid."""
    foldings = explain([figures("model.layers.0.self_attn.q_proj.weight", rows=scales(64, widest=1.1))], [])
    assert (foldings.weights, foldings.unexplained) == ({}, {})


@pytest.mark.parametrize("gemma", [False, True], ids=["weight", "1 + weight"])
def test_a_norm_of_either_convention(gemma):
    ratio, before = scales(64), normal(64).abs() + 1
    after = (1 + before) / ratio - 1 if gemma else before / ratio
    small = [changed(NORM, before, after)]
    ratios = ratios_of(small)[layer_of(NORM)]
    weight = normal(96, 64)
    columns = marginals(weight, noisy(weight * ratio, 0.1), 0)
    following = [name for name, each in ratios.items() if follows(columns, each, 96)]
    assert f"{int(gemma)} {NORM}" in following
    reader = figures("model.layers.0.self_attn.q_proj.weight", columns=columns.fitted, norms=[NORM])
    foldings = explain([reader], small)
    assert foldings.small == {NORM: "the columns of model.layers.0.self_attn.q_proj.weight"}


def test_biases_beside_a_norm_and_beside_rows():
    ratio, rows = scales(64), scales(32)
    bias, beside = normal(64), normal(32)
    value, output = "model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.o_proj"
    norm_bias = "model.layers.0.input_layernorm.bias"
    small = [
        changed(NORM, torch.ones(64, dtype=torch.float64), 1 / ratio),
        changed(norm_bias, bias, bias / ratio),
        changed(f"{value}.bias", beside, beside * rows),
        changed(f"{output}.bias", beside, beside * scales(32)),
    ]
    weights = [
        figures(f"{value}.weight", columns=ratio, rows=rows, norms=[NORM]),
        figures(f"{output}.weight", columns=1 / rows),
    ]
    foldings = explain(weights, small)
    assert set(foldings.small) == {NORM, norm_bias, f"{value}.bias"}
    assert set(foldings.weights) == {f"{value}.weight", f"{output}.weight"}


def test_ratios_that_are_not_finite_are_none():
    zero = changed("norm.weight", torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert [each.tolist() for each in zero.ratios] == [[2.0, 2.0, 2.0]]
    assert isinstance(zero, Changed)


def test_layers_by_name():
    assert layer_of("model.layers.12.mlp.experts.3.up_proj.weight") == "model.layers.12."
    assert layer_of("model.norm.weight") == ""
