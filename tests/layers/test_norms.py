"""Norms against their formulas, values and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.core.axes import metadata
from effjax.core.context import Context
from effjax.core.policy import Policy
from effjax.core.registry import lookup
from effjax.layers import norms


def rms(eps, x, scale):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * scale


def layer(eps, x, scale):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, -1, keepdims=True) + eps) * scale


@pytest.mark.parametrize(('ours', 'formula'), [(norms.rms_norm, rms), (norms.layer_norm, layer)])
def test_values_and_gradients(ours, formula):
    x = 3 * jax.random.normal(jax.random.key(0), (2, 5, 16)) + 1
    scale = jax.random.normal(jax.random.key(1), (16,))
    weight = jnp.sin(jnp.arange(16.0))

    def run(f, x, scale):
        return jax.value_and_grad(lambda x, s: jnp.sum(jnp.sin(f(1e-3, x, s)) * weight), (0, 1))(
            x, scale
        )

    chex.assert_trees_all_close(run(ours, x, scale), run(formula, x, scale), rtol=1e-4, atol=1e-5)
    hessian = jax.grad(lambda x: jnp.sum(run(ours, x, scale)[1][0] ** 2))
    expected = jax.grad(lambda x: jnp.sum(run(formula, x, scale)[1][0] ** 2))
    np.testing.assert_allclose(hessian(x), expected(x), rtol=1e-3, atol=1e-4)
    # 16 bits in and out, statistics in float32: one rounding of the result, 8 bits.
    half = ours(1e-3, x.astype(jnp.bfloat16), scale)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(np.float32), formula(1e-3, x, scale), rtol=3e-2, atol=0.03
    )


@pytest.mark.parametrize('ours', [norms.rms_norm, norms.layer_norm])
def test_keeps_no_float32_copy_of_its_input(ours):
    """What waits for the backward pass is the 16-bit input and at most two numbers a row."""
    x, scale = jnp.ones((4, 64, 32), jnp.bfloat16), jnp.ones(32)
    _, pull = jax.vjp(lambda x: ours(1e-6, x, scale), x)
    kept = [a for a in jax.tree.leaves(pull) if a.size >= x.size]
    assert [a.dtype for a in kept] == [jnp.bfloat16]


def test_registry_and_metadata():
    context = Context(width=8, policy=Policy(), bias=True)
    for kind, names in (('rmsnorm', {'scale'}), ('layernorm', {'scale', 'bias'})):
        norm = lookup(norms.NORMS, kind, 'norm')(context, rngs=nnx.Rngs(0))
        meta = metadata(nnx.state(norm, nnx.Param))
        assert set(meta) == names
        assert all(m.axes == ('embed',) and m.no_decay for m in meta.values())
        y = norm(jax.random.normal(jax.random.key(0), (3, 8)))
        np.testing.assert_allclose(jnp.mean(y**2, -1), 1, rtol=1e-3)
    head = norms.RMSNorm(context, 4, 'head_dim', eps=0.1, rngs=nnx.Rngs(0))
    assert head.scale.shape == (4,)
