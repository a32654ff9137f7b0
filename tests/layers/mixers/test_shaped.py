"""Shaped attention against its formula, a matrix for each head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.context import Context
from effjax.core.info import SeqInfo
from effjax.core.policy import Policy
from effjax.layers.mixers.shaped import ShapedAttention

WIDTH, LENGTH, HEADS = 12, 9, 3


def make(causal=True, **kw):
    ctx = Context(width=WIDTH, policy=Policy(), causal=causal, max_len=16)
    return ShapedAttention(ctx, heads=HEADS, rngs=nnx.Rngs(0), **kw)


def inputs():
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]] * 2, np.int32)
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
    return x, SeqInfo(SeqInfo.of(2, LENGTH).positions, jnp.asarray(ids)), ids


@pytest.mark.parametrize('values', [False, True])
@pytest.mark.parametrize('causal', [True, False])
def test_starts_as_the_identity(causal, values):
    mixer = make(causal, values=values)
    x, _, _ = inputs()
    y = mixer(x, info=SeqInfo.of(2, LENGTH))[0]
    # Softmax of zeros against a running mean: two sums of the same numbers.
    np.testing.assert_allclose(y, x, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_against_its_formula(causal):
    mixer = make(causal)
    mixer.query.kernel[...] = jax.random.normal(jax.random.key(2), mixer.query.kernel.shape)
    gains = {'alpha': 0.5, 'beta': 2.0, 'gamma': 1.5}
    for i, (name, value) in enumerate(gains.items()):
        getattr(mixer, name)[...] = value + i * jnp.arange(HEADS)
    x, info, ids = inputs()
    allowed = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, :, None]
    if causal:
        allowed &= np.tri(LENGTH, dtype=bool)
    q, k = (np.einsum('btd,dhk->bthk', x, p.kernel[...]) for p in (mixer.query, mixer.key))
    s = np.einsum('bthk,bshk->bhts', q, k) / np.sqrt(WIDTH // HEADS)
    s = np.where(allowed[:, None], s, -1e30)
    a = np.exp(s - s.max(-1, keepdims=True)) * allowed[:, None]
    a /= np.maximum(a.sum(-1, keepdims=True), 1e-30)
    c = allowed / np.maximum(allowed.sum(-1, keepdims=True), 1)
    gain = lambda name: np.asarray(getattr(mixer, name)[...])[:, None, None]  # noqa: E731
    matrix = gain('alpha') * np.eye(LENGTH) + gain('beta') * a - gain('gamma') * c[:, None]
    v = np.asarray(x).reshape(2, LENGTH, HEADS, -1)
    expected = np.einsum('bhts,bshk->bthk', matrix, v).reshape(x.shape)
    expected[ids == 0] = 0
    np.testing.assert_allclose(mixer(x, info=info)[0], expected, atol=2e-5)
