"""Norms over the last dimension, statistics in float32, input and output in the compute dtype.

Both have their own gradient rule: what is kept for the backward pass is the input as it came
(16 bits in mixed precision) and one or two float32 numbers a row, never a float32 copy of the
input, which a scanned body would otherwise stack for every layer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context

NORMS = {
    'rmsnorm': 'effjax.layers.norms:RMSNorm',
    'layernorm': 'effjax.layers.norms:LayerNorm',
}


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` (Zhang and Sennrich, arXiv 1910.07467).

    Args:
      ctx: the model's context.
      size: length of the last dimension; None means the model's width.
      axis: its axis name.
      eps: added to the mean square.
    """

    def __init__(
        self,
        ctx: Context,
        size: int | None = None,
        axis: str = 'embed',
        *,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        del rngs
        shape = (ctx.width if size is None else size,)
        self.eps = float(eps)
        scale = jnp.ones(shape, ctx.policy.param_dtype)
        self.scale = param(scale, (axis,), no_decay=True, role='scale')

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x [..., D] normalised, in its own dtype."""
        return rms_norm(self.eps, x, self.scale[...])


class LayerNorm(nnx.Module):
    """`(x - mean) / sqrt(variance + eps) * scale + bias` (Ba et al., arXiv 1607.06450).

    Args:
      ctx: the model's context.
      size: length of the last dimension; None means the model's width.
      axis: its axis name.
      eps: added to the variance.
      bias: whether there is a bias; None asks the model.
    """

    def __init__(
        self,
        ctx: Context,
        size: int | None = None,
        axis: str = 'embed',
        *,
        eps: float = 1e-5,
        bias: bool | None = None,
        rngs: nnx.Rngs,
    ):
        del rngs
        shape = (ctx.width if size is None else size,)
        dtype = ctx.policy.param_dtype
        self.eps = float(eps)
        self.scale = param(jnp.ones(shape, dtype), (axis,), no_decay=True, role='scale')
        with_bias = ctx.bias if bias is None else bias
        zero = jnp.zeros(shape, dtype)
        self.bias = param(zero, (axis,), no_decay=True, role='shift') if with_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x [..., D] normalised, in its own dtype."""
        y = layer_norm(self.eps, x, self.scale[...])
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def rms_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns `x / rms(x) * scale` in the dtype of x; x is [..., D], scale [D]."""
    return _rms_forward(eps, x, scale)[0]


def _rms_forward(eps, x, scale):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x_wide = x.astype(wide)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_wide), axis=-1, keepdims=True) + eps)
    return (x_wide * inverse * scale.astype(wide)).astype(x.dtype), (x, scale, inverse)


def _rms_backward(eps, residuals, dy):
    x, scale, inverse = residuals
    return norm_gradients(x.astype(inverse.dtype) * inverse, x, scale, inverse, dy)


rms_norm.defvjp(_rms_forward, _rms_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def layer_norm(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns x [..., D] with mean 0 and variance 1 over D, times scale [D], in its own dtype."""
    return _layer_forward(eps, x, scale)[0]


def _layer_forward(eps, x, scale):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    mean = jnp.mean(x.astype(wide), axis=-1, keepdims=True)
    centred = x.astype(wide) - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    return (centred * inverse * scale.astype(wide)).astype(x.dtype), (x, scale, inverse, mean)


def _layer_backward(eps, residuals, dy):
    x, scale, inverse, mean = residuals
    unit = (x.astype(inverse.dtype) - mean) * inverse
    dx, dscale = norm_gradients(unit, x, scale, inverse, dy, centre=True)
    return dx, dscale


layer_norm.defvjp(_layer_forward, _layer_backward)


def norm_gradients(unit, x, scale, inverse, dy, centre=False):
    """(dx, dscale) of `unit * scale`, where `unit` is x normalised by `inverse`."""
    dy = dy.astype(inverse.dtype)
    d = dy * scale.astype(inverse.dtype)
    pulled = d - unit * jnp.mean(d * unit, axis=-1, keepdims=True)
    if centre:
        pulled = pulled - jnp.mean(d, axis=-1, keepdims=True)
    dscale = jnp.sum(dy * unit, axis=tuple(range(dy.ndim - 1)))
    return (pulled * inverse).astype(x.dtype), dscale.astype(scale.dtype)
