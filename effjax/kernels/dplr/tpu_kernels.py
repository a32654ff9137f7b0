"""The Pallas kernels of `tpu`: their arrays and loops over heads.

A step of the grid is (row, some heads, chunk); the chunks of a row follow one another, the state or
its gradient waiting in VMEM. What happens to one chunk of one head is in `tpu_chunk`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels.decays import Sum
from effjax.kernels.dplr import tpu_chunk
from effjax.kernels.dplr.tpu_plan import Plan
from effjax.kernels.linear_recurrence import tpu_vector as vector
from effjax.kernels.linear_recurrence.tpu_kernels import LIMIT, Blocks, lanes
from effjax.kernels.linear_recurrence.tpu_plan import LEAF

INPUTS = tpu_chunk.Head._fields


def _call(plan: Plan, name: str, body: Any, args, in_specs, out, flops: int):
    """Runs a kernel; `out` is a list of (array's shape and dtype, block)."""
    shapes, out_specs = zip(*out, strict=True)
    batch, chunks = args[0].shape[0], args[0].shape[1] // plan.size
    moved = sum(x.size * x.dtype.itemsize for x in (*args, *shapes))
    each = 2 * (LEAF + plan.levels) * plan.size * plan.key_dim
    return pl.pallas_call(
        functools.partial(body, plan),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0,
            grid=(batch, plan.steps, chunks),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((plan.block, plan.key_dim, plan.value_dim), jnp.float32)],
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=batch * chunks * flops,
            bytes_accessed=moved,
            transcendentals=batch * chunks * plan.heads * each,
        ),
        name=f'dplr_{name}',
    )(*args)


def _tokens(blocks: Blocks) -> list[pl.BlockSpec]:
    """The blocks of a head's inputs."""
    return [blocks.values() if name == 'v' else blocks.keys() for name in INPUTS]


def forward(plan: Plan, inputs: tpu_chunk.Head, sums: Sum, state, *, save: bool) -> Any:
    """(o, last state) and, to `save`, the states before each chunk [B, N, H, K, V]."""
    batch, chunks = inputs.q.shape[0], inputs.q.shape[1] // plan.size
    blocks, shape = Blocks(plan, chunks, reverse=False), jax.ShapeDtypeStruct
    out = [
        (shape(inputs.v.shape, inputs.v.dtype), blocks.values()),
        (shape(state.shape, state.dtype), blocks.ends()),
    ]
    if save:
        every = shape((batch, chunks, *state.shape[1:]), state.dtype)
        out.append((every, blocks.states()))
    return _call(
        plan,
        'forward',
        functools.partial(_forward_body, save),
        [*inputs, *sums, state],
        [*_tokens(blocks), *map(blocks.sums, sums), blocks.ends()],
        out,
        plan.forward_flops,
    )


def backward(plan: Plan, inputs: tpu_chunk.Head, sums: Sum, states, do, dlast) -> Any:
    """(gradients of the inputs, of the initial state, of the sums' fine part)."""
    blocks = Blocks(plan, inputs.q.shape[1] // plan.size, reverse=True)
    tokens, decays = _tokens(blocks), [blocks.sums(x) for x in sums]
    grads = [*zip(inputs, tokens, strict=True), (dlast, blocks.ends()), (sums.fine, decays[1])]
    *given, dstate, dfine = _call(
        plan,
        'backward',
        _backward_body,
        [*inputs, *sums, states, do, dlast],
        [*tokens, *decays, blocks.states(), blocks.values(), blocks.ends()],
        [(jax.ShapeDtypeStruct(x.shape, x.dtype), block) for x, block in grads],
        plan.backward_flops,
    )
    return tpu_chunk.Head(*given), dstate, dfine


def _width(plan: Plan, name: str) -> int:
    return plan.value_dim if name == 'v' else plan.key_dim


def _head(plan: Plan, h: int, refs: Any) -> tpu_chunk.Head:
    named = zip(INPUTS, refs, strict=True)
    return tpu_chunk.Head(*(ref[:, lanes(h, _width(plan, name))] for name, ref in named))


def _forward_body(save: bool, plan: Plan, *refs) -> None:
    inputs, sums = refs[: len(INPUTS)], refs[len(INPUTS) : len(INPUTS) + 2]
    state_ref, o_ref, last_ref, *states_ref, carried = refs[len(INPUTS) + 2 :]

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = state_ref[...]

    if save:
        states_ref[0][...] = carried[...]
    for h in range(plan.block):
        known = vector.load(sums, h, plan.block, plan.key_dim, plan.strict)
        o, after = tpu_chunk.forward(_head(plan, h, inputs), known, carried[h])
        o_ref[:, lanes(h, plan.value_dim)] = o.astype(o_ref.dtype)
        carried[h] = after

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        last_ref[...] = carried[...]


def _backward_body(plan: Plan, *refs) -> None:
    inputs, sums = refs[: len(INPUTS)], refs[len(INPUTS) : len(INPUTS) + 2]
    states_ref, do_ref, dlast_ref, *rest = refs[len(INPUTS) + 2 :]
    *given, dstate_ref, dfine_ref, carried = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        carried[...] = dlast_ref[...]

    for h in range(plan.block):
        known = vector.load(sums, h, plan.block, plan.key_dim, plan.strict)
        do = do_ref[:, lanes(h, plan.value_dim)]
        head = _head(plan, h, inputs)
        grads = tpu_chunk.backward(head, known, do, states_ref[h], carried[h])
        for name, ref, x in zip(INPUTS, given, grads.inputs, strict=True):
            ref[:, lanes(h, _width(plan, name))] = x.astype(ref.dtype)
        vector.write_sums(dfine_ref, grads, h, plan.block, plan.strict)
        carried[h] = grads.dstate

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dstate_ref[...] = carried[...]
