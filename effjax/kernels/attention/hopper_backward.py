"""The backward kernels of attention on Hopper GPUs (Mosaic GPU).

With p the weights, formed anew from the log-sum-exp, and delta the sum of o do over a head's
dimensions, the scores' gradient is ds = p (do v^T - delta), and
    dq = ds k,    dk = ds^T q,    dv = p^T do.
`queries` goes through the blocks of keys of each block of queries, for dq; `keys` through the
blocks of queries of each block of keys, for dk and dv, and there through all the query heads that
share the keys. Roles of warpgroups are as in the forward kernel, without turns.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.attention.blocks import TILE
from effjax.kernels.attention.hopper_blocks import (
    ACROSS,
    DOWN,
    GROUPS,
    MASKED,
    REGISTERS,
    ROWS,
    Facts,
    added,
    drain,
    filled_with,
    matrix,
    params,
    products,
    rem,
    spread,
)  # fmt: skip


class Inputs(NamedTuple):
    """Arrays in global memory.

    Attributes:
      q, do: bfloat16 [B, T, H, D], with T a multiple of 128.
      k, v: bfloat16 [B, S, G, D], likewise.
      lse: float32 [B, H, T], as the forward kernel returns it.
      delta: float32 [B, H, T].
      heads, items, patterns: of `hopper_plan.Lists`, of queries or of keys.
      q_ids, kv_ids: int32 [B, T] and [B, S], or None.
    """

    q: Any
    do: Any
    k: Any
    v: Any
    lse: Any
    delta: Any
    heads: Any
    items: Any
    patterns: Any = None
    q_ids: Any = None
    kv_ids: Any = None


class _Tokens(NamedTuple):
    """Shared memory of some blocks of queries, or of keys; the first dimension counts blocks.

    Attributes:
      a, b: q and do, or k and v [., C, D].
      lse, delta: of queries, float32 [., C]; or None.
      ids: int32 [., C], or None.
      here: barriers of the blocks' arrival.
    """

    a: Any
    b: Any
    lse: Any
    delta: Any
    ids: Any
    here: Any

    def at(self, n: Any) -> '_Tokens':
        return _Tokens(*[None if x is None else x.at[n] for x in self])


class _Shared(NamedTuple):
    """Shared memory: each warpgroup's own tokens, a ring of others, and what goes between.

    Attributes:
      own: of the side that a block of threads has a block of, an entry a warpgroup.
      other: of the other side, an entry a stage.
      free: barriers of those entries.
      left: bfloat16 [2, 2, 64, C], what products do not take from registers; or None.
    """

    own: _Tokens
    other: _Tokens
    free: Any
    left: Any


class _Block(NamedTuple):
    """What a block of threads works on: a block of `own` tokens of a head, and its list."""

    facts: Facts
    by_keys: bool
    inputs: Inputs
    out: tuple[Any, ...]
    shared: _Shared
    row: jax.Array
    head: jax.Array
    first: jax.Array
    begin: jax.Array
    whole: jax.Array
    steps: jax.Array

    def item(self, step: jax.Array, column: int) -> jax.Array:
        parts = TILE // self.facts.step
        return self.inputs.items[self.begin + lax.div(step, jnp.int32(parts)), column]

    def inside(self, step: jax.Array) -> jax.Array:
        """Where in its block a step begins."""
        return rem(step, TILE // self.facts.step) * self.facts.step

    def others(self, step: jax.Array) -> jax.Array:
        """The first token of a step."""
        return self.item(step, 0) * TILE + self.inside(step)

    def mine(self, group: Any) -> jax.Array:
        """The first token of a warpgroup."""
        return self.first + group * ROWS


def queries(facts: Facts, inputs: Inputs) -> jax.Array:
    """Returns dq [B, T, H, D]."""
    (dq,) = _run(facts, False, inputs, [inputs.q])
    return dq


def keys(facts: Facts, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns dk and dv [B, S, G, D]; `inputs` has the lists of keys."""
    dk, dv = _run(facts, True, inputs, [inputs.k, inputs.v])
    return dk, dv


def _run(facts: Facts, by_keys: bool, inputs: Inputs, like: Sequence[jax.Array]) -> Any:
    there = [x is not None for x in inputs]
    batch, length, heads, dim = like[0].shape
    return plgpu.kernel(
        functools.partial(_body, facts, by_keys, there, len(like)),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
        scratch_types=[_scratch(facts, by_keys, dim)],
        grid=(batch, heads, length // TILE),
        grid_names=('row', 'head', 'block'),
        num_threads=GROUPS + 1,
        thread_name='role',
        compiler_params=params(),
        kernel_name='attention_backward_keys' if by_keys else 'attention_backward_queries',
    )(*[x for x in inputs if x is not None])


def _scratch(facts: Facts, by_keys: bool, dim: int) -> _Shared:
    def tokens(count: int, size: int, of_queries: bool) -> _Tokens:
        number = plgpu.SMEM((count, size), jnp.float32) if of_queries else None
        ids = plgpu.SMEM((count, size), jnp.int32) if facts.segments else None
        arrivals = 2 + 2 * of_queries + facts.segments
        here = plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)
        blocks = matrix(count, size, dim)
        return _Tokens(blocks, blocks, number, number, ids, here)

    return _Shared(
        own=tokens(GROUPS, ROWS, not by_keys),
        other=tokens(facts.stages, facts.step, by_keys),
        free=plgpu.Barrier(num_barriers=facts.stages, num_arrivals=GROUPS),
        left=matrix(GROUPS, 1 + by_keys, ROWS, facts.step) if facts.staged else None,
    )


def _body(facts: Facts, by_keys: bool, there: list[bool], outputs: int, *refs: Any) -> None:
    shared, out = refs[-1], refs[-1 - outputs : -1]
    found = iter(refs)
    inputs = Inputs(*[next(found) if x else None for x in there])
    at, parts = lax.axis_index('block'), TILE // facts.step
    number, begin, whole, count = (inputs.heads[at, i] for i in range(4))
    block = _Block(
        facts, by_keys, inputs, out, shared, lax.axis_index('row'),
        lax.axis_index('head'), number * TILE, begin, whole * parts, count * parts,
    )  # fmt: skip
    role = lax.axis_index('role')

    @pl.when(role < GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[0], action='increase')
        _attend(block, role)

    @pl.when(role == GROUPS)
    def _():
        plgpu.set_max_registers(REGISTERS[1], action='decrease')
        _bring(block)


def _copy(block: _Block, of_queries: bool, head: jax.Array, first: Any, target: _Tokens) -> None:
    """Copies a block of queries, or of keys, into shared memory."""
    inputs, row = block.inputs, block.row
    tokens = pl.ds(first, target.a.shape[0])
    a, b, ids = (
        (inputs.q, inputs.do, inputs.q_ids) if of_queries else (inputs.k, inputs.v, inputs.kv_ids)
    )
    plgpu.copy_gmem_to_smem(a.at[row, tokens, head], target.a, target.here)
    plgpu.copy_gmem_to_smem(b.at[row, tokens, head], target.b, target.here)
    if of_queries:
        plgpu.copy_gmem_to_smem(inputs.lse.at[row, head, tokens], target.lse, target.here)
        plgpu.copy_gmem_to_smem(inputs.delta.at[row, head, tokens], target.delta, target.here)
    if ids is not None:
        plgpu.copy_gmem_to_smem(ids.at[row, tokens], target.ids, target.here)


def _bring(block: _Block) -> None:
    facts, shared = block.facts, block.shared
    for group in range(GROUPS):
        own = shared.own.at(group)
        _copy(block, not block.by_keys, block.head, block.mine(group), own)

    def bring(head: jax.Array, before: jax.Array, carry: Any) -> Any:
        @pl.loop(0, block.steps)
        def _(step):
            turn = before + step
            stage = rem(turn, facts.stages)

            @pl.when(turn >= facts.stages)
            def _():
                plgpu.barrier_wait(shared.free.at[stage])

            _copy(block, block.by_keys, head, block.others(step), shared.other.at(stage))

        return carry

    _for_heads(block, bring, ())
    drain(block.steps * (facts.share if block.by_keys else 1), facts.stages, shared.free)


def _for_heads(block: _Block, body: Any, carry: Any) -> Any:
    """Runs a body for each head of the other side, with it, the steps before and a carry."""
    share = block.facts.share
    if not block.by_keys:
        return body(lax.div(block.head, jnp.int32(share)), jnp.int32(0), carry)
    if share == 1:
        return body(block.head, jnp.int32(0), carry)
    return lax.fori_loop(
        0, share, lambda n, carry: body(block.head * share + n, n * block.steps, carry), carry
    )


def _attend(block: _Block, group: jax.Array) -> None:
    """Goes through the steps with 64 tokens, and writes their gradients."""
    own = block.shared.own.at(group)
    dim = own.a.shape[-1]
    plgpu.barrier_wait(own.here)
    numbers: tuple[jax.Array, ...] = ()
    if not block.by_keys:
        numbers = tuple(plgpu.load(x, layout=DOWN) for x in (own.lse, own.delta))
    start = tuple(filled_with(0.0, (ROWS, dim), plgpu.Layout.WGMMA) for _ in block.out)

    def head(_: jax.Array, before: jax.Array, sums: Any) -> Any:
        body = functools.partial(_step, block, group, numbers)
        sums = lax.fori_loop(0, block.whole, functools.partial(body, False, before), sums)
        return lax.fori_loop(block.whole, block.steps, functools.partial(body, True, before), sums)

    sums = _for_heads(block, head, start)
    tokens = pl.ds(block.mine(group), ROWS)
    targets = (own.a, own.b)[: len(sums)]
    for source, target, factor in zip(sums, targets, (block.facts.scale, 1.0), strict=False):
        target[...] = (source * factor).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for source, target in zip(targets, block.out, strict=True):
        plgpu.copy_smem_to_gmem(source, target.at[block.row, tokens, block.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _step(
    block: _Block,
    group: jax.Array,
    numbers: tuple[jax.Array, ...],
    partly: bool,
    before: jax.Array,
    step: jax.Array,
    sums: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    """Adds a step's part: of dq, or of dk and dv."""
    facts, shared = block.facts, block.shared
    stage, shape = rem(before + step, facts.stages), (ROWS, facts.step)
    own, other = shared.own.at(group), shared.other.at(stage)
    plgpu.barrier_wait(other.here)
    along = 0
    if block.by_keys:
        numbers = tuple(plgpu.load(x, layout=ACROSS) for x in (other.lse, other.delta))
        along = 1
    lse, delta = (spread(x, shape, along) for x in numbers)
    raw, slopes = products(shape, (own.a, other.a.T), (own.b, other.b.T))
    y = facts.scores(raw)
    bend = None if facts.soft_cap is None else 1.0 - y * y
    allowed = _allowed(block, group, partly, step, own, other)
    if allowed is not None:
        y = jnp.where(allowed, y, MASKED)
    weights = jnp.exp2(y * facts.factor - lse)
    slopes = weights * (slopes - delta)
    if bend is not None:
        slopes = slopes * bend
    left: list[Any] = [x.astype(jnp.bfloat16) for x in (slopes, weights)[: len(sums)]]
    if facts.staged:
        for n, x in enumerate(left):
            shared.left.at[group, n][...] = x
        plgpu.commit_smem()
        left = [shared.left.at[group, n] for n in range(len(left))]
    pairs = zip(left, (other.a, other.b), strict=False)
    sums = tuple(added(facts, list(sums), *pairs))
    plgpu.barrier_arrive(shared.free.at[stage])
    return sums


def _allowed(
    block: _Block,
    group: jax.Array,
    partly: bool,
    step: jax.Array,
    own: _Tokens,
    other: _Tokens,
) -> jax.Array | None:
    """Which pairs of a step are allowed, own tokens down, or None for all."""
    facts, shape, out = block.facts, (ROWS, block.facts.step), None
    if partly:
        pattern = None
        if facts.mask.spec is not None:
            columns = pl.ds(block.inside(step), facts.step)
            place = (block.item(step, 1), pl.ds(group * ROWS, ROWS), columns)
            pattern = block.inputs.patterns.at[place]
        first = (block.mine(group), block.others(step))
        query, key = first[::-1] if block.by_keys else first
        out = facts.allowed(shape, query, key, int(block.by_keys), pattern)
    if facts.segments:
        ids = plgpu.load(own.ids, layout=DOWN), plgpu.load(other.ids, layout=ACROSS)
        same = spread(ids[0], shape, 0) == spread(ids[1], shape, 1)
        out = same if out is None else out & same
    return out
