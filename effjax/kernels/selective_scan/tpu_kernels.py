"""The Pallas kernels of the selective scan for TPUs.

A step of the grid is (row, channels, chunk of tokens); the chunks of a row follow one another, the
state [N, W] staying in VMEM. The tokens of a chunk are gone through in turn. What maps a token in
and out lies in a column of an array [B and C and whether to keep, tokens], which a masked sum over
lanes brings in front of the channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels.selective_scan.fused import Inputs
from effjax.kernels.selective_scan.plan import Plan

_LIMIT = 32 * 2**20  # VMEM that the compiler may use
_UNROLL = 8  # tokens whose columns are summed side by side


def forward(
    plan: Plan, inputs: Inputs, *, save: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(y [B, T, D], last state [B, N, D], the states before each chunk [B, chunks, N, D])."""
    grid = _Grid(plan, inputs.u.shape, reverse=False)
    state, width = inputs.state, (plan.size, plan.width)
    out = [grid.tokens(inputs.u), grid.state(state)]
    if save:
        out.append(grid.starts(grid.starts_like()))
    results = grid.call(
        'forward',
        functools.partial(_forward_body, plan, save),
        [*_inputs(grid, inputs), grid.state(state)],
        out,
        [pltpu.VMEM(width, jnp.float32)] * 3,
        exponentials=1,
    )
    return results[0], results[1], results[2] if save else None


def backward(
    plan: Plan, inputs: Inputs, starts: jax.Array, dy: jax.Array, dlast: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients of all inputs but `keep`, in their order."""
    grid = _Grid(plan, inputs.u.shape, reverse=True)
    batch, blocks, _ = grid.steps
    length, n = inputs.u.shape[1], plan.states
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    rows = (plan.size, plan.width)
    du, ddt, dmaps, dA, dskip, dstate = grid.call(
        'backward',
        functools.partial(_backward_body, plan),
        [
            *_inputs(grid, inputs),
            grid.tokens(dy),
            grid.starts(starts),
            grid.state(dlast),
        ],
        [
            grid.tokens(inputs.u),
            grid.tokens(inputs.dt),
            grid.maps_by_block(array((batch, blocks, 2 * n, length))),
            grid.state(array(dlast.shape)),
            grid.state(array((batch, 1, dlast.shape[2]))),
            grid.state(dlast),
        ],
        [pltpu.VMEM(rows, jnp.float32)] * 5 + [pltpu.VMEM((plan.size, n, plan.width), jnp.float32)],
        exponentials=2,
    )
    dB, dC = jnp.split(jnp.sum(dmaps, axis=1).swapaxes(1, 2), 2, axis=2)
    return du, ddt, jnp.sum(dA, axis=0), dB, dC, jnp.sum(dskip, axis=0), dstate


Block = tuple[Any, pl.BlockSpec]


class _Grid:
    """Blocks of arrays over (row, channels, chunk), the chunks from the last one if reverse."""

    def __init__(self, plan: Plan, shape: tuple[int, ...], reverse: bool):
        self.plan, self.reverse = plan, reverse
        batch, length, channels = shape
        self.steps = (batch, channels // plan.width, length // plan.size)

    def at(self, n: Any) -> Any:
        return self.steps[2] - 1 - n if self.reverse else n

    def tokens(self, array: Any) -> Block:
        """Of [B, T, D]."""
        shape = (None, self.plan.size, self.plan.width)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, self.at(n), c))

    def state(self, array: Any) -> Block:
        """Of [B, N, D]."""
        shape = (None, array.shape[1], self.plan.width)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, 0, c))

    def channels(self, array: Any) -> Block:
        """Of [N, D]."""
        shape = (array.shape[0], self.plan.width)
        return array, pl.BlockSpec(shape, lambda b, c, n: (0, c))

    def maps(self, array: Any) -> Block:
        """Of [B, rows, T]."""
        shape = (None, array.shape[1], self.plan.size)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, 0, self.at(n)))

    def maps_by_block(self, array: Any) -> Block:
        """Of [B, blocks of channels, rows, T]."""
        shape = (None, None, array.shape[2], self.plan.size)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, c, 0, self.at(n)))

    def starts(self, array: Any) -> Block:
        """Of [B, chunks, N, D]."""
        shape = (None, None, self.plan.states, self.plan.width)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, self.at(n), 0, c))

    def starts_like(self) -> jax.ShapeDtypeStruct:
        batch, blocks, chunks = self.steps
        shape = (batch, chunks, self.plan.states, blocks * self.plan.width)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def call(
        self,
        name: str,
        body: Any,
        inputs: Sequence[Block],
        out: Sequence[Block],
        scratch: Sequence[Any],
        *,
        exponentials: int,
    ) -> Any:
        """Runs a kernel that forms each decay so many times."""
        arrays, in_specs = zip(*inputs, strict=True)
        like, out_specs = zip(*out, strict=True)
        moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *like))
        batch, blocks, chunks = self.steps
        plan = self.plan
        elements = batch * blocks * chunks * plan.size * plan.width * plan.states
        return pl.pallas_call(
            body,
            grid=self.steps,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=4 * elements * exponentials,  # of the recurrence and its read-out
                bytes_accessed=moved,
                transcendentals=exponentials * elements,
            ),
            name=f'selective_scan_{name}',
        )(*arrays)


def _inputs(grid: _Grid, inputs: Inputs) -> list[Block]:
    """Steps, inputs, A, the maps, the skip."""
    maps = [jnp.swapaxes(x, 1, 2) for x in (inputs.B, inputs.C)]
    if inputs.keep is not None:  # a register of its own, the first row of it used
        maps.append(jnp.pad(inputs.keep[:, None], [(0, 0), (0, 7), (0, 0)]))
    return [
        grid.tokens(inputs.u),
        grid.tokens(inputs.dt),
        grid.channels(inputs.A),
        grid.maps(jnp.concatenate(maps, axis=1)),
        grid.channels(inputs.skip),
    ]


def _column(maps: Any, t: Any, states: int) -> tuple[jax.Array, jax.Array, Any]:
    """(B [N, 1], C [N, 1], whether to keep [1, 1] or None) of a token."""
    every = maps[...]
    lane = jax.lax.broadcasted_iota(jnp.int32, every.shape, 1)
    column = jnp.sum(jnp.where(lane == t, every, 0.0), axis=1, keepdims=True)
    keep = column[2 * states : 2 * states + 1] if every.shape[0] > 2 * states else None
    return column[:states], column[states : 2 * states], keep


def _decay(dt: jax.Array, A: jax.Array, keep: Any) -> jax.Array:
    decay = jnp.exp(dt * A)
    return decay if keep is None else decay * keep


def _in_turn(size: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    return jax.lax.fori_loop(0, size, body, carry, unroll=_UNROLL)


def _forward_body(plan: Plan, save: bool, u, dt, A, maps, skip, state, y, last, *rest) -> None:
    *starts, steps, writes, reads = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        last[...] = state[...]

    if save:
        starts[0][...] = last[...]
    steps[...] = dt[...].astype(jnp.float32)
    writes[...] = steps[...] * u[...].astype(jnp.float32)

    def token(t: Any, h: jax.Array) -> jax.Array:
        into, out, keep = _column(maps, t, plan.states)
        row = pl.ds(t, 1)
        h = _decay(steps[row], A[...], keep) * h + into * writes[row]
        reads[row] = jnp.sum(out * h, axis=0, keepdims=True)
        return h

    last[...] = _in_turn(plan.size, token, last[...])
    y[...] = (reads[...] + skip[...] * u[...].astype(jnp.float32)).astype(y.dtype)


def _backward_body(plan: Plan, *refs: Any) -> None:
    u, dt, A, maps, skip, dy, starts, dlast, *rest = refs
    du, ddt, dmaps, dA, dskip, dstate, steps, inputs, reads, dwrites, dsteps, states = rest
    n = plan.states

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate[...] = dlast[...]
        dA[...] = jnp.zeros_like(dA)
        dskip[...] = jnp.zeros_like(dskip)

    for target, source in ((steps, dt), (inputs, u), (reads, dy)):
        target[...] = source[...].astype(jnp.float32)

    def again(t: Any, h: jax.Array) -> jax.Array:
        into, _, keep = _column(maps, t, n)
        row = pl.ds(t, 1)
        states[t] = h
        return _decay(steps[row], A[...], keep) * h + into * (steps[row] * inputs[row])

    _in_turn(plan.size, again, starts[...])
    lane = jax.lax.broadcasted_iota(jnp.int32, (2 * n, plan.size), 1)

    def token(i: Any, carry: Any) -> Any:
        later, dA, dmaps = carry
        t = plan.size - 1 - i
        into, out, keep = _column(maps, t, n)
        row = pl.ds(t, 1)
        step, x, read = steps[row], inputs[row], reads[row]
        decay = _decay(step, A[...], keep)
        old = decay * states[t]
        g = later + out * read
        q = g * old
        written = jnp.sum(g * (step * x), axis=1, keepdims=True)
        seen = jnp.sum((old + into * (step * x)) * read, axis=1, keepdims=True)
        dmaps = jnp.where(lane == t, jnp.concatenate([written, seen], axis=0), dmaps)
        dwrite = jnp.sum(g * into, axis=0, keepdims=True)
        dwrites[row] = dwrite
        dsteps[row] = dwrite * x + jnp.sum(q * A[...], axis=0, keepdims=True)
        return decay * g, dA + q * step, dmaps

    carry = (dstate[...], dA[...], jnp.zeros((2 * n, plan.size), jnp.float32))
    dstate[...], dA[...], dmaps[...] = _in_turn(plan.size, token, carry)
    du[...] = (dwrites[...] * steps[...] + skip[...] * reads[...]).astype(du.dtype)
    ddt[...] = dsteps[...].astype(ddt.dtype)
    dskip[...] += jnp.sum(reads[...] * inputs[...], axis=0, keepdims=True)
