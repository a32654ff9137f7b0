"""The gated norm against its formula, values and gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from effjax.layers import gates

EPS = 1e-3


def formula(x, gate, scale):
    return jax.nn.silu(gate) * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + EPS) * scale


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    x, gate = (2 * jax.random.normal(k, (2, 5, 3, 16)) + 0.5 for k in keys[:2])
    return x, gate, jax.random.normal(keys[2], (16,))


def test_values_and_gradients():
    arrays, weight = inputs(), jnp.sin(jnp.arange(16.0))

    def run(f):
        loss = lambda *a: jnp.sum(jnp.sin(f(*a)) * weight)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 2))(*arrays)

    got = run(functools.partial(gates.gated_rms_norm, EPS))
    chex.assert_trees_all_close(got, run(formula), rtol=1e-4, atol=1e-5)


def test_16_bits_are_rounded_once_and_nothing_else_is_kept():
    x, gate, scale = inputs()
    x, gate = x.astype(jnp.bfloat16), gate.astype(jnp.bfloat16)
    y, pull = jax.vjp(lambda x, gate: gates.gated_rms_norm(EPS, x, gate, scale), x, gate)
    wide = formula(x.astype(jnp.float32), gate.astype(jnp.float32), scale)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(np.float32), wide, rtol=2**-8)
    kept = [a for a in jax.tree.leaves(pull) if a.size >= x.size]
    assert [a.dtype for a in kept] == [jnp.bfloat16] * 2
    assert [d.dtype for d in pull(y)] == [jnp.bfloat16] * 2
