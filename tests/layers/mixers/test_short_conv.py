"""The short convolution as a layer: its formula, its names, and stepping by its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.policy import Policy
from effjax.core.trees import count
from effjax.layers.mixers.short_conv import ShortConv


def make(shape=(3,), axes=('mlp',), policy=None, **kw):
    ctx = Context(width=8, policy=policy or Policy())
    return ShortConv(ctx, shape, axes, rngs=nnx.Rngs(0), **kw)


def test_its_formula_and_parameters():
    conv = make(bias=True, activation=jax.nn.silu)
    x = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
    w, bias = np.asarray(conv.kernel[...]), np.asarray(conv.bias[...])
    for c in range(3):
        summed = np.stack([np.convolve(row, w[::-1, c])[:7] for row in x[..., c]]) + bias[c]
        expected = summed / (1 + np.exp(-summed))
        np.testing.assert_allclose(conv(x)[0][..., c], expected, atol=1e-6)
    params = nnx.to_pure_dict(nnx.state(conv, nnx.Param))
    assert conv.params == count(params) == 15
    meta = metadata(nnx.state(conv, nnx.Param))
    assert meta['kernel'].axes == ('conv', 'mlp') and meta['bias'].no_decay
    assert np.abs(w).max() <= 0.5 and np.abs(w).max() > 0.25


def test_steps_equal_the_whole():
    conv = make((2, 3), ('heads', 'head_dim'), policy=Policy(compute='bfloat16'))
    x = jax.random.normal(jax.random.key(0), (2, 6, 2, 3)).astype(jnp.bfloat16)
    whole, last = conv(x)
    memory = conv.memory(2, jnp.bfloat16)
    steps = []
    for t in range(6):
        y, memory = conv(x[:, t : t + 1], None, memory)
        steps.append(y)
    assert whole.dtype == jnp.bfloat16
    np.testing.assert_array_equal(jnp.concatenate(steps, axis=1), whole)
    np.testing.assert_array_equal(memory, last)


def test_needs_a_tap():
    with pytest.raises(ValueError, match='at least one tap, not 0'):
        make(taps=0)
