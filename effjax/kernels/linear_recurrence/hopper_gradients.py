"""The Pallas kernel of `hopper_vector` that takes both walks' states, all chunks at once.

A block of threads has one chunk of one head and a part of the keys' columns, which do not meet.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_chunks import (
    FLOOR,
    SQUARE,
    WGMMA,
    Pairs,
    bounded,
    decayed,
    down,
    either,
    firsts,
    left,
    number,
    over_levels,
    pairs_of_chunk,
    params,
    place,
    read,
)
from effjax.kernels.linear_recurrence.hopper_kernels import COLUMNS, along, product
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, PART, Plan

_BLOCKS = _V, _DO, _STATE, _DSTATE = range(4)


def run(plan: Plan, q, k, log_decay, kept, v, do, states, dstates) -> tuple[jax.Array, ...]:
    """The gradients of queries, keys and log-decays, from the states of both walks.

    Args:
      plan: of the call.
      q, k: bfloat16 [B, N * C, G, K].
      log_decay: float32 [B, N * C, H, K].
      kept: decays over chunks, float32 [B, H, N, K].
      v, do: values and gradients of outputs, bfloat16 [B, N * C, H, V].
      states: before each chunk, bfloat16 [B, H, N, K, V].
      dstates: gradients of the states behind each chunk, alike.

    Returns:
      (dq, dk, dlog_decay) [B, N * C, H, K]; the first two in bfloat16, the last in float32.
    """
    batch, length, heads, width = log_decay.shape
    shape = jax.ShapeDtypeStruct
    block = plan.value_block
    keys = shape(log_decay.shape, q.dtype)
    shared = _Gradients(
        q=matrix(CHUNK, PART),
        k=matrix(CHUNK, PART),
        decay=matrix(CHUNK, PART),
        z=matrix(CHUNK, PART),
        square=matrix(*SQUARE),
        kept=plgpu.SMEM((PART,), jnp.float32),
        known=plgpu.SMEM((PART,), jnp.float32),
        first=plgpu.SMEM((CHUNK,), jnp.float32),
        blocks=[matrix(CHUNK, block) for _ in _BLOCKS],
        keys=plgpu.Barrier(num_arrivals=3),
        arrived=[plgpu.Barrier(num_arrivals=1) for _ in _BLOCKS],
    )
    out = plgpu.kernel(
        functools.partial(_gradients, plan),
        out_type=[keys, keys, shape(log_decay.shape, jnp.float32)],
        scratch_types=[shared],
        grid=(width // PART, length // CHUNK, heads, batch),
        grid_names=('part', 'chunk', 'head', 'row'),
        kernel_name='linear_recurrence_walk_gradients',
        compiler_params=params(),
    )(q, k, log_decay, kept, v, do, states, dstates)
    return tuple(out)


class _Gradients(NamedTuple):
    """Shared memory of the second; `blocks` are of v, do and the states of both walks."""

    q: Any
    k: Any
    decay: Any
    z: Any
    square: Any
    kept: Any
    known: Any
    first: Any
    blocks: Any
    keys: Any
    arrived: Any


def _gradients(
    plan: Plan, q, k, log_decay, kept, v, do, states, dstates, dq, dk, ddecay, shared: _Gradients
) -> None:
    at, part = place(plan), pl.ds(lax.axis_index('part') * PART, PART)
    for source, target in (
        (at.tokens(q, at.group, part), shared.q),
        (at.tokens(k, at.group, part), shared.k),
        (at.own(kept, part), shared.kept),
    ):
        plgpu.copy_gmem_to_smem(source, target, shared.keys)
    sources = [functools.partial(at.tokens, x, at.head) for x in (v, do)]
    sources += [functools.partial(at.own, x, part) for x in (states, dstates)]
    blocks = _Blocks(plan, shared, sources)
    decay = bounded(plan, at.tokens(log_decay, at.head, part))
    first = firsts(plan, decay, shared.first)
    shared.decay[...] = decay.astype(jnp.bfloat16)
    plgpu.commit_smem()

    these = pairs_of_chunk(plan)
    both, own = _of_weights(these, blocks)
    plgpu.barrier_wait(shared.keys)
    levels = _through_levels(plan, these, both, own, first, shared)

    def put(x: jax.Array, target: Any, free: Any) -> None:
        free[...] = x.astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(free, at.tokens(target, at.head, part))

    def through(reach: jax.Array, first: Any, x: jax.Array) -> jax.Array:
        reach = left(plan, number(reach), shared.square)
        return x * decayed(product(SQUARE, reach, shared.decay), first)

    of_q = through(these.seen(), first, _against(blocks, _DO, _STATE))
    wide, all_q = read(shared.q), levels.dq + of_q
    put(all_q, dq, shared.q)
    found = _summed(these.onward(), levels.flow + of_q * wide, shared)
    if plan.strict:  # what a token reads does not flow through its own decay
        found = found - all_q * wide
    of_k = through(these.behind(), None, _against(blocks, _V, _DSTATE))
    flow = of_k * read(shared.k)
    put(levels.dk + of_k, dk, shared.k)
    found = found + _summed(these.before(), flow, shared)
    _know(blocks)
    ends = [along(plgpu.load(x, layout=COLUMNS), SQUARE, 1) for x in (shared.kept, shared.known)]
    found = jnp.where(read(shared.decay) > FLOOR, found + ends[0] * ends[1], 0.0)
    at.tokens(ddecay, at.head, part)[...] = found
    plgpu.wait_smem_to_gmem(0)


class _Blocks:
    """Blocks of columns of values and states, which come into shared memory as they are needed."""

    def __init__(self, plan: Plan, shared: _Gradients, sources: list[Any]):
        self.plan, self.shared, self.sources = plan, shared, sources
        self.there = [0 for _ in _BLOCKS]
        self.waited = [False for _ in _BLOCKS]
        for which in _BLOCKS:
            self._copy(which, 0)

    def _copy(self, which: int, block: int) -> None:
        columns = pl.ds(block * self.plan.value_block, self.plan.value_block)
        source, shared = self.sources[which](columns), self.shared
        plgpu.copy_gmem_to_smem(source, shared.blocks[which], shared.arrived[which])

    def get(self, block: int, *which: int) -> list[Any]:
        """References to blocks in shared memory, once no product reads what was there."""
        absent = [x for x in which if self.there[x] != block]
        if absent:
            plgpu.commit_smem()  # all warps are through with what was there
        for x in absent:
            self._copy(x, block)
            self.there[x], self.waited[x] = block, False
        for x in which:
            if not self.waited[x]:
                plgpu.barrier_wait(self.shared.arrived[x])
                self.waited[x] = True
        return [self.shared.blocks[x] for x in which]

    def __len__(self) -> int:
        return self.plan.value_blocks


def _of_weights(these: Pairs, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """Gradients of weights: of each pair in both of its places [C, C], of each token's own [C]."""

    def multiply(above, below):
        for block in range(len(blocks)):
            v, do = blocks.get(block, _V, _DO)
            plgpu.wgmma(below, do, v.T)
            plgpu.wgmma(above, v, do.T)
            plgpu.wgmma_wait(0)
        return above[...], below[...]

    accumulator = plgpu.ACC(SQUARE, jnp.float32)
    above, below = pl.run_scoped(multiply, accumulator, accumulator)
    own = jnp.sum(jnp.where(these.own(), below, 0.0), axis=1)
    return jnp.where(these.before(), below, above).astype(jnp.bfloat16), own


class _Levels(NamedTuple):
    """Gradients through weights, and what of the loss flows through the tokens' log-decays."""

    dq: jax.Array
    dk: jax.Array
    flow: jax.Array


def _through_levels(plan: Plan, these: Pairs, both, own, first, shared: _Gradients) -> _Levels:
    """The gradients of a part of keys [C, part], float32.

    The flow is what passes a token's log-decay less what passes the next one's, where both sides
    of a pair give exactly the same: summed up nothing is left of pairs that do not meet over it.
    """
    own = down(own)

    def level(half: Any, found: _Levels) -> _Levels:
        right = these.right(half)
        reach = left(plan, these.reach(half), shared.square)
        decay = decayed(product(SQUARE, reach, shared.decay), first, right)
        z = either(right, shared.q, shared.k, decay)
        shared.z[...] = z
        plgpu.commit_smem()
        # Where a product is formed a float32 0 is cheaper than one of bfloat16's pairs.
        across = jnp.where(these.across(half), both.astype(jnp.float32), 0.0)
        dz = product(SQUARE, left(plan, across, shared.square), shared.z)
        given, through = decay * dz, z.astype(jnp.float32) * dz
        of_q, of_k = (down(number(x)) for x in (right, ~right))
        return _Levels(
            found.dq + given * of_q,
            found.dk + given * of_k,
            found.flow + through * (of_q - of_k),
        )

    zero = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA)
    if plan.strict:
        return over_levels(plan, level, _Levels(zero, zero, zero))
    return over_levels(plan, level, _Levels(own * read(shared.k), own * read(shared.q), zero))


def _against(blocks: _Blocks, values: int, states: int) -> jax.Array:
    """The product of values and states over all columns [C, part]."""

    def multiply(accumulator):
        for block in range(len(blocks)):
            x, state = blocks.get(block, values, states)
            plgpu.wgmma(accumulator, x, state.T)
            plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(SQUARE, jnp.float32))


def _know(blocks: _Blocks) -> None:
    """Leaves what of the loss flows through the chunk's end [part] in shared memory."""
    known = None
    for block in reversed(range(len(blocks))):
        state, dstate = (plgpu.load(x, layout=WGMMA) for x in blocks.get(block, _STATE, _DSTATE))
        inner = jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
        known = inner if known is None else known + inner
    blocks.shared.known[...] = known


def _summed(which: jax.Array, x: jax.Array, shared: _Gradients) -> jax.Array:
    """Sums of a flow over the tokens that a matrix of pairs tells [C, part]."""
    coarse = x.astype(jnp.bfloat16)  # in two parts of 8 bits: nearly float32
    fine = shared.blocks[_DO].at[:, pl.ds(0, PART)]  # no more needed
    shared.z[...] = coarse
    fine[...] = (x - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    # Never from registers: a left side that two products take from there is not right on a GPU,
    # in the second one some of its rows are what else had been in their registers.
    shared.square[...] = number(which).astype(jnp.bfloat16)
    plgpu.commit_smem()

    def multiply(accumulator):
        plgpu.wgmma(accumulator, shared.square, shared.z)
        plgpu.wgmma(accumulator, shared.square, fine)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(SQUARE, jnp.float32))
