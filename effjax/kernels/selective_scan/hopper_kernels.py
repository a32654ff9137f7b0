"""The Pallas kernels of the selective scan for Hopper GPUs (Mosaic GPU).

A warpgroup has 128 channels of a row, each thread one of them with all its states in registers, and
walks over the chunks of tokens, which come through a ring in shared memory by TMA. The backward
kernel keeps the states of one chunk in shared memory. What is to be summed over channels, for the
gradients of the maps, takes their place there, and is summed row by row when the chunk is done.
"""

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.hopper_ring import Part, ring
from effjax.kernels.selective_scan.fused import Inputs
from effjax.kernels.selective_scan.plan import Plan

_LOG2E = math.log2(math.e)  # decays are powers of 2, which the hardware has
_FORWARD_STAGES, _BACKWARD_STAGES = 6, 2  # chunks on their way at a time
_SUMMED = 64  # rows summed over channels at a time


def forward(
    plan: Plan, inputs: Inputs, *, save: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(y [B, T, D], last state [B, N, D], the states before each chunk [B, chunks, N, D])."""
    batch, length, channels = inputs.u.shape
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    out: list[Any] = [inputs.u, inputs.state]
    if save:
        out.append(array((batch, length // plan.size, plan.states, channels)))
    results = _call(
        'forward',
        plan,
        functools.partial(_forward_body, plan, inputs.keep is not None),
        (*_inputs(inputs), inputs.state),
        out,
        [],
        exponentials=1,
    )
    return results[0], results[1], results[2] if save else None


def backward(
    plan: Plan, inputs: Inputs, starts: jax.Array, dy: jax.Array, dlast: jax.Array
) -> tuple[jax.Array, ...]:
    """Gradients of all inputs but `keep`, in their order."""
    batch, length, channels = inputs.u.shape
    array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    maps = array((batch, channels // plan.width, length * plan.states))
    rows = plan.size * plan.states
    du, ddt, dB, dC, dA, dskip, dstate = _call(
        'backward',
        plan,
        functools.partial(_backward_body, plan, inputs.keep is not None),
        (*_inputs(inputs), dy, starts, dlast),
        [inputs.u, inputs.dt, maps, maps, dlast, array((batch, 1, channels)), dlast],
        [plgpu.SMEM((rows, plan.width), jnp.float32)] * 2,
        exponentials=2,
    )
    dB, dC = (jnp.sum(x, axis=1).reshape(batch, length, -1) for x in (dB, dC))
    return du, ddt, jnp.sum(dA, axis=0), dB, dC, jnp.sum(dskip, axis=0), dstate


def _inputs(inputs: Inputs) -> tuple[jax.Array, ...]:
    """Inputs, steps, A for powers of 2, the maps of tokens [B, T, rows], the skip."""
    maps = [inputs.B, inputs.C]
    if inputs.keep is not None:  # in whole 32 bytes
        maps.append(jnp.pad(inputs.keep[..., None], [(0, 0), (0, 0), (0, 7)]))
    return inputs.u, inputs.dt, inputs.A * _LOG2E, jnp.concatenate(maps, axis=2), inputs.skip


def _call(
    name: str,
    plan: Plan,
    body: Any,
    args: Sequence[jax.Array],
    like: Sequence[Any],
    scratch: Sequence[Any],
    *,
    exponentials: int,
) -> Any:
    """Runs a kernel that forms each decay so many times; the results are like some arrays."""
    batch, length, channels = args[0].shape
    elements = batch * length * channels * plan.states
    options: dict[str, Any] = {}
    if 'cost_estimate' in inspect.signature(plgpu.kernel).parameters:  # from jax 0.12 on
        options['cost_estimate'] = pl.CostEstimate(
            flops=4 * elements * exponentials,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in (*args, *like)),
            transcendentals=elements * exponentials,
        )
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like],
        scratch_types=scratch,
        grid=(batch, channels // plan.width),
        grid_names=('rows', 'channels'),
        kernel_name=f'selective_scan_{name}',
        # All layouts are said here; to infer them would take ten times as long.
        # Pallas would put a barrier before and after each store to shared memory, 96 a token. None
        # is needed: no thread reads there what another wrote but behind a `commit_smem`, and what
        # the copy engine reads or writes is ordered by the ring.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        **options,
    )(*args)


class _Walk:
    """One warpgroup's way over the chunks of a row, from the last one if reverse."""

    def __init__(self, plan: Plan, steps: int, reverse: bool):
        self.plan, self.steps, self.reverse = plan, steps, reverse
        self.row, self.column = jax.lax.axis_index('rows'), jax.lax.axis_index('channels')
        self.mine = pl.ds(self.column * plan.width, plan.width)
        self.layout = plgpu.Layout.WG_STRIDED((plan.width,), 1)

    def at(self, n: Any) -> Any:
        return self.steps - 1 - n if self.reverse else n

    def load(self, ref: Any) -> jax.Array:
        """A number a channel [W], float32."""
        return plgpu.load(ref, layout=self.layout).astype(jnp.float32)

    def zeros(self) -> jax.Array:
        return plgpu.layout_cast(jnp.zeros((self.plan.width,), jnp.float32), self.layout)

    def rows(self, size: int) -> Any:
        """Takes a step to its part of so many rows a step."""
        return lambda n: pl.ds(self.at(n) * size, size)

    def tokens(self, ref: Any) -> Part:
        """Of [B, T, D]."""
        plan = self.plan
        shape, rows = (plan.size, plan.width), self.rows(plan.size)
        return Part(lambda n: ref.at[self.row, rows(n), self.mine], shape, ref.dtype)

    def maps(self, ref: Any) -> Part:
        """Of [B, T, rows]."""
        size, width = self.plan.size, ref.shape[2]
        rows = self.rows(size)
        return Part(lambda n: ref.at[self.row, rows(n)], (size, width), ref.dtype)

    def sums(self, ref: Any) -> Part:
        """Of [B, blocks of channels, T * N]."""
        size = self.plan.size * self.plan.states
        rows = self.rows(size)
        return Part(lambda n: ref.at[self.row, self.column, rows(n)], (size,), ref.dtype)

    def start(self, ref: Any) -> Part:
        """Of [B, chunks, N, D]."""
        shape = (self.plan.states, self.plan.width)
        whole = pl.ds(0, self.plan.states)
        return Part(lambda n: ref.at[self.row, self.at(n), whole, self.mine], shape, ref.dtype)

    def state(self, ref: Any) -> list[Any]:
        """References to each state [W] in [B, N, D]."""
        return [ref.at[self.row, i, self.mine] for i in range(self.plan.states)]

    def fixed(self, ref: Any, rows: int) -> list[jax.Array]:
        """Numbers [W] of each of the rows of [rows, D]."""
        return [self.load(ref.at[i, self.mine]) for i in range(rows)]


class _Token:
    """What decides about a token, once read from shared memory: maps, its step, its decays."""

    def __init__(self, plan: Plan, packed: bool, maps: Any, t: Any, dt: jax.Array, A: Any):
        n = plan.states
        self.into = [maps[t, i] for i in range(n)]
        self.out = [maps[t, n + i] for i in range(n)]
        self.decay = [jnp.exp2(dt * a) for a in A]
        if packed:
            self.decay = [d * maps[t, 2 * n] for d in self.decay]


def _forward_body(plan: Plan, packed: bool, *refs: Any) -> None:
    u, dt, A, maps, skip, state, y, last, *starts = refs
    walk = _Walk(plan, u.shape[1] // plan.size, reverse=False)
    rates, (through,) = walk.fixed(A, plan.states), walk.fixed(skip, 1)

    def chunk(n: Any, tiles: Any, results: Any, h: Any) -> Any:
        u_tile, dt_tile, maps_tile = tiles
        if starts:
            for i in range(plan.states):
                starts[0].at[walk.row, n, i, walk.mine][...] = h[i]

        def token(t: Any, h: Any) -> Any:
            step, x = walk.load(dt_tile.at[t]), walk.load(u_tile.at[t])
            here = _Token(plan, packed, maps_tile, t, step, rates)
            write, read, after = step * x, through * x, []
            for decay, into, out, old in zip(here.decay, here.into, here.out, h, strict=True):
                after.append(decay * old + into * write)
                read = read + out * after[-1]
            results[0][t] = read.astype(results[0].dtype)
            return tuple(after)

        return jax.lax.fori_loop(0, plan.size, token, h)

    reads = [walk.tokens(u), walk.tokens(dt), walk.maps(maps)]
    h = tuple(walk.load(r) for r in walk.state(state))
    h = ring(walk.steps, _FORWARD_STAGES, reads, [walk.tokens(y)], chunk, h)
    for target, value in zip(walk.state(last), h, strict=True):
        target[...] = value


def _backward_body(plan: Plan, packed: bool, *refs: Any) -> None:
    u, dt, A, maps, skip, dy, starts, dlast, du, ddt, dB, dC, dA, dskip, dstate, *scratch = refs
    states, written = scratch
    walk = _Walk(plan, u.shape[1] // plan.size, reverse=True)
    rates, (through,) = walk.fixed(A, plan.states), walk.fixed(skip, 1)

    def place(ref: Any, t: Any, i: int) -> Any:
        return ref.at[t * plan.states + i]

    def chunk(n: Any, tiles: Any, results: Any, carry: Any) -> Any:
        u_tile, dt_tile, maps_tile, dy_tile, start = tiles

        def again(t: Any, h: Any) -> Any:
            step, x = walk.load(dt_tile.at[t]), walk.load(u_tile.at[t])
            here, after = _Token(plan, packed, maps_tile, t, step, rates), []
            for i in range(plan.states):
                place(states, t, i)[...] = h[i]
                after.append(here.decay[i] * h[i] + here.into[i] * (step * x))
            return tuple(after)

        first = tuple(walk.load(start.at[i]) for i in range(plan.states))
        jax.lax.fori_loop(0, plan.size, again, first)

        def token(i: Any, carry: Any) -> Any:
            later, rates_grads, through_grad = carry
            t = plan.size - 1 - i
            step, x, read = (walk.load(r.at[t]) for r in (dt_tile, u_tile, dy_tile))
            here, write = _Token(plan, packed, maps_tile, t, step, rates), step * x
            dwrite = dexponent = walk.zeros()
            earlier, grads = [], []
            for i in range(plan.states):
                old = here.decay[i] * walk.load(place(states, t, i))
                g = later[i] + here.out[i] * read
                q = g * old
                place(written, t, i)[...] = g * write
                place(states, t, i)[...] = (old + here.into[i] * write) * read
                dwrite = dwrite + g * here.into[i]
                dexponent = dexponent + q * rates[i]
                earlier.append(here.decay[i] * g)
                grads.append(rates_grads[i] + q * step)
            results[0][t] = (dwrite * step + through * read).astype(results[0].dtype)
            dstep = dwrite * x + dexponent * (1 / _LOG2E)
            results[1][t] = dstep.astype(results[1].dtype)
            return tuple(earlier), tuple(grads), through_grad + read * x

        carry = jax.lax.fori_loop(0, plan.size, token, carry)
        plgpu.commit_smem()  # all channels are there
        for source, target in ((written, results[2]), (states, results[3])):
            _sum_rows(plan, source, target)
        return carry

    reads = [walk.tokens(u), walk.tokens(dt), walk.maps(maps), walk.tokens(dy), walk.start(starts)]
    writes = [walk.tokens(du), walk.tokens(ddt), walk.sums(dB), walk.sums(dC)]
    nothing = walk.zeros()
    carry = tuple(walk.load(r) for r in walk.state(dlast)), (nothing,) * len(rates), nothing
    carry = ring(walk.steps, _BACKWARD_STAGES, reads, writes, chunk, carry)
    later, rates_grads, through_grad = carry
    for ref, values in ((dstate, later), (dA, rates_grads)):
        for target, value in zip(walk.state(ref), values, strict=True):
            target[...] = value
    dskip.at[walk.row, 0, walk.mine][...] = through_grad


def _sum_rows(plan: Plan, source: Any, target: Any) -> None:
    """Writes the sums over channels of rows in shared memory."""
    # Eight threads read 32 channels of a row at a time, four each: no bank of memory twice.
    tiling = plgpu.Tiling(((16, 32), (4, 32), (4,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    for first in range(0, plan.size * plan.states, _SUMMED):
        rows = pl.ds(first, _SUMMED)
        tile = plgpu.load(source.at[rows], layout=layout)
        target.at[rows][...] = jnp.sum(tile, axis=1)
