"""Projections: one einsum each, with named axes, an initialiser scheme and an optional bias."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.errors import ConfigError

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def initializer(ctx: Context, fan_in: int, *, residual: bool = False) -> Initializer:
    """Returns the model's initialiser for a projection.

    Schemes (`ctx.init`): 'gpt2' is normal with std 0.02, and 0.02 / sqrt(2 depth) where the
    output is added to the residual stream; 'lecun' is normal with std 1 / sqrt(fan_in).

    Args:
      ctx: the model's context.
      fan_in: number of inputs that an output sums over.
      residual: the output is added to the residual stream.

    Raises:
      ConfigError: unknown scheme.
    """
    if ctx.init == 'gpt2':
        std = 0.02 / (2 * ctx.depth) ** 0.5 if residual else 0.02
    elif ctx.init == 'lecun':
        std = fan_in**-0.5
    else:
        raise ConfigError(f"unknown init {ctx.init!r}; known: 'gpt2', 'lecun'.")
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def identity(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initialises a projection that passes its input on: [n, ...] or [..., n], both sides of n."""
    del key
    size = shape[0] if shape[0] ** 2 == _product(shape) else shape[-1]
    return jnp.eye(size, dtype=dtype).reshape(shape)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Initialises with 0."""
    del key
    return jnp.zeros(shape, dtype)


def _product(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


class Projection(nnx.Module):
    """`einsum(equation, x, kernel) + bias` in the compute dtype.

    Args:
      ctx: the model's context.
      equation: such as '...d,dhk->...hk'; what the kernel adds to the output carries the bias.
      shape: the kernel's shape.
      axes: the kernel's axis names.
      bias: whether there is a bias, starting at 0 and free of weight decay.
      init: the kernel's initialiser.
      units: what each dimension of the kernel counts, where `axes` does not say it.
    """

    def __init__(
        self,
        ctx: Context,
        equation: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        bias: bool,
        init: Initializer,
        units: tuple[str | None, ...] | None = None,
        rngs: nnx.Rngs,
    ):
        dtype = ctx.policy.param_dtype
        self.equation = equation
        self.policy = ctx.policy
        inputs, output = equation.split('->')
        kept = [i for i, letter in enumerate(inputs.split(',')[1]) if letter in output]
        units = axes if units is None else units
        summed = [i for i in range(len(axes)) if i not in kept]
        value = init(rngs.params(), shape, dtype)
        self.kernel = param(value, axes, role='product', inputs=summed, units=units)
        zero = jnp.zeros([shape[i] for i in kept], dtype)
        named = [tuple(names[i] for i in kept) for names in (axes, units)]
        self.bias = (
            param(zero, named[0], no_decay=True, role='bias', units=named[1]) if bias else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the projection of x, which is in the compute dtype."""
        y = jnp.einsum(self.equation, x, self.policy.cast(self.kernel[...]))
        return y if self.bias is None else y + self.policy.cast(self.bias[...])
