"""BaseConv against its formula in numpy, its sizes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.core.trees import count
from effjax.layers.mixers.base_conv import BaseConv


def make(width=6, max_len=24, causal=True, **kw):
    ctx = Context(width=width, max_len=max_len, causal=causal, policy=Policy(), init='lecun')
    return BaseConv(ctx, **kw, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(('conv', 'length'), [(3, 11), (1, 5), (0, 11), (0, 24)])
def test_equals_its_formula(conv, length):
    mixer = make(conv=conv, bias=True)
    mixer.project.bias[...] += 0.3
    x = jax.random.normal(jax.random.key(1), (2, length, 6))
    y = mixer(x, info=SeqInfo.of(2, length))[0]
    wide = np.asarray(x, np.float64)
    if conv:
        taps = np.asarray(mixer.short.kernel[...], np.float64)[::-1]  # the last is of lag 0
        skip, shift = 0.0, np.asarray(mixer.short.bias[...], np.float64)
    else:
        taps = np.asarray(mixer.filter(length, jnp.float32)[:, 0], np.float64)
        skip, shift = 1.0, 0.0
    convolved = skip * wide + shift
    for lag in range(min(len(taps), length)):
        convolved[:, lag:] += taps[lag] * wide[:, : length - lag]
    kernel, bias = (
        np.asarray(a[...], np.float64) for a in (mixer.project.kernel, mixer.project.bias)
    )
    # float32, and a transform of 48 points: 1e-5 of values near 1.
    np.testing.assert_allclose(y, convolved * (wide @ kernel + bias) + wide, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize('conv', [0, 3])
def test_counts_its_parameters(conv):
    mixer = make(conv=conv, bias=bool(conv))
    assert mixer.cost(1, 8).params == count(nnx.state(mixer, nnx.Param))


def test_refusals():
    with pytest.raises(ConfigError, match='base_conv is causal'):
        make(causal=False)
    with pytest.raises(ConfigError, match='base_conv: conv must be at least 0, got -1'):
        make(conv=-1)
    with pytest.raises(ValueError, match='25 tokens, but its filters are built for 24'):
        make(conv=0)(jnp.zeros((1, 25, 6)), info=SeqInfo.of(1, 25))
