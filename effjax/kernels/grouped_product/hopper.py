"""The grouped product on Hopper GPUs: a block of threads has some rows of one group, or of dw.

The rows behind the groups count as a group of their own, whose outputs are written as 0. What has
rows of two groups is no block's: a group's last block writes only its own rows.
"""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.devices import refuse_hopper
from effjax.kernels.grouped_product import cost
from effjax.kernels.grouped_product.cost import ROWS, SIDE, UNIT
from effjax.kernels.grouped_product.xla import places


def refuse(x: Any, w: Any) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      x: rows [M, K], or their shape and dtype.
      w: matrices [E, K, N], alike.
    """
    why = refuse_hopper()
    if why:
        return why
    if x.dtype != jnp.bfloat16:
        return f'it takes bfloat16, not {x.dtype.name}'
    if w.shape[1] % SIDE or w.shape[2] % SIDE or not w.shape[1] or not w.shape[2]:
        return f'it takes sides of multiples of {SIDE}, not {w.shape[1]} and {w.shape[2]}'
    if x.shape[0] < ROWS:
        return f'{x.shape[0]} rows are fewer than the {ROWS} of one block'
    return None


@jax.custom_vjp
def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns y [M, N]; see `op.grouped_product`."""
    return _rows(x_MK, w_EKN, sizes_E, along=0)


def _forward(x, w, sizes):
    return _rows(x, w, sizes, along=0), (x, w, sizes)


def _backward(kept, dy):
    from effjax.kernels.grouped_product import hopper_kernels  # Pallas takes long to import

    x, w, sizes = kept
    begin = jnp.cumsum(sizes) - sizes
    dw = hopper_kernels.matrices(_filled(x), _filled(dy), jnp.stack([begin, sizes]))
    return _rows(dy, w, sizes, along=1), dw, None


product.defvjp(_forward, _backward)


def _rows(x: jax.Array, w: jax.Array, sizes: jax.Array, *, along: int) -> jax.Array:
    """x times w over dimension `along` of each matrix."""
    from effjax.kernels.grouped_product import hopper_kernels

    rows, x = x.shape[0], _filled(x)
    behind = x.shape[0] - jnp.sum(sizes, keepdims=True)
    count = cost.hopper_blocks(x.shape[0], w.shape[0])
    found = places(jnp.concatenate([sizes, behind]), ROWS, count, UNIT)
    return hopper_kernels.rows(x, w, jnp.stack(found), along)[:rows]


def _filled(x: jax.Array) -> jax.Array:
    """Rows in whole units."""
    return jnp.pad(x, ((0, -x.shape[0] % UNIT), (0, 0)))
