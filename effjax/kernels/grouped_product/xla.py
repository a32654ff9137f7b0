"""The grouped product by XLA.

Two forms:
  ragged: `lax.ragged_dot`, which on TPUs is a kernel of exactly these products. Elsewhere XLA
    expands it into the products of all rows with all groups' matrices.
  blocks: a loop over blocks of rows, none of which has rows of two groups, each with one matrix. A
    group's last block reaches into the next group; what it writes there the next block writes over.
    How many rows the groups have changes no shape: there are as many blocks as any sizes need.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.grouped_product import cost


def form() -> str:
    """Returns 'ragged' or 'blocks' for the platform traced for."""
    return 'ragged' if choice.platform() == 'tpu' else 'blocks'


def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns y [M, N]; see `op.grouped_product`."""
    if form() == 'blocks':
        return _by_blocks(x_MK, w_EKN, sizes_E)
    return masked(jax.lax.ragged_dot, x_MK, w_EKN, sizes_E)


def masked(ragged_dot: Any, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """A product whose rows behind the groups are undefined, there and back: hence both masks."""
    inside = jnp.arange(x.shape[0])[:, None] < jnp.sum(sizes)
    return jnp.where(inside, ragged_dot(jnp.where(inside, x, 0), w, sizes), 0)


@jax.custom_vjp
def _by_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    return _rows(x, w, sizes, along=0)


def _forward(x, w, sizes):
    return _rows(x, w, sizes, along=0), (x, w, sizes)


def _backward(kept, dy):
    x, w, sizes = kept
    return _rows(dy, w, sizes, along=1).astype(x.dtype), _matrices(x, dy, w, sizes), None


_by_blocks.defvjp(_forward, _backward)


def places(
    sizes: jax.Array, size: int, count: int, align: int = 1
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each block: its group, its first row, and how many rows it has of the group [count].

    A group's first block begins where the group does, the next ones behind every `size` rows from
    the multiple of `align` before that on. A block that no group needs has no rows, at the last
    group's end.
    """
    end = jnp.cumsum(sizes)
    begin = end - sizes
    low = begin // align * align
    whole = jnp.where(sizes > 0, (end - low + size - 1) // size, 0)
    last = jnp.cumsum(whole)
    block = jnp.arange(count)
    group = jnp.minimum(jnp.searchsorted(last, block, side='right'), sizes.shape[0] - 1)
    start = low[group] + (block - (last - whole)[group]) * size
    first, stop = (jnp.clip(x, begin[group], end[group]) for x in (start, start + size))
    return group, first, stop - first


def _rows(x: jax.Array, w: jax.Array, sizes: jax.Array, *, along: int) -> jax.Array:
    """x times w over dimension `along` of each matrix: rows' outputs, or their gradients."""
    rows, (groups, *sides) = x.shape[0], w.shape
    size, count = cost.blocks(rows, groups)
    x = jnp.pad(x, ((0, size), (0, 0)))
    y = jnp.zeros((rows + size, sides[1 - along]), x.dtype)

    def block(y: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        group, first, _ = at
        taken = jax.lax.dynamic_slice_in_dim(x, first, size)
        matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        made = jax.lax.dot_general(
            taken, matrix, (((1,), (along,)), ((), ())), preferred_element_type=_wide(x)
        )
        return jax.lax.dynamic_update_slice_in_dim(y, made.astype(y.dtype), first, 0), None

    y = jax.lax.scan(block, y, places(sizes, size, count))[0][:rows]
    return jnp.where(jnp.arange(rows)[:, None] < jnp.sum(sizes), y, 0)


def _matrices(x: jax.Array, dy: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """The gradient of w."""
    size, count = cost.blocks(x.shape[0], w.shape[0])
    x, dy = (jnp.pad(a, ((0, size), (0, 0))) for a in (x, dy))

    def block(dw: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        group, first, own = at
        take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size)
        inside = jnp.arange(size)[:, None] < own
        # Both: what lies behind the groups may be anything, even not finite.
        a, b = (jnp.where(inside, take(a), 0) for a in (x, dy))
        made = jax.lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=_wide(x))
        old = jax.lax.dynamic_index_in_dim(dw, group, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(dw, old + made, group, 0), None

    zero = jnp.zeros(w.shape, _wide(x))
    return jax.lax.scan(block, zero, places(sizes, size, count))[0].astype(w.dtype)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
