"""Running sums of log-decays whose differences are exact, and the decays that they give."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# exp of less is 0 in float32; running sums of less would lose what stands beside it.
_FLOOR = -128.0
_GRID = 1024.0


class Sum(NamedTuple):
    """A running sum in two parts whose differences are exact.

    After strong decays a plain float32 sum is large, and the difference of two of them loses the
    weak decays between. `coarse` holds multiples of 1 / 1024, which add up without rounding.
    """

    coarse: jax.Array
    fine: jax.Array

    def over(self, other: 'Sum') -> jax.Array:
        """Returns self - other."""
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def map(self, f: Callable[[jax.Array], jax.Array]) -> 'Sum':
        """Returns f of both parts."""
        return Sum(f(self.coarse), f(self.fine))

    def exp(self) -> jax.Array:
        """Returns the decay since the sum's start."""
        return jnp.exp(self.coarse + self.fine)


def graded(log_decay: jax.Array) -> Sum:
    """Returns each token's log-decay in the two parts, whose sums of up to 128 are exact."""
    bounded = jnp.maximum(log_decay, _FLOOR)
    coarse = jax.lax.stop_gradient(jnp.round(bounded * _GRID) / _GRID)
    return Sum(coarse, bounded - coarse)


def running(log_decay: jax.Array, axis: int) -> Sum:
    """Returns the running sums along an axis of at most 128 tokens, each with its own decay."""
    return graded(log_decay).map(lambda x: jnp.cumsum(x, axis=axis))


def before(total: Sum, axis: int) -> Sum:
    """Returns the sums strictly before each token."""

    def shift(x: jax.Array) -> jax.Array:
        kept = jax.lax.slice_in_dim(x, 0, x.shape[axis] - 1, axis=axis)
        return jnp.pad(kept, [(1 if i == axis else 0, 0) for i in range(x.ndim)])

    return total.map(shift)


def masked_decay(rows: Sum, columns: Sum, mask: jax.Array) -> jax.Array:
    """Returns e^(rows - columns), 0 where the mask is False."""
    # Masked before the exponential too: it would overflow there, and its slope with it.
    return jnp.where(mask, jnp.exp(jnp.where(mask, rows.over(columns), 0)), 0)
