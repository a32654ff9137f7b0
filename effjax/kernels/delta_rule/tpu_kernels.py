"""The Pallas kernels of `tpu`: their grids, blocks and loops over heads and chunks.

A step of the grid is (row, some heads, chunk); the chunks of a row follow one another, the state or
its gradient waiting in VMEM. What happens to one chunk of one head is in `tpu_chunk`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels.decays import Sum
from effjax.kernels.delta_rule import tpu_chunk
from effjax.kernels.delta_rule.tpu_plan import Plan
from effjax.kernels.linear_recurrence import tpu_scalar as scalar

_LIMIT = 56 * 2**20  # VMEM that the compiler may use: v5p has 64 MiB, v5e and v6e 128


class _Blocks:
    """The blocks of a kernel's arrays, over a grid of (row, step over heads, chunk)."""

    def __init__(self, plan: Plan, chunks: int, reverse: bool):
        self.plan = plan
        self.at: Callable[[Any], Any] = (lambda n: chunks - 1 - n) if reverse else (lambda n: n)

    def tokens(self, dim: int) -> pl.BlockSpec:
        """Of [B, N * C, H * dim]."""
        shape = (None, self.plan.size, self.plan.block * dim)
        return pl.BlockSpec(shape, lambda b, j, n: (b, self.at(n), j))

    def inputs(self) -> list[pl.BlockSpec]:
        """Of q, k and v."""
        keys, values = self.tokens(self.plan.key_dim), self.tokens(self.plan.value_dim)
        return [keys, keys, values]

    def rows(self) -> pl.BlockSpec:
        """Of numbers a token and head [B, steps, N, block, C]."""
        shape = (None, None, None, self.plan.block, self.plan.size)
        return pl.BlockSpec(shape, lambda b, j, n: (b, j, self.at(n), 0, 0))

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


def _call(plan: Plan, name: str, body: Any, chunks: int, args, in_specs, out, flops, decays):
    """Runs a kernel; `out` is a list of (array's shape and dtype, block)."""
    shapes, out_specs = zip(*out, strict=True)
    batch = args[0].shape[0]
    moved = sum(x.size * x.dtype.itemsize for x in (*args, *shapes))
    exponentials = batch * chunks * plan.heads * plan.size**2 if decays else 0
    return pl.pallas_call(
        functools.partial(body, plan, decays),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(batch, plan.steps, chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((plan.block, plan.key_dim, plan.value_dim), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=batch * chunks * flops, bytes_accessed=moved, transcendentals=exponentials
        ),
        name=f'delta_rule_{name}',
    )(*args)


def forward(plan: Plan, q, k, v, beta, sums: Sum | None, state, *, save: bool) -> Any:
    """(o, last state) and, to `save`, the states before each chunk [B, N, H, K, V]."""
    chunks = q.shape[1] // plan.size
    blocks = _Blocks(plan, chunks, reverse=False)
    each = [beta] if sums is None else [beta, *sums]
    shape = jax.ShapeDtypeStruct
    out = [
        (shape(v.shape, v.dtype), blocks.tokens(plan.value_dim)),
        (shape(state.shape, state.dtype), blocks.ends()),
    ]
    if save:
        every = shape((q.shape[0], chunks, *state.shape[1:]), state.dtype)
        out.append((every, blocks.states()))
    return _call(
        plan,
        'forward',
        functools.partial(_forward_body, save),
        chunks,
        [q, k, v, *each, state],
        [*blocks.inputs(), *[blocks.rows()] * len(each), blocks.ends()],
        out,
        plan.forward_flops,
        sums is not None,
    )


def backward(plan: Plan, q, k, v, beta, sums: Sum | None, states, do, dlast) -> Any:
    """(dq, dk, dv, dbeta, gradient of the initial state, [that of the sums' fine part])."""
    chunks = q.shape[1] // plan.size
    blocks = _Blocks(plan, chunks, reverse=True)
    each = [beta] if sums is None else [beta, *sums]
    rows, ends = blocks.rows(), blocks.ends()
    grads = [*zip((q, k, v), blocks.inputs(), strict=True), (beta, rows), (dlast, ends)]
    if sums is not None:
        grads.append((sums.fine, rows))
    dq, dk, dv, dbeta, dstate, *dfine = _call(
        plan,
        'backward',
        _backward_body,
        chunks,
        [q, k, v, *each, states, do, dlast],
        [*blocks.inputs(), *[rows] * len(each), blocks.states(), blocks.inputs()[2], ends],
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), block) for x, block in grads],
        plan.backward_flops,
        sums is not None,
    )
    return dq, dk, dv, dbeta, dstate, dfine


def _at(head: int, width: int) -> slice:
    """The lanes of a head."""
    return slice(head * width, (head + 1) * width)


def _head(plan: Plan, h: int, inputs: Any, sums: Any) -> tpu_chunk.Head:
    q_ref, k_ref, v_ref, beta_ref = inputs
    keys, values = _at(h, plan.key_dim), _at(h, plan.value_dim)
    beta = scalar.as_column(beta_ref[h : h + 1, :])
    decay = scalar.decays(plan.size, plan.block, False, sums, h)
    return tpu_chunk.Head(q_ref[:, keys], k_ref[:, keys], v_ref[:, values], beta, decay)


def _forward_body(save: bool, plan: Plan, decays: bool, *refs) -> None:
    inputs, sums = refs[:4], refs[4 : 6 if decays else 4]
    state_ref, o_ref, last_ref, *states_ref, carried = refs[4 + len(sums) :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    if save:
        states_ref[0][...] = carried[...]
    for h in range(plan.block):
        o, after = tpu_chunk.forward(_head(plan, h, inputs, sums), carried[h])
        o_ref[:, _at(h, plan.value_dim)] = o.astype(o_ref.dtype)
        carried[h] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried[...]


def _backward_body(plan: Plan, decays: bool, *refs) -> None:
    inputs, sums = refs[:4], refs[4 : 6 if decays else 4]
    states_ref, do_ref, dlast_ref, *out, carried = refs[4 + len(sums) :]
    dq_ref, dk_ref, dv_ref, dbeta_ref, dstate_ref, *dfine_ref = out

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast_ref[...]

    for h in range(plan.block):
        keys, values = _at(h, plan.key_dim), _at(h, plan.value_dim)
        head = _head(plan, h, inputs, sums)
        grads = tpu_chunk.backward(head, do_ref[:, values], states_ref[h], carried[h])
        dq_ref[:, keys] = grads.dq.astype(dq_ref.dtype)
        dk_ref[:, keys] = grads.dk.astype(dk_ref.dtype)
        dv_ref[:, values] = grads.dv.astype(dv_ref.dtype)
        dbeta_ref[h : h + 1, :] = grads.dbeta
        if dfine_ref:
            dfine_ref[0][h : h + 1, :] = grads.dsums
        carried[h] = grads.dstate

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstate_ref[...] = carried[...]
