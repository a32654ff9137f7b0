"""The Pallas kernels of `hopper_vector` that take one chunk of one head, around the walks.

With D the log-decays of a chunk's tokens [C, K], a chunk is halved again and again, down to single
tokens: at each level the right halves read the left ones through their border, to which every
token has a decay e^X of its own,
    X_i = sum of D from the border to i where i stands right of it, from behind i to it else,
so that no exponent is positive. With z = q right of borders and k left of them, times e^X, the
level's pairs are entries of z z^T, and their gradients come back by one product too. All sums of
log-decays are products of D with matrices of zeros and ones: none is a difference of others.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.linear_recurrence.hopper_kernels import COLUMNS, ROWS, along, matrix, product
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, PART, Plan

_BITS = 1.4426950408889634  # log-decays are to base 2 inside
_FLOOR = -192.0  # 2 to the power of it is 0 in float32
_SQUARE = (CHUNK, CHUNK)  # a part of keys has as many columns: one shape for all in registers
_WGMMA = plgpu.Layout.WGMMA
_BLOCKS = _V, _DO, _STATE, _DSTATE = range(4)
assert PART == CHUNK


class _Weights(NamedTuple):
    """Shared memory of the first kernel."""

    q: Any
    k: Any
    decay: Any
    z: Any
    square: Any
    kept: Any
    arrived: Any


class _Gradients(NamedTuple):
    """Shared memory of the second; `blocks` are of v, do and the states of both walks."""

    q: Any
    k: Any
    decay: Any
    z: Any
    square: Any
    kept: Any
    known: Any
    blocks: Any
    keys: Any
    arrived: Any


def weights(plan: Plan, q, k, log_decay) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the walks read.

    Args:
      plan: of the call.
      q, k: bfloat16 [B, N * C, G, K].
      log_decay: float32 [B, N * C, H, K].

    Returns:
      Queries times their decays from the chunk's begin and keys times theirs to its end, bfloat16
      [B, N * C, H, K]; weights of pairs, bfloat16 [B, H, N, C, C]; decays over chunks, float32
      [B, H, N, K].
    """
    batch, length, heads, width = log_decay.shape
    chunks = length // CHUNK
    shape = jax.ShapeDtypeStruct
    keys = shape((batch, length, heads, width), q.dtype)
    shared = _Weights(
        q=matrix(CHUNK, width),
        k=matrix(CHUNK, width),
        decay=matrix(CHUNK, width),
        z=matrix(CHUNK, width),
        square=matrix(*_SQUARE),
        kept=plgpu.SMEM((width,), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=2),
    )
    out = plgpu.kernel(
        functools.partial(_weights, plan),
        out_type=[
            keys,
            keys,
            shape((batch, heads, chunks, *_SQUARE), q.dtype),
            shape((batch, heads, chunks, width), jnp.float32),
        ],
        scratch_types=[shared],
        grid=(chunks, heads, batch),
        grid_names=('chunk', 'head', 'row'),
        kernel_name='linear_recurrence_walk_weights',
        compiler_params=_params(),
    )(q, k, log_decay)
    return tuple(out)


def gradients(plan: Plan, q, k, log_decay, kept, v, do, states, dstates) -> tuple[jax.Array, ...]:
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
      (dq, dk, dlog_decay) [B, N * C, H, K]; the first two in bfloat16, or in float32 where heads
      share queries; the last in float32.
    """
    batch, length, heads, width = log_decay.shape
    shape = jax.ShapeDtypeStruct
    block = plan.value_block
    keys = shape(log_decay.shape, q.dtype if plan.heads == plan.groups else jnp.float32)
    shared = _Gradients(
        q=matrix(CHUNK, PART),
        k=matrix(CHUNK, PART),
        decay=matrix(CHUNK, PART),
        z=matrix(CHUNK, PART),
        square=matrix(*_SQUARE) if plan.staged else None,
        kept=plgpu.SMEM((PART,), jnp.float32),
        known=plgpu.SMEM((PART,), jnp.float32),
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
        compiler_params=_params(),
    )(q, k, log_decay, kept, v, do, states, dstates)
    return tuple(out)


def _params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


class _Place(NamedTuple):
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


def _place(plan: Plan) -> _Place:
    row, head, chunk = (lax.axis_index(name) for name in ('row', 'head', 'chunk'))
    return _Place(row, head, chunk, lax.div(head, jnp.int32(plan.heads // plan.groups)))


class _Pairs(NamedTuple):
    """Tokens [C] of a chunk, uint32: i down the rows of a matrix, j along its columns.

    All sets of pairs are spans of j for each i.
    """

    i: jax.Array
    j: jax.Array

    def span(self, first: Any, count: Any) -> jax.Array:
        """Pairs whose j is one of so many from the first on: one comparison of what may wrap."""
        first, count = (_down(x) if jnp.ndim(x) else x for x in (first, count))
        return along(self.j, _SQUARE, 1) - first < count

    def right(self, half: Any) -> jax.Array:
        """Which tokens i stand right of a border between halves of so many."""
        return (self.i & half) != 0

    def upto(self) -> jax.Array:
        return self.span(jnp.uint32(0), self.i + 1)

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
        return _number(self.span(first, jnp.where(right, self.i - begin + 1, end - self.i)))


def _pairs() -> _Pairs:
    """Of all tokens."""
    return _Pairs(*(_tokens(layout) for layout in (ROWS, COLUMNS)))


def _tokens(layout: Any) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.uint32, (CHUNK,), 0, layout=layout)


def _down(x: jax.Array) -> jax.Array:
    return along(x, _SQUARE, 0)


def _number(mask: jax.Array) -> jax.Array:
    return jnp.where(mask, 1.0, 0.0)


def _levels(plan: Plan, body: Any, carry: Any) -> Any:
    """Calls body(half, carry) for halves of 32 tokens down to 1.

    In a loop: unrolled, what levels share would be kept in more registers than there are.
    """

    def level(_: Any, both: Any) -> Any:
        half, carry = both
        return lax.div(half, jnp.uint32(2)), body(half, carry)

    return lax.fori_loop(0, plan.levels, level, (jnp.uint32(CHUNK // 2), carry))[1]


def _read(ref: Any) -> jax.Array:
    """A matrix from shared memory, in float32."""
    return plgpu.load(ref, layout=_WGMMA).astype(jnp.float32)


def _either(right: jax.Array, q: Any, k: Any, decay: jax.Array) -> jax.Array:
    """Queries or keys times their decays, in bfloat16, of which one instruction takes two."""
    q, k = (plgpu.load(ref, layout=_WGMMA) for ref in (q, k))
    of_q, of_k = (_down(_number(x)).astype(jnp.bfloat16) for x in (right, ~right))
    return (q * of_q + k * of_k) * decay.astype(jnp.bfloat16)


def _left(plan: Plan, x: jax.Array, square: Any) -> Any:
    """A matrix as the left side of a product: from registers, or `staged` from shared memory."""
    x = x.astype(jnp.bfloat16)
    if not plan.staged:
        return x
    square[...] = x
    plgpu.commit_smem()
    return square


def _bounded(ref: Any) -> jax.Array:
    """Log-decays from global memory, to base 2, of which products lose nothing that matters."""
    return jnp.maximum(plgpu.load(ref, layout=_WGMMA, optimized=False) * _BITS, _FLOOR)


def _weights(plan: Plan, q, k, log_decay, read, written, pairs, kept, shared: _Weights) -> None:
    at = _place(plan)
    plgpu.copy_gmem_to_smem(at.tokens(q, at.group), shared.q, shared.arrived)
    plgpu.copy_gmem_to_smem(at.tokens(k, at.group), shared.k, shared.arrived)
    parts = [pl.ds(i, PART) for i in range(0, plan.key_dim, PART)]
    for part in parts:
        decay = _bounded(at.tokens(log_decay, at.head, part))
        shared.decay.at[:, part][...] = decay.astype(jnp.bfloat16)
    _keep(parts, shared)
    plgpu.barrier_wait(shared.arrived)
    these = _pairs()
    found = _weigh(plan, these, parts, shared)

    # Queries leave from `z`; keys from the place of queries, which are not needed after them.
    for reach, source, target in (
        (these.upto(), shared.q, shared.z),
        (these.behind(), shared.k, shared.q),
    ):
        reach = _left(plan, _number(reach), shared.square)
        for part in parts:
            decay = jnp.exp2(product(_SQUARE, reach, shared.decay.at[:, part]))
            x = plgpu.load(source.at[:, part], layout=_WGMMA)
            target.at[:, part][...] = x * decay.astype(jnp.bfloat16)
    shared.square[...] = found.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.z, at.tokens(read, at.head))
    plgpu.copy_smem_to_gmem(shared.q, at.tokens(written, at.head))
    plgpu.copy_smem_to_gmem(shared.square, at.own(pairs))
    plgpu.copy_smem_to_gmem(shared.kept, at.own(kept))
    plgpu.wait_smem_to_gmem(0)


def _keep(parts: list[Any], shared: _Weights) -> None:
    """Decays over the chunk. A product turns them from columns into rows."""
    ones = shared.z.at[:, parts[0]]
    ones[...] = plgpu.layout_cast(jnp.ones(_SQUARE, jnp.bfloat16), _WGMMA)
    plgpu.commit_smem()
    for part in parts:
        total = product(_SQUARE, shared.decay.at[:, part].T, ones)
        shared.kept.at[part][...] = jnp.exp2(jnp.sum(total, axis=1) * (1.0 / CHUNK))


def _weigh(plan: Plan, these: _Pairs, parts: list[Any], shared: _Weights) -> jax.Array:
    """The weights of pairs [C, C], float32, 0 where a token may not look."""
    scores = product(_SQUARE, shared.q, shared.k.T)

    def level(half: Any, found: jax.Array) -> jax.Array:
        reach = _left(plan, these.reach(half), shared.square)
        for part in parts:
            decay = jnp.exp2(product(_SQUARE, reach, shared.decay.at[:, part]))
            right = these.right(half)
            z = _either(right, shared.q.at[:, part], shared.k.at[:, part], decay)
            shared.z.at[:, part][...] = z
        plgpu.commit_smem()
        scores = product(_SQUARE, shared.z, shared.z.T)
        return jnp.where(these.across(half), scores, found)

    found = _levels(plan, level, jnp.where(these.own(), scores, 0.0))
    return jnp.where(these.upto(), found, 0.0)


def _gradients(
    plan: Plan, q, k, log_decay, kept, v, do, states, dstates, dq, dk, ddecay, shared: _Gradients
) -> None:
    at, part = _place(plan), pl.ds(lax.axis_index('part') * PART, PART)
    for source, target in (
        (at.tokens(q, at.group, part), shared.q),
        (at.tokens(k, at.group, part), shared.k),
        (at.own(kept, part), shared.kept),
    ):
        plgpu.copy_gmem_to_smem(source, target, shared.keys)
    sources = [functools.partial(at.tokens, x, at.head) for x in (v, do)]
    sources += [functools.partial(at.own, x, part) for x in (states, dstates)]
    blocks = _Blocks(plan, shared, sources)
    decay = _bounded(at.tokens(log_decay, at.head, part))
    shared.decay[...] = decay.astype(jnp.bfloat16)
    plgpu.commit_smem()

    these = _pairs()
    both, own = _of_weights(these, blocks)
    plgpu.barrier_wait(shared.keys)
    levels = _through_levels(plan, these, both, own, shared)

    def put(x: jax.Array, target: Any, free: Any) -> None:
        target = at.tokens(target, at.head, part)
        if target.dtype == jnp.float32:
            target[...] = x
        else:
            free[...] = x.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(free, target)

    def through(reach: jax.Array, x: jax.Array) -> jax.Array:
        reach = _left(plan, _number(reach), shared.square)
        return x * jnp.exp2(product(_SQUARE, reach, shared.decay))

    of_q = through(these.upto(), _against(blocks, _DO, _STATE))
    flow = levels.flow + of_q * _read(shared.q)
    put(levels.dq + of_q, dq, shared.q)
    found = _summed(plan, these.onward(), flow, shared)
    of_k = through(these.behind(), _against(blocks, _V, _DSTATE))
    flow = of_k * _read(shared.k)
    put(levels.dk + of_k, dk, shared.k)
    found = found + _summed(plan, these.before(), flow, shared)
    _know(blocks)
    ends = [along(plgpu.load(x, layout=COLUMNS), _SQUARE, 1) for x in (shared.kept, shared.known)]
    found = jnp.where(_read(shared.decay) > _FLOOR, found + ends[0] * ends[1], 0.0)
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


def _of_weights(these: _Pairs, blocks: _Blocks) -> tuple[jax.Array, jax.Array]:
    """Gradients of weights: of each pair in both of its places [C, C], of each token's own [C]."""

    def multiply(above, below):
        for block in range(len(blocks)):
            v, do = blocks.get(block, _V, _DO)
            plgpu.wgmma(below, do, v.T)
            plgpu.wgmma(above, v, do.T)
            plgpu.wgmma_wait(0)
        return above[...], below[...]

    accumulator = plgpu.ACC(_SQUARE, jnp.float32)
    above, below = pl.run_scoped(multiply, accumulator, accumulator)
    own = jnp.sum(jnp.where(these.own(), below, 0.0), axis=1)
    return jnp.where(these.before(), below, above).astype(jnp.bfloat16), own


def _against(blocks: _Blocks, values: int, states: int) -> jax.Array:
    """The product of values and states over all columns [C, part]."""

    def multiply(accumulator):
        for block in range(len(blocks)):
            x, state = blocks.get(block, values, states)
            plgpu.wgmma(accumulator, x, state.T)
            plgpu.wgmma_wait(0)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(_SQUARE, jnp.float32))


def _know(blocks: _Blocks) -> None:
    """Leaves what of the loss flows through the chunk's end [part] in shared memory."""
    known = None
    for block in reversed(range(len(blocks))):
        state, dstate = (plgpu.load(x, layout=_WGMMA) for x in blocks.get(block, _STATE, _DSTATE))
        inner = jnp.sum(state.astype(jnp.float32) * dstate.astype(jnp.float32), axis=1)
        known = inner if known is None else known + inner
    blocks.shared.known[...] = known


class _Levels(NamedTuple):
    """Gradients through weights, and what of the loss flows through the tokens' log-decays."""

    dq: jax.Array
    dk: jax.Array
    flow: jax.Array


def _through_levels(plan: Plan, these: _Pairs, both, own, shared: _Gradients) -> _Levels:
    """The gradients of a part of keys [C, part], float32.

    The flow is what passes a token's log-decay less what passes the next one's, where both sides
    of a pair give exactly the same: summed up nothing is left of pairs that do not meet over it.
    """
    own = _down(own)

    def level(half: Any, found: _Levels) -> _Levels:
        right = these.right(half)
        reach = _left(plan, these.reach(half), shared.square)
        decay = jnp.exp2(product(_SQUARE, reach, shared.decay))
        z = _either(right, shared.q, shared.k, decay)
        shared.z[...] = z
        plgpu.commit_smem()
        # Where a product is formed a float32 0 is cheaper than one of bfloat16's pairs.
        across = jnp.where(these.across(half), both.astype(jnp.float32), 0.0)
        dz = product(_SQUARE, _left(plan, across, shared.square), shared.z)
        given, through = decay * dz, z.astype(jnp.float32) * dz
        of_q, of_k = (_down(_number(x)) for x in (right, ~right))
        return _Levels(
            found.dq + given * of_q,
            found.dk + given * of_k,
            found.flow + through * (of_q - of_k),
        )

    flow = plgpu.layout_cast(jnp.zeros(_SQUARE, jnp.float32), _WGMMA)
    own = _Levels(own * _read(shared.k), own * _read(shared.q), flow)
    return _levels(plan, level, own)


def _summed(plan: Plan, which: jax.Array, x: jax.Array, shared: _Gradients) -> jax.Array:
    """Sums of a flow over the tokens that a matrix of pairs tells [C, part]."""
    coarse = x.astype(jnp.bfloat16)  # in two parts of 8 bits: nearly float32
    fine = shared.blocks[_DO].at[:, pl.ds(0, PART)]  # no more needed
    shared.z[...] = coarse
    fine[...] = (x - coarse.astype(jnp.float32)).astype(jnp.bfloat16)
    reach = _left(plan, _number(which), shared.square)
    plgpu.commit_smem()

    def multiply(accumulator):
        plgpu.wgmma(accumulator, reach, shared.z)
        plgpu.wgmma(accumulator, reach, fine)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC(_SQUARE, jnp.float32))
