"""What the Hopper kernels share: matrices in shared memory, their products, decays in a chunk."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
COARSE, FINE, SEEN, LEFT, BETA = range(5)  # the rows of `rows`


def along(x: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """A number a row (axis 0) or a column (axis 1), over a whole matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def between(rows: Any, size: int, *, reverse: bool = False) -> jax.Array:
    """e^(G_i - G_j) [C, C], or e^(G_j - G_i), which may overflow where nobody may look.

    Args:
      rows: in shared memory, [ROWS, C].
      size: C.
      reverse: the second.
    """
    shape = size, size

    def over(part: int) -> jax.Array:
        i = along(plgpu.load(rows.at[part], layout=BY_ROW), shape, 0)
        j = along(plgpu.load(rows.at[part], layout=BY_COLUMN), shape, 1)
        return j - i if reverse else i - j

    return jnp.exp(over(COARSE) + over(FINE))
