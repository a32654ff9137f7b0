"""The Pallas kernels of `tpu`: their grids, blocks and loops over heads and chunks.

A step of the grid is (row, some heads, chunk); the chunks of a row follow one another, the state or
its gradient waiting in VMEM. What happens to one chunk of one head is in `tpu_scalar` and
`tpu_vector`.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels.decays import Sum
from effjax.kernels.linear_recurrence import tpu_scalar as scalar
from effjax.kernels.linear_recurrence import tpu_vector as vector
from effjax.kernels.linear_recurrence.tpu_plan import LEAF, Plan

LIMIT = 56 * 2**20  # VMEM that the compiler may use: v5p has 64 MiB, v5e and v6e 128


class Blocks:
    """The blocks of a kernel's arrays, over a grid of (row, step over heads, chunk)."""

    def __init__(self, plan: Plan, chunks: int, reverse: bool):
        self.plan = plan
        self.at: Callable[[Any], Any] = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

    def tokens(self, width: int, index: Callable[[Any], Any] = lambda j: j) -> pl.BlockSpec:
        """Of [B, T, heads * width]."""
        shape = (None, self.plan.size, width)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self.at(n), index(j)))

    def keys(self) -> pl.BlockSpec:
        """Of queries and keys, which several steps may read."""
        width, sharing = self.plan.group_block * self.plan.key_dim, self.plan.sharing
        if sharing == 1:
            return self.tokens(width)
        return self.tokens(width, lambda j: jax.lax.div(j, jnp.int32(sharing)))

    def values(self) -> pl.BlockSpec:
        return self.tokens(self.plan.block * self.plan.value_dim)

    def sums(self, array: Any) -> pl.BlockSpec:
        """Of running sums, which rows may share."""
        row = (lambda b: b) if array.shape[0] > 1 else (lambda b: 0)
        if array.ndim == 3:  # vector decays lie in lanes
            shape = (None, self.plan.size, array.shape[2] // self.plan.steps)
            return pl.BlockSpec(shape, lambda b, j, n: (row(b), self.at(n), j))
        shape = (None, None, None, *array.shape[3:])
        return pl.BlockSpec(shape, lambda b, j, n: (row(b), j, self.at(n), 0, 0))

    def ends(self) -> pl.BlockSpec:
        """Of states [B, H, K, V] at a row's begin or end."""
        plan = self.plan
        shape = (None, plan.block, plan.key_dim, plan.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, 0, 0))

    def states(self) -> pl.BlockSpec:
        """Of states before each chunk [B, N, H, K, V]."""
        plan = self.plan
        shape = (None, None, plan.block, plan.key_dim, plan.value_dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self.at(n), j, 0, 0))


def _call(plan: Plan, name: str, body: Any, grid: tuple[int, ...], args, in_specs, out, flops):
    """Runs a kernel; `out` is a list of (array's shape and dtype, block)."""
    shapes, out_specs = zip(*out, strict=True)
    moved = sum(x.size * x.dtype.itemsize for x in (*args, *shapes))
    each = {'none': 0, 'scalar': plan.size, 'vector': (LEAF + plan.levels) * plan.key_dim}
    decays = grid[0] * plan.heads * grid[2] * plan.size * each[plan.decay]
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((plan.block, plan.key_dim, plan.value_dim), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(flops), bytes_accessed=moved, transcendentals=decays
        ),
        name=f'linear_recurrence_{name}',
    )(*args)


def forward(plan: Plan, q, k, v, sums: Sum | None, state, *, save: bool) -> Any:
    """(o, last state) and, to `save`, the states before each chunk [B, N, H, K, V]."""
    batch, chunks = q.shape[0], q.shape[1] // plan.size
    blocks = Blocks(plan, chunks, reverse=False)
    decays = [] if sums is None else [*sums]
    shape = jax.ShapeDtypeStruct
    # With a bonus the token's own product is still to be added: no rounding before.
    out = [
        (shape(v.shape, jnp.float32 if plan.strict else v.dtype), blocks.values()),
        (shape(state.shape, state.dtype), blocks.ends()),
    ]
    if save:
        every = shape((batch, chunks, *state.shape[1:]), state.dtype)
        out.append((every, blocks.states()))
    return _call(
        plan,
        'forward',
        functools.partial(_forward_body, plan, save),
        (batch, plan.steps, chunks),
        [q, k, v, *decays, state],
        [blocks.keys(), blocks.keys(), blocks.values(), *map(blocks.sums, decays), blocks.ends()],
        out,
        batch * chunks * plan.forward_flops,
    )


def backward(plan: Plan, q, k, v, sums: Sum | None, states, do, dlast) -> Any:
    """(dq, dk, dv, gradient of the sums' fine part, gradient of the initial state).

    Where several steps share a query head, dq and dk are one part a step, in float32.
    """
    batch, chunks = q.shape[0], q.shape[1] // plan.size
    blocks = Blocks(plan, chunks, reverse=True)
    decays = [] if sums is None else [*sums]
    shape = jax.ShapeDtypeStruct
    width = plan.group_block * plan.key_dim
    parts = shape((*q.shape[:2], plan.steps * width), q.dtype)
    if parts.shape != q.shape:
        parts = shape(parts.shape, jnp.float32)
    out = [
        (parts, blocks.tokens(width)),
        (parts, blocks.tokens(width)),
        (shape(v.shape, v.dtype), blocks.values()),
        (shape(dlast.shape, dlast.dtype), blocks.ends()),
    ]
    if sums is not None:
        fine = shape((batch, *sums.fine.shape[1:]), sums.fine.dtype)
        out.append((fine, blocks.sums(fine)))
    known = [blocks.states(), blocks.values(), blocks.ends()]
    dq, dk, dv, dstate, *dfine = _call(
        plan,
        'backward',
        functools.partial(_backward_body, plan),
        (batch, plan.steps, chunks),
        [q, k, v, *decays, states, do, dlast],
        [blocks.keys(), blocks.keys(), blocks.values(), *map(blocks.sums, decays), *known],
        out,
        batch * chunks * plan.backward_flops,
    )
    return dq, dk, dv, dfine[0] if dfine else None, dstate


def _heads(plan: Plan) -> Iterator[tuple[int, list[int]]]:
    """Each query head of a step with the value heads that share it."""
    each = plan.block // plan.group_block
    for g in range(plan.group_block):
        yield g, list(range(g * each, (g + 1) * each))


def lanes(head: int, width: int) -> slice:
    """The lanes of a head."""
    return slice(head * width, (head + 1) * width)


def _forward_body(plan: Plan, save: bool, q_ref, k_ref, v_ref, *refs) -> None:
    *decays, state_ref, o_ref, last_ref = refs[: -1 - save]
    carried = refs[-1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    if save:
        refs[-2][...] = carried[...]
    for g, heads in _heads(plan):
        q, k = q_ref[:, lanes(g, plan.key_dim)], k_ref[:, lanes(g, plan.key_dim)]
        scores = None if plan.decay == 'vector' else scalar.scores(q, k)
        for h in heads:
            values = lanes(h, plan.value_dim)
            v, state = v_ref[:, values], carried[h]
            if scores is None:
                sums = vector.load(decays, h, plan.block, plan.key_dim, plan.strict)
                o, after = vector.forward(q, k, v, sums, state, plan.strict)
            else:
                decay = scalar.decays(plan.size, plan.block, plan.strict, decays, h)
                o, after = scalar.forward(q, k, v, scores, decay, state)
            o_ref[:, values] = o.astype(o_ref.dtype)
            carried[h] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried[...]


def _backward_body(plan: Plan, q_ref, k_ref, v_ref, *refs) -> None:
    decays = refs[: 0 if plan.decay == 'none' else 2]
    states_ref, do_ref, dlast_ref, dq_ref, dk_ref, dv_ref, dstate_ref, *rest = refs[len(decays) :]
    *dfine_ref, carried = rest
    form: Any = vector if plan.decay == 'vector' else scalar

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast_ref[...]

    def head(h: int, q: jax.Array, k: jax.Array) -> scalar.Head:
        v, do = v_ref[:, lanes(h, plan.value_dim)], do_ref[:, lanes(h, plan.value_dim)]
        return scalar.Head(q, k, v, do, states_ref[h], carried[h])

    for g, heads in _heads(plan):
        q, k = q_ref[:, lanes(g, plan.key_dim)], k_ref[:, lanes(g, plan.key_dim)]
        scores, group = None if form is vector else scalar.scores(q, k), scalar.Group()
        for h in heads:
            grads: Any
            if scores is None:
                sums = vector.load(decays, h, plan.block, plan.key_dim, plan.strict)
                grads = vector.backward(head(h, q, k), sums, plan.strict)
                dq, dk = grads.dq, grads.dk  # one head a group
            else:
                decay = scalar.decays(plan.size, plan.block, plan.strict, decays, h)
                grads = scalar.backward(head(h, q, k), scores, decay, group)
            dv_ref[:, lanes(h, plan.value_dim)] = grads.dv.astype(dv_ref.dtype)
            carried[h] = grads.dstate
            if dfine_ref:
                form.write_sums(dfine_ref[0], grads, h, plan.block, plan.strict)
        if scores is not None:
            dq, dk = group.finish(q, k)
        dq_ref[:, lanes(g, plan.key_dim)] = dq.astype(dq_ref.dtype)
        dk_ref[:, lanes(g, plan.key_dim)] = dk.astype(dk_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstate_ref[...] = carried[...]
