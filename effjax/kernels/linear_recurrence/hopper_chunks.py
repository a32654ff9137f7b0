"""What the Pallas kernels of `hopper_vector` share that take one chunk of one head at a time.

With D the log-decays of a chunk's tokens [C, K], a chunk is halved again and again, down to single
tokens: at each level the right halves read the left ones through their border, to which every
token has a decay e^X of its own,
    X_i = sum of D from the border to i where i stands right of it, from behind i to it else,
so that no exponent is positive. With z = q right of borders and k left of them, times e^X, the
level's pairs are entries of z z^T, and their gradients come back by one product too. All sums of
log-decays are products of D with matrices of zeros and ones: none is a difference of others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.linear_recurrence.hopper_kernels import COLUMNS, ROWS, along, product
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, PART, Plan

FLOOR = -192.0  # 2 to the power of it is 0 in float32
FIRST = -512.0  # stands for the log-decay of a document's first token, to be told from others
SQUARE = (CHUNK, CHUNK)  # a part of keys has as many columns: one shape for all in registers
WGMMA = plgpu.Layout.WGMMA
_BITS = 1.4426950408889634  # log-decays are to base 2 inside
assert PART == CHUNK


class Place(NamedTuple):
    """Where a block of threads stands."""

    row: Any
    head: Any
    chunk: Any
    group: Any

    def tokens(self, ref: Any, head: Any, columns: Any = slice(None)) -> Any:
        """The chunk's block of [B, N * C, H, K]."""
        return ref.at[self.row, pl.ds(self.chunk * CHUNK, CHUNK), head, columns]

    def own(self, ref: Any, *rest: Any) -> Any:
        """The chunk's block of [B, H, N, ...]."""
        return ref.at[(self.row, self.head, self.chunk, *rest)]


def place(plan: Plan) -> Place:
    """Where this block of threads stands."""
    row, head, chunk = (lax.axis_index(name) for name in ('row', 'head', 'chunk'))
    return Place(row, head, chunk, lax.div(head, jnp.int32(plan.heads // plan.groups)))


class Pairs(NamedTuple):
    """Tokens [C] of a chunk, uint32: i down the rows of a matrix, j along its columns.

    All sets of pairs are spans of j for each i.
    """

    i: jax.Array
    j: jax.Array
    last: Any  # up to which token, from i on, log-decays reach i: 1 its own too, 0 with a bonus

    def span(self, first: Any, count: Any) -> jax.Array:
        """Pairs whose j is one of so many from the first on: one comparison of what may wrap."""
        first, count = (down(x) if jnp.ndim(x) else x for x in (first, count))
        return along(self.j, SQUARE, 1) - first < count

    def right(self, half: Any) -> jax.Array:
        """Which tokens i stand right of a border between halves of so many."""
        return (self.i & half) != 0

    def seen(self) -> jax.Array:
        """Tokens whose log-decays lie between the chunk's begin and what token i reads."""
        return self.span(jnp.uint32(0), self.i + self.last)

    def before(self) -> jax.Array:
        return self.span(jnp.uint32(0), self.i)

    def own(self) -> jax.Array:
        return self.span(self.i, jnp.uint32(1))

    def onward(self) -> jax.Array:
        return self.span(self.i, jnp.uint32(CHUNK))

    def behind(self) -> jax.Array:
        return self.span(self.i + 1, jnp.uint32(CHUNK))

    def across(self, half: Any) -> jax.Array:
        """Pairs that stand on both sides of such a border."""
        return self.span((self.i & (0 - half)) ^ half, half)

    def reach(self, half: Any) -> jax.Array:
        """1 where the log-decay of j lies between token i and its border."""
        begin, end = self.i & (0 - half), self.i | (half - 1)
        right = self.right(half)
        first = jnp.where(right, begin, self.i + 1)
        return number(self.span(first, jnp.where(right, self.i - begin + self.last, end - self.i)))


def pairs_of_chunk(plan: Plan) -> Pairs:
    """Of all tokens."""
    i, j = (
        plgpu.broadcasted_iota(jnp.uint32, (CHUNK,), 0, layout=layout) for layout in (ROWS, COLUMNS)
    )
    return Pairs(i, j, jnp.uint32(not plan.strict))


def firsts(plan: Plan, decay: jax.Array, target: Any) -> Any:
    """What to add to the sums that documents' first tokens read through [C]; None where nothing.

    Where their own decay is not among them it cannot keep the document before away. It is kept in
    shared memory, `target`: in registers it did not outlive the products between on a GPU.
    """
    if not plan.resets:
        return None
    target[...] = jnp.where(jnp.min(decay, axis=1) < FLOOR, FIRST, 0.0)
    return target


def down(x: jax.Array) -> jax.Array:
    """A number a token down the rows of a matrix [C, C]."""
    return along(x, SQUARE, 0)


def number(mask: jax.Array) -> jax.Array:
    """1 where the mask is True, else 0, in float32."""
    return jnp.where(mask, 1.0, 0.0)


def over_levels(plan: Plan, body: Any, carry: Any) -> Any:
    """Calls body(half, carry) for halves of 32 tokens down to 1.

    In a loop: unrolled, what levels share would be kept in more registers than there are.
    """

    def level(_: Any, both: Any) -> Any:
        half, carry = both
        return lax.div(half, jnp.uint32(2)), body(half, carry)

    return lax.fori_loop(0, plan.levels, level, (jnp.uint32(CHUNK // 2), carry))[1]


def read(ref: Any) -> jax.Array:
    """A matrix from shared memory, in float32."""
    return plgpu.load(ref, layout=WGMMA).astype(jnp.float32)


def either(right: jax.Array, q: Any, k: Any, decay: jax.Array) -> jax.Array:
    """Queries or keys times their decays, in bfloat16, of which one instruction takes two."""
    q, k = (plgpu.load(ref, layout=WGMMA) for ref in (q, k))
    of_q, of_k = (down(number(x)).astype(jnp.bfloat16) for x in (right, ~right))
    return (q * of_q + k * of_k) * decay.astype(jnp.bfloat16)


def left(plan: Plan, x: jax.Array, square: Any) -> Any:
    """A matrix as the left side of a product: from registers, or `staged` from shared memory.

    With `resets` always from there: the second product of the same registers found others on a GPU.
    """
    x = x.astype(jnp.bfloat16)
    if not (plan.staged or plan.resets):
        return x
    square[...] = x
    plgpu.commit_smem()
    return square


def bounded(plan: Plan, ref: Any) -> jax.Array:
    """Log-decays from global memory, to base 2, of which products lose nothing that matters."""
    decay = plgpu.load(ref, layout=WGMMA, optimized=False) * _BITS
    return jnp.maximum(decay, FIRST if plan.resets else FLOOR)


def decayed(sums: jax.Array, first: Any, which: Any = None) -> jax.Array:
    """2 to the power of sums [C, C], with what first tokens add to those of some rows."""
    if first is not None:
        first = plgpu.load(first, layout=ROWS)
        sums = sums + down(first if which is None else jnp.where(which, first, 0.0))
    return jnp.exp2(sums)


def keep(parts: list[Any], decay: Any, free: Any, target: Any) -> None:
    """Leaves decays over the chunk [K] in shared memory.

    A product turns them from columns into rows.

    Args:
      parts: the columns of the keys, some at a time.
      decay: log-decays in shared memory, [C, K].
      free: shared memory of the same shape.
      target: in shared memory, [K].
    """
    ones = free.at[:, parts[0]]
    ones[...] = plgpu.layout_cast(jnp.ones(SQUARE, jnp.bfloat16), WGMMA)
    plgpu.commit_smem()
    for part in parts:
        total = product(SQUARE, decay.at[:, part].T, ones)
        target.at[part][...] = jnp.exp2(jnp.sum(total, axis=1) * (1.0 / CHUNK))


def params() -> plgpu.CompilerParams:
    """With layouts named: finding them takes pallas long."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
