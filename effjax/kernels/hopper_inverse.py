"""Inverses of a chunk's unit triangular matrix on Hopper GPUs, in Pallas (Mosaic GPU).

The inverse is formed from blocks of one token by doubling, all blocks side by side:
    [P 0; Q R]^-1 = [P^-1 0; -R^-1 Q P^-1 R^-1].
Every factor is an inverse of a part of the matrix or a part of it, so that nothing grows that
cancels later. Rounded to bfloat16 they would still cost up to 5 % of the result where the matrix is
near that of the delta rule with beta 2 (two keys alike then turn a value over and over), so each is
split into two bfloat16 numbers, whose products leave 1e-4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Room(NamedTuple):
    """Shared memory; each holds a matrix [C, C] in two parts, free for others afterwards."""

    system: Any
    inverse: Any
    between: Any


def indices(size: int) -> list[jax.Array]:
    """Row and column of each element of [C, C]."""
    return [
        plgpu.broadcasted_iota(jnp.int32, (size, size), axis, layout=plgpu.Layout.WGMMA)
        for axis in (0, 1)
    ]


def product(shape: tuple[int, int], *pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of products of pairs of matrices in shared memory, float32."""

    def multiply(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def invert(size: int, system: jax.Array, room: Room) -> jax.Array:
    """(I + A)^-1, [C, C], of what of A stands under the diagonal."""
    i, j = indices(size)
    apart, square = i ^ j, (size, size)

    def beside(half: int) -> jax.Array:
        """Where the blocks Q are."""
        return (i > j) & (apart >= half) & (apart < 2 * half)

    inverse = jnp.where(i == j, 1.0, 0.0) - jnp.where(beside(1), system, 0.0)
    _split(system, room.system)
    half = 2
    while half < size:
        _split(inverse, room.inverse)
        plgpu.commit_smem()
        right = product(square, *_parts(room.system, room.inverse))
        _split(jnp.where(beside(half), right, 0.0), room.between)
        plgpu.commit_smem()
        inverse = inverse - product(square, *_parts(room.inverse, room.between))
        half *= 2
    return inverse


def _split(x: jax.Array, target: Any) -> None:
    """Writes x as the sum of two bfloat16 matrices."""
    high = x.astype(jnp.bfloat16)
    target.at[0][...] = high
    target.at[1][...] = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _parts(a: Any, b: Any) -> list[tuple[Any, Any]]:
    """The pairs of parts whose products matter."""
    return [(a.at[0], b.at[0]), (a.at[0], b.at[1]), (a.at[1], b.at[0])]
