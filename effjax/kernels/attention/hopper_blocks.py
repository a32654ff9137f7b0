"""What the Hopper kernels share: a call's facts, blocks in shared memory, scores and their mask.

Lengths are filled up to whole blocks. Scores are kept as `y`, of which the softmax takes
2^(y c - m): c has the scale and the change of base, so that one multiply-add serves each score.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.attention.blocks import TILE
from effjax.kernels.attention.hopper_plan import Mask

ROWS = 64  # of a warpgroup: those of its product instruction
GROUPS = 2  # warpgroups that compute; one more brings in what they need
REGISTERS = 232, 40  # of a thread that computes, and of one that brings in
DOWN, ACROSS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
MASKED = -2e38  # a score that is not allowed, far below LOWEST: its weight is exactly 0
_TRANSFORMS: Any = plgpu.TilingTransform, plgpu.SwizzleTransform  # abstract, as pallas says it
LOWEST = -1e30  # a row's maximum before its first key


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is static about a call of a kernel.

    Attributes:
      mask: who may see whom.
      scale: factor on the scores, more than 0.
      soft_cap: scores become cap * tanh(score / cap), or None.
      segments: documents are told apart by ids.
      share: query heads that share a key-value head.
      staged: as pallas' interpreter needs it, products take nothing from registers, and add to
        nothing there.
      stages: entries of a ring of blocks in shared memory.
      step: tokens of an entry.
    """

    mask: Mask
    scale: float
    soft_cap: float | None
    segments: bool
    share: int
    staged: bool
    stages: int
    step: int

    @property
    def factor(self) -> float:
        """c, of scores as `scores` returns them."""
        return (self.scale if self.soft_cap is None else self.soft_cap) * math.log2(math.e)

    def scores(self, products: jax.Array) -> jax.Array:
        """y of products of queries and keys."""
        if self.soft_cap is None:
            return products
        # tanh by 2^x: the instruction for tanh itself is wrong by up to 5e-4 of its value
        grown = jnp.exp2(products * (2 * math.log2(math.e) * self.scale / self.soft_cap))
        return 1.0 - 2.0 / (grown + 1.0)

    def allowed(
        self, shape: tuple[int, int], query: jax.Array, key: jax.Array, down: int, pattern: Any
    ) -> jax.Array | None:
        """Which pairs of a block the mask allows, or None where it says nothing.

        Args:
          shape: of the block.
          query, key: its first query and key.
          down: the dimension along which queries go.
          pattern: reference to its pattern, for a mask that is no limit of differences.
        """
        if self.mask.spec is not None:
            found = plgpu.load(pattern, layout=plgpu.Layout.WGMMA, optimized=False)
            return found.astype(jnp.int32) != 0

        def index(axis: int) -> jax.Array:
            return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

        said = []
        if self.mask.low is not None or self.mask.high is not None:
            apart = index(down) - index(1 - down) + (query - key)
            said += [] if self.mask.low is None else [apart >= self.mask.low]
            said += [] if self.mask.high is None else [apart <= self.mask.high]
        if self.mask.keys % TILE:
            said.append(index(1 - down) < self.mask.keys - key)
        out = None
        for x in said:
            out = x if out is None else out & x
        return out


def matrix(*shape: int) -> Any:
    """Blocks [..., rows, columns] in shared memory as products read them."""
    tiling, swizzle = _TRANSFORMS
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=(tiling((8, 64)), swizzle(128)))


def spread(x: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    """A vector along an axis of a matrix."""
    return lax.broadcast_in_dim(x, shape, [axis])


def filled_with(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
    """One value everywhere, in a layout."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def products(shape: Any, *pairs: tuple[Any, Any]) -> list[jax.Array]:
    """Products of matrices in shared memory, all under way at once, float32."""

    def multiply(*accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)
        return [accumulator[...] for accumulator in accumulators]

    return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * len(pairs))


def added(facts: Facts, sums: list[jax.Array], *pairs: tuple[Any, Any]) -> list[jax.Array]:
    """Sums in registers, each with a product added to it."""
    if facts.staged:
        new = [products(x.shape, pair)[0] for x, pair in zip(sums, pairs, strict=True)]
        return [x + y for x, y in zip(sums, new, strict=True)]

    def multiply(accumulators):
        for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(multiply)([plgpu.ACC.init(x) for x in sums])


def params() -> plgpu.CompilerParams:
    """How the kernels are compiled."""
    # Layouts are named here: pallas takes long to find them for so many arrays.
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def rem(step: jax.Array, count: int) -> jax.Array:
    """A step's place in its turn of so many."""
    return lax.rem(step, jnp.int32(count))


def drain(steps: jax.Array, stages: int, *free: Any) -> None:
    """Waits until the last entries of rings have been read: no phase of a barrier stays unseen."""

    @pl.loop(jnp.maximum(steps - stages, 0), steps)
    def _(step):
        for barrier in free:
            plgpu.barrier_wait(barrier.at[rem(step, stages)])
