"""The forward kernel of attention on Hopper GPUs (Mosaic GPU).

A block of threads has 128 queries of one head. One warpgroup brings in the blocks of keys and
values that its list names, as far ahead as there is room; two have 64 queries each, with scores,
weights and sums in registers, and keep a running softmax (Dao, arXiv 2307.08691). They take turns:
while one has its softmax, the products of the other run (Shah et al., arXiv 2407.08608).
"""

import functools
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
    LOWEST,
    MASKED,
    REGISTERS,
    ROWS,
    Facts,
    added,
    drain,
    filled_with,
    matrix,
    params,
    rem,
    spread,
)  # fmt: skip


class Inputs(NamedTuple):
    """Arrays in global memory.

    Attributes:
      q: bfloat16 [B, T, H, D], with T a multiple of 128.
      k, v: bfloat16 [B, S, G, D], likewise.
      heads, items, patterns: of `hopper_plan.Lists`.
      q_ids, kv_ids: int32 [B, T] and [B, S], or None.
    """

    q: Any
    k: Any
    v: Any
    heads: Any
    items: Any
    patterns: Any = None
    q_ids: Any = None
    kv_ids: Any = None


class _Shared(NamedTuple):
    """Shared memory; rings have an entry a stage.

    Attributes:
      q: queries of each warpgroup, later its outputs [2, 64, D].
      lse: float32 [2, 64].
      k, v: rings of keys and values [stages, C, D].
      weights: bfloat16 [2, 64, C], where they do not stay in registers.
      q_ids, kv_ids: int32 [2, 64] and [stages, C], or None.
      q_here: barriers of the queries.
      k_here, v_here, k_free, v_free: barriers of the entries.
      turn: where both warpgroups meet when one is done with its softmax.
    """

    q: Any
    lse: Any
    k: Any
    v: Any
    weights: Any
    q_ids: Any
    kv_ids: Any
    q_here: Any
    k_here: Any
    v_here: Any
    k_free: Any
    v_free: Any
    turn: Any


def run(facts: Facts, inputs: Inputs) -> tuple[jax.Array, jax.Array]:
    """Returns o [B, T, H, D] and log2 of the sum of 2^(y c) over keys, float32 [B, H, T].

    Both are 0 for a query that sees no key.
    """
    batch, length, heads, _ = inputs.q.shape
    there = [x is not None for x in inputs]
    shape = jax.ShapeDtypeStruct
    o, lse = plgpu.kernel(
        functools.partial(_body, facts, there),
        out_type=[
            shape(inputs.q.shape, inputs.q.dtype),
            shape((batch, heads, length), jnp.float32),
        ],
        scratch_types=[_scratch(facts, inputs.q.shape[-1])],
        grid=(batch, heads, length // TILE),
        grid_names=('row', 'head', 'block'),
        num_threads=GROUPS + 1,
        thread_name='role',
        compiler_params=params(),
        kernel_name='attention_forward',
    )(*[x for x in inputs if x is not None])
    return o, lse


def _scratch(facts: Facts, dim: int) -> _Shared:
    def barriers(count: int, arrivals: int = 1) -> Any:
        return plgpu.Barrier(num_barriers=count, num_arrivals=arrivals)

    def ids(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.int32) if facts.segments else None

    stages, step = facts.stages, facts.step
    together = 1 + facts.segments
    return _Shared(
        q=matrix(GROUPS, ROWS, dim),
        lse=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
        k=matrix(stages, step, dim),
        v=matrix(stages, step, dim),
        weights=matrix(GROUPS, ROWS, step) if facts.staged else None,
        q_ids=ids(GROUPS, ROWS),
        kv_ids=ids(stages, step),
        q_here=barriers(GROUPS, together),
        k_here=barriers(stages, together),
        v_here=barriers(stages),
        k_free=barriers(stages, GROUPS),
        v_free=barriers(stages, GROUPS),
        turn=plgpu.Barrier(num_arrivals=GROUPS),
    )


class _Block(NamedTuple):
    """What a block of threads works on: its head, its queries and its list."""

    facts: Facts
    inputs: Inputs
    o: Any
    lse: Any
    shared: _Shared
    row: jax.Array
    head: jax.Array
    first: jax.Array
    begin: jax.Array
    whole: jax.Array
    steps: jax.Array

    def queries(self, group: Any) -> Any:
        return pl.ds(self.first + group * ROWS, ROWS)

    def key(self, step: jax.Array) -> jax.Array:
        """The first key of a step."""
        parts = TILE // self.facts.step
        item = self.begin + lax.div(step, jnp.int32(parts))
        return self.inputs.items[item, 0] * TILE + rem(step, parts) * self.facts.step


def _body(facts: Facts, there: list[bool], *refs: Any) -> None:
    *arrays, o, lse, shared = refs
    found = iter(arrays)
    inputs = Inputs(*[next(found) if x else None for x in there])
    at, parts = lax.axis_index('block'), TILE // facts.step
    number, begin, whole, count = (inputs.heads[at, i] for i in range(4))
    block = _Block(
        facts, inputs, o, lse, shared, lax.axis_index('row'), lax.axis_index('head'),
        number * TILE, begin, whole * parts, count * parts,
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


def _bring(block: _Block) -> None:
    """Copies queries, and then keys and values of each step, into shared memory."""
    facts, inputs, shared = block.facts, block.inputs, block.shared
    for group in range(GROUPS):
        here = shared.q_here.at[group]
        source = inputs.q.at[block.row, block.queries(group), block.head]
        plgpu.copy_gmem_to_smem(source, shared.q.at[group], here)
        if facts.segments:
            source = inputs.q_ids.at[block.row, block.queries(group)]
            plgpu.copy_gmem_to_smem(source, shared.q_ids.at[group], here)
    served = lax.div(block.head, jnp.int32(facts.share))

    @pl.loop(0, block.steps)
    def _(step):
        stage, tokens = rem(step, facts.stages), pl.ds(block.key(step), facts.step)

        def when_free(barrier):
            @pl.when(step >= facts.stages)
            def _():
                plgpu.barrier_wait(barrier.at[stage])

        when_free(shared.k_free)
        here = shared.k_here.at[stage]
        plgpu.copy_gmem_to_smem(inputs.k.at[block.row, tokens, served], shared.k.at[stage], here)
        if facts.segments:
            source = inputs.kv_ids.at[block.row, tokens]
            plgpu.copy_gmem_to_smem(source, shared.kv_ids.at[stage], here)
        when_free(shared.v_free)
        here = shared.v_here.at[stage]
        plgpu.copy_gmem_to_smem(inputs.v.at[block.row, tokens, served], shared.v.at[stage], here)

    drain(block.steps, facts.stages, shared.k_free, shared.v_free)


def _attend(block: _Block, group: jax.Array) -> None:
    """Goes through the steps with 64 queries, and writes their outputs."""
    shared, dim = block.shared, block.inputs.q.shape[-1]
    plgpu.barrier_wait(shared.q_here.at[group])
    start = (
        filled_with(0.0, (ROWS, dim), plgpu.Layout.WGMMA),
        filled_with(LOWEST, (ROWS,), DOWN),
        filled_with(0.0, (ROWS,), DOWN),
    )
    pl.when(group == 1)(lambda: _meet(shared))
    carry = lax.fori_loop(0, block.whole, functools.partial(_step, block, group, False), start)
    carry = lax.fori_loop(
        block.whole, block.steps, functools.partial(_step, block, group, True), carry
    )
    pl.when(group == 0)(lambda: _meet(shared))
    sums, most, total = carry
    some = total > 0.0  # else no key was seen
    total = jnp.where(some, total, 1.0)
    shared.lse.at[group][...] = jnp.where(some, most + jnp.log2(total), 0.0)
    o = sums * spread(jnp.where(some, 1.0 / total, 0.0), (ROWS, dim), 0)
    shared.q.at[group][...] = o.astype(jnp.bfloat16)
    plgpu.commit_smem()
    tokens = block.queries(group)
    plgpu.copy_smem_to_gmem(shared.q.at[group], block.o.at[block.row, tokens, block.head])
    plgpu.copy_smem_to_gmem(shared.lse.at[group], block.lse.at[block.row, block.head, tokens])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _call(shared: _Shared) -> None:
    plgpu.barrier_arrive(shared.turn)


def _await(shared: _Shared) -> None:
    plgpu.barrier_wait(shared.turn)


def _meet(shared: _Shared) -> None:
    _call(shared)
    _await(shared)


def _step(block: _Block, group: jax.Array, partly: bool, step: jax.Array, carry: Any) -> Any:
    """One block of keys: sums of weighted values, the maximum, and the sum of weights."""
    facts, shared = block.facts, block.shared
    sums, most, total = carry
    stage, shape = rem(step, facts.stages), (ROWS, facts.step)
    plgpu.barrier_wait(shared.k_here.at[stage])

    def score(accumulator):
        plgpu.wgmma(accumulator, shared.q.at[group], shared.k.at[stage].T)
        _meet(shared)  # the other has its softmax behind it, and its products ahead
        return accumulator[...]

    y = pl.run_scoped(score, plgpu.ACC(shape, jnp.float32))
    allowed = _allowed(block, group, partly, step, stage)
    plgpu.barrier_arrive(shared.k_free.at[stage])
    y = facts.scores(y)
    if allowed is not None:
        y = jnp.where(allowed, y, MASKED)
    new = jnp.maximum(most, jnp.max(y, axis=1) * facts.factor)
    shrink = jnp.exp2(most - new)
    weights = jnp.exp2(y * facts.factor - spread(new, shape, 0))
    total = total * shrink + jnp.sum(weights, axis=1)
    sums = sums * spread(shrink, sums.shape, 0)
    left: Any = weights.astype(jnp.bfloat16)
    # Everything up to here, before the tensor cores' turn.
    sums, total, new, left = lax.optimization_barrier((sums, total, new, left))
    if facts.staged:
        shared.weights.at[group][...] = left
        plgpu.commit_smem()
        left = shared.weights.at[group]
    _call(shared)
    plgpu.barrier_wait(shared.v_here.at[stage])
    _await(shared)
    (sums,) = added(facts, [sums], (left, shared.v.at[stage]))
    plgpu.barrier_arrive(shared.v_free.at[stage])
    return sums, new, total


def _allowed(
    block: _Block, group: jax.Array, partly: bool, step: jax.Array, stage: jax.Array
) -> jax.Array | None:
    """Which pairs of a step are allowed, or None for all."""
    facts, inputs, shared = block.facts, block.inputs, block.shared
    shape, out = (ROWS, facts.step), None
    if partly:
        parts = TILE // facts.step
        pattern = None
        if facts.mask.spec is not None:
            number = inputs.items[block.begin + lax.div(step, jnp.int32(parts)), 1]
            rows, columns = (
                pl.ds(group * ROWS, ROWS),
                pl.ds(rem(step, parts) * facts.step, facts.step),
            )
            pattern = inputs.patterns.at[number, rows, columns]
        first = block.first + group * ROWS
        out = facts.allowed(shape, first, block.key(step), 0, pattern)
    if facts.segments:
        own = plgpu.load(shared.q_ids.at[group], layout=DOWN)
        other = plgpu.load(shared.kv_ids.at[stage], layout=ACROSS)
        same = spread(own, shape, 0) == spread(other, shape, 1)
        out = same if out is None else out & same
    return out
