"""The Pallas kernels of the diagonal recurrence for Hopper GPUs (Mosaic GPU).

A warpgroup has some channels of a row, each thread its own, and walks over the tokens, whose blocks
come through a ring in shared memory by TMA and leave by it; the state stays in registers. Rows of a
block are read a few at a time before any is written: then they do not wait for one another.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.diagonal_scan.plan import LANES, Plan, stages_for
from effjax.kernels.diagonal_scan.planes import (
    Planes,
    conjugate,
    decay_gradient,
    decays,
    exponentials,
    flops,
    plus,
    times,
)
from effjax.kernels.hopper_ring import Part, ring

_AT_ONCE = 8  # rows read before the first is written


def forward(
    plan: Plan, reverse: bool, decay: Planes, x: Planes, state: Planes
) -> tuple[Planes, Planes]:
    """(h [B, T, D] in the dtype of x, last state [B, 1, D])."""
    n = len(x)
    body = functools.partial(_forward_body, plan, reverse, n)
    counts = flops(x), exponentials(x)
    out = _call('forward', plan, body, (*decay, *x, *state), (*x, *state), *counts)
    return out[:n], out[n:]


def backward(
    plan: Plan, reverse: bool, decay: Planes, h: Planes, state: Planes, dh: Planes, dlast: Planes
) -> tuple[Planes, Planes, Planes]:
    """Gradients of the decays, of x (in the dtype of h) and of the state."""
    n = len(h)
    body = functools.partial(_backward_body, plan, not reverse, n)
    args = (*decay, *h, *dh, *state, *dlast)
    counts = 2 * flops(h), exponentials(h)
    out = _call('backward', plan, body, args, (*decay, *h, *state), *counts)
    return out[:n], out[n : 2 * n], out[2 * n :]


def _call(
    name: str,
    plan: Plan,
    body: Any,
    args: Any,
    like: Sequence[jax.Array],
    flops: int,
    exponentials: int,
) -> tuple[jax.Array, ...]:
    """Runs a kernel over rows and blocks of channels; the results are like some arrays."""
    batch, _, channels = args[0].shape
    moved = sum(a.size * a.dtype.itemsize for a in (*args, *like))
    options: dict[str, Any] = {}
    if 'cost_estimate' in inspect.signature(plgpu.kernel).parameters:  # from jax 0.12 on
        options['cost_estimate'] = pl.CostEstimate(
            flops=flops, bytes_accessed=moved, transcendentals=exponentials
        )
    out = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like],
        grid=(batch, channels // plan.width),
        grid_names=('rows', 'channels'),
        kernel_name=f'diagonal_scan_{name}',
        **options,
    )(*args)
    return tuple(out)


class _Walk:
    """One warpgroup's way over the blocks of a row [T, W], against time if reverse."""

    def __init__(self, plan: Plan, length: int, reverse: bool):
        self.plan, self.reverse = plan, reverse
        self.row, self.column = jax.lax.axis_index('rows'), jax.lax.axis_index('channels')
        self.length, self.steps = length, length // plan.size
        self.layout = plgpu.Layout.WG_STRIDED((plan.width,), plan.width // LANES)

    def part(self, ref: Any, tokens: Any) -> Any:
        """This warpgroup's channels of some tokens of [B, T, D] in memory."""
        width = self.plan.width
        return ref.at[self.row, tokens, pl.ds(self.column * width, width)]

    def block(self, n: Any) -> Any:
        """The tokens of a step's block."""
        at = self.steps - 1 - n if self.reverse else n
        return pl.ds(at * self.plan.size, self.plan.size)

    def ahead(self, n: Any) -> Any:
        """The first token of the next step's block, any in the last step."""
        first = (self.steps - 1 - n if self.reverse else n) * self.plan.size
        ahead = first - 1 if self.reverse else first + self.plan.size
        return pl.ds(jnp.clip(ahead, 0, self.length - 1), 1)

    def load(self, refs: Sequence[Any], row: Any) -> Planes:
        """A row [W], in float32."""
        return tuple(plgpu.load(r.at[row], layout=self.layout).astype(jnp.float32) for r in refs)

    def load_state(self, refs: Sequence[Any]) -> Planes:
        return tuple(plgpu.load(self.part(r, 0), layout=self.layout) for r in refs)

    def store_state(self, refs: Sequence[Any], values: Planes) -> None:
        for r, v in zip(refs, values, strict=True):
            self.part(r, 0)[...] = v

    def groups(self, body: Any, carry: Planes) -> Planes:
        """Runs a body over groups of rows of a block, given as lists in the walk's order."""
        count = self.plan.size // _AT_ONCE

        def step(i: Any, carry: Planes) -> Planes:
            first = (count - 1 - i if self.reverse else i) * _AT_ONCE
            rows = [first + r for r in range(_AT_ONCE)]
            return body(rows[::-1] if self.reverse else rows, carry)

        return jax.lax.fori_loop(0, count, step, carry)

    def run(
        self, body: Any, inputs: Sequence[Any], ahead: Sequence[Any], out: Any, carry: Planes
    ) -> Planes:
        """Runs a body over the blocks of a row, from and to memory.

        Args:
          body: takes the step, blocks of inputs and what is ahead, blocks to write, a carry.
          inputs: references [B, T, D], of which blocks are read.
          ahead: those of which the token beyond a block is read.
          out: those of which blocks are written.
          carry: what the first step takes.
        """
        size, width = self.plan.size, self.plan.width

        def part(ref: Any, tokens: Any, rows: int) -> Part:
            return Part(lambda n: self.part(ref, tokens(n)), (rows, width), ref.dtype)

        reads = [part(r, self.block, size) for r in inputs]
        writes = [part(r, self.block, size) for r in out]
        fetched, written = (
            size * width * sum(p.dtype.itemsize for p in parts) for parts in (reads, writes)
        )
        reads += [part(r, self.ahead, 1) for r in ahead]
        return ring(self.steps, stages_for(fetched, written), reads, writes, body, carry)


def _store(refs: Sequence[Any], row: Any, values: Planes) -> None:
    for r, v in zip(refs, values, strict=True):
        r[row] = v.astype(r.dtype)


def _choose(first: Any, a: Planes, b: Planes) -> Planes:
    """One of two rows, by a scalar."""
    return tuple(
        jnp.where(jnp.broadcast_to(first, x.shape), x, y) for x, y in zip(a, b, strict=True)
    )


def _forward_body(plan: Plan, reverse: bool, n: int, *refs: Any) -> None:
    decay, x, state, h, last = (refs[i : i + n] for i in range(0, 5 * n, n))
    walk = _Walk(plan, x[0].shape[1], reverse)

    def block(_: Any, tiles: Any, results: Any, carry: Planes) -> Planes:
        def rows(at: list[Any], carry: Planes) -> Planes:
            read = [(decays(walk.load(tiles[:n], r)), walk.load(tiles[n:], r)) for r in at]
            states = []
            for a, x in read:
                carry = plus(times(a, carry), x)
                states.append(carry)
            for r, h in zip(at, states, strict=True):
                _store(results, r, h)
            return carry

        return walk.groups(rows, carry)

    carry = walk.run(block, (*decay, *x), (), h, walk.load_state(state))
    walk.store_state(last, carry)


def _backward_body(plan: Plan, reverse: bool, n: int, *refs: Any) -> None:
    """In the direction of this pass what came before a token, an h or the state, stands ahead."""
    decay, h, dh, state, dlast, da, dx, dstate = (refs[i : i + n] for i in range(0, 8 * n, n))
    walk = _Walk(plan, h[0].shape[1], reverse)
    first = walk.load_state(state)
    edge = 0 if reverse else plan.size - 1

    def block(step: Any, tiles: Any, results: Any, carry: Planes) -> Planes:
        a_tile, dh_tile, h_tile, ahead = (tiles[i : i + n] for i in range(0, 4 * n, n))
        beyond = _choose(step == walk.steps - 1, first, walk.load(ahead, 0))

        def rows(at: list[Any], carry: Planes) -> Planes:
            read = [(decays(walk.load(a_tile, r)), walk.load(dh_tile, r)) for r in at]
            following = jnp.clip(at[-1] - 1 if reverse else at[-1] + 1, 0, plan.size - 1)
            before = [walk.load(h_tile, r) for r in (*at[1:], following)]
            before[-1] = _choose(at[-1] == edge, beyond, before[-1])
            grads = []
            for (a, g), h in zip(read, before, strict=True):
                g = plus(g, carry)
                carry = times(conjugate(a), g)
                grads.append((*decay_gradient(carry, g, h), *g))
            for r, both in zip(at, grads, strict=True):
                _store(results, r, both)
            return carry

        return walk.groups(rows, carry)

    carry = walk.run(block, (*decay, *dh, *h), h, (*da, *dx), walk.load_state(dlast))
    walk.store_state(dstate, carry)
