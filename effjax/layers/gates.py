"""Products with a gate, plain or of a norm, computed in float32 and rounded once.

Each has its own gradient rule, which keeps what goes in and computes the rest again: one fused
pass, and about half of what automatic differentiation would keep for a scanned body.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.layers.norms import norm_gradients

Activation = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_product(activation: Activation, gate_F: jax.Array, up_F: jax.Array) -> jax.Array:
    """Returns `activation(gate) * up` in the dtype of `up`."""
    wide = jnp.promote_types(up_F.dtype, jnp.float32)
    return (activation(gate_F.astype(wide)) * up_F.astype(wide)).astype(up_F.dtype)


def _product_forward(activation, gate_F, up_F):
    return gated_product(activation, gate_F, up_F), (gate_F, up_F)


def _product_backward(activation, residuals, d):
    gate_F, up_F = residuals
    wide = jnp.promote_types(up_F.dtype, jnp.float32)
    d = d.astype(wide)
    value, pull = jax.vjp(activation, gate_F.astype(wide))
    (d_gate,) = pull(d * up_F.astype(wide))
    return d_gate.astype(gate_F.dtype), (d * value).astype(up_F.dtype)


gated_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated_rms_norm(eps: float, x: jax.Array, gate: jax.Array, scale: jax.Array) -> jax.Array:
    """`silu(gate) * x / rms(x) * scale`, as RetNet, GLA and Gated DeltaNet end.

    Args:
      eps: added to the mean square.
      x: [..., D], normalised over D.
      gate: like x.
      scale: [D].

    Returns:
      [..., D] in the dtype of x.
    """
    return _norm_forward(eps, x, gate, scale)[0]


def _norm_forward(eps, x, gate, scale):
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(_wide(x)), axis=-1, keepdims=True) + eps)
    y = jax.nn.silu(_wide(gate)) * (_wide(x) * inverse * _wide(scale))
    return y.astype(x.dtype), (x, gate, scale, inverse)


def _norm_backward(eps, residuals, dy):
    x, gate, scale, inverse = residuals
    unit, dy = _wide(x) * inverse, _wide(dy)
    value, pull = jax.vjp(jax.nn.silu, _wide(gate))
    (d_gate,) = pull(dy * unit * _wide(scale))
    dx, d_scale = norm_gradients(unit, x, scale, inverse, dy * value)
    return dx, d_gate.astype(gate.dtype), d_scale


gated_rms_norm.defvjp(_norm_forward, _norm_backward)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
