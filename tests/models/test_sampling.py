"""Sampling: what each rule keeps, and that draws follow the kept probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.errors import ConfigError
from effjax.models.decode import Sampling, filtered, sample

LOGITS = jnp.log(jnp.array([[0.5, 0.25, 0.15, 0.1], [0.1, 0.15, 0.25, 0.5]]))


def kept(logits):
    return np.isfinite(np.asarray(logits)).tolist()


def test_greedy_takes_the_most_likely():
    assert sample(LOGITS, jax.random.key(0), Sampling()).tolist() == [0, 3]


def test_top_k_keeps_k():
    assert kept(filtered(LOGITS, 2, 1.0)) == [
        [True, True, False, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize(
    ('top_p', 'expected'), [(0.4, [1, 0, 0, 0]), (0.5, [1, 0, 0, 0]), (0.6, [1, 1, 0, 0]),
                            (0.91, [1, 1, 1, 1])]
)  # fmt: skip
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    assert kept(filtered(LOGITS[:1], 0, top_p))[0] == [bool(e) for e in expected]


def test_top_p_counts_what_top_k_left():
    # Of the two that top-k leaves, the first holds 2/3.
    assert kept(filtered(LOGITS[:1], 2, 0.6))[0] == [True, False, False, False]


def test_draws_follow_the_probabilities():
    rows = jnp.broadcast_to(LOGITS[:1], (4000, 4))
    drawn = sample(rows, jax.random.key(1), Sampling(temperature=1.0, top_k=3))
    share = np.bincount(np.asarray(drawn), minlength=4) / 4000
    # 4 standard deviations of a share of 4000 draws are at most 0.032.
    np.testing.assert_allclose(share, np.array([0.5, 0.25, 0.15, 0]) / 0.9, atol=0.032)


def test_low_temperature_is_greedy():
    drawn = sample(LOGITS, jax.random.key(2), Sampling(temperature=1e-3))
    assert drawn.tolist() == [0, 3]


@pytest.mark.parametrize(
    ('bad', 'word'),
    [({'temperature': -1.0}, 'temperature'), ({'top_k': -1}, 'top_k'), ({'top_p': 0.0}, 'top_p')],
)
def test_values_out_of_range_are_refused(bad, word):
    with pytest.raises(ConfigError, match=word):
        Sampling(**bad)
