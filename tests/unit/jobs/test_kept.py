"""What people are told of weights that are kept in more bits."""

import pytest

from jobs.kept import KeptWeight, KeptWeights


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([], "0 of 28 weights kept in more bits"),
        (["16bit"], "1 of 28 weights kept in 16 bits"),
        (["8bit", "8bit"], "2 of 28 weights kept in 8 bits"),
        (["16bit", "8bit", "8bit", "16bit", "8bit"], "3 of 28 weights kept in 8 bits and 2 in 16 bits"),
    ],
)
def test_counts(kept, words):
    weights = tuple(KeptWeight(weight=f"layers.{number}.weight", kept_in=keep) for number, keep in enumerate(kept))
    assert KeptWeights(num_weights=28, weights=weights).words == words
