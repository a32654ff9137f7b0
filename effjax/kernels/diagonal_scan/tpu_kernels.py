"""The Pallas kernels of the diagonal recurrence for TPUs.

A step of the grid is (row, channels, block of tokens). The blocks of a row follow one another in
the scan's direction, the state staying in VMEM in float32. Inside a block 8 tokens at a time, which
fill a register, are scanned in three doublings; only the last of them is waited for by the next 8.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels.diagonal_scan.plan import ROWS, Plan
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

_HEIGHT = 8  # rows of a register of float32


def forward(
    plan: Plan, reverse: bool, decay: Planes, x: Planes, state: Planes
) -> tuple[Planes, Planes]:
    """(h [B, T, D] in the dtype of x, last state [B, 1, D])."""
    grid = _Grid(plan, x[0].shape, reverse)
    n = len(x)
    out = grid.call(
        'forward',
        functools.partial(_forward_body, reverse, n),
        [grid.tokens(a) for a in (*decay, *x)] + [grid.state(a) for a in state],
        [grid.tokens(a) for a in x] + [grid.state(a) for a in state],
        flops(x),
        exponentials(x),
    )
    return tuple(out[:n]), tuple(out[n:])


def backward(
    plan: Plan, reverse: bool, decay: Planes, h: Planes, state: Planes, dh: Planes, dlast: Planes
) -> tuple[Planes, Planes, Planes]:
    """Gradients of the decays, of x (in the dtype of h) and of the state."""
    grid = _Grid(plan, h[0].shape, not reverse)
    n = len(h)
    out = grid.call(
        'backward',
        functools.partial(_backward_body, not reverse, n),
        [grid.tokens(a) for a in (*decay, *h, *dh)]
        + [grid.tile_ahead(a) for a in h]
        + [grid.state(a) for a in (*state, *dlast)],
        [grid.tokens(a) for a in (*decay, *h)] + [grid.state(a) for a in state],
        2 * flops(h),
        exponentials(h),
    )
    return tuple(out[:n]), tuple(out[n : 2 * n]), tuple(out[2 * n :])


class _Grid:
    """Blocks of arrays over (row, channels, block of tokens), the last against time if reverse."""

    def __init__(self, plan: Plan, shape: tuple[int, ...], reverse: bool):
        self.plan, self.reverse = plan, reverse
        batch, self.length, channels = shape
        self.steps = (batch, channels // plan.width, self.length // plan.size)

    def at(self, n: Any) -> Any:
        """Where the block of tokens of a step stands."""
        return self.steps[2] - 1 - n if self.reverse else n

    def tokens(self, array: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """Of [B, T, D]."""
        shape = (None, self.plan.size, self.plan.width)
        return array, pl.BlockSpec(shape, lambda b, c, n: (b, self.at(n), c))

    def tile_ahead(self, array: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """Of [B, T, D]: the first tile of tokens of the next step's block, any in the last step."""
        tiles, last = self.plan.size // ROWS, self.length // ROWS - 1

        def index(b: Any, c: Any, n: Any) -> Any:
            first = self.at(n) * tiles
            ahead = jnp.maximum(first - 1, 0) if self.reverse else first + tiles
            return b, jnp.minimum(ahead, last), c

        return array, pl.BlockSpec((None, ROWS, self.plan.width), index)

    def state(self, array: jax.Array) -> tuple[jax.Array, pl.BlockSpec]:
        """Of [B, 1, D]."""
        return array, pl.BlockSpec((None, 1, self.plan.width), lambda b, c, n: (b, 0, c))

    def call(
        self, name: str, body: Any, inputs: Any, out: Any, flops: int, exponentials: int
    ) -> Any:
        """Runs a kernel; inputs and out are arrays, or what they are like, and their blocks."""
        arrays, in_specs = zip(*inputs, strict=True)
        like, out_specs = zip(*out, strict=True)
        moved = sum(x.size * x.dtype.itemsize for x in (*arrays, *like))
        return pl.pallas_call(
            body,
            grid=self.steps,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=('parallel', 'parallel', 'arbitrary')
            ),
            cost_estimate=pl.CostEstimate(
                flops=flops, bytes_accessed=moved, transcendentals=exponentials
            ),
            name=f'diagonal_scan_{name}',
        )(*arrays)


def _forward_body(reverse: bool, n: int, *refs: Any) -> None:
    decay, x, state, h, last = (refs[i : i + n] for i in range(0, 5 * n, n))
    _first_step_copies(state, last)

    def rows(at: Any, carry: Planes) -> Planes:
        out, carry = _in_order(reverse, decays(_rows(decay, at)), _rows(x, at), carry)
        _store(h, at, out)
        return carry

    _over_rows(reverse, rows, h[0].shape[0], last)


def _backward_body(reverse: bool, n: int, *refs: Any) -> None:
    """In the direction of this pass what came before a token, an h or the state, stands ahead."""
    decay, h, dh, ahead, state, dlast, da, dx, dstate = (
        refs[i : i + n] for i in range(0, 9 * n, n)
    )
    _first_step_copies(dlast, dstate)
    tiles = h[0].shape[0] // ROWS
    ends = pl.program_id(2) == pl.num_programs(2) - 1
    edge = ROWS - 1 if reverse else 0  # of the tile ahead, the row that is met first
    beyond = tuple(
        jnp.where(ends, s[...], a[...].astype(jnp.float32)[edge : edge + 1])
        for s, a in zip(state, ahead, strict=True)
    )

    def rows(at: Any, carry: Planes) -> Planes:
        next_at = at - 1 if reverse else at + 1
        inside = (next_at >= 0) & (next_at < tiles)
        neighbour = _rows(h, jnp.clip(next_at, 0, tiles - 1))
        met = tuple(
            jnp.where(inside, a[edge : edge + 1], b) for a, b in zip(neighbour, beyond, strict=True)
        )
        a, g = conjugate(decays(_rows(decay, at))), _rows(dh, at)
        c, after = _in_order(reverse, a, times(a, g), carry)
        g = plus(g, _shift(c, carry, reverse))
        _store(dx, at, g)
        before = _shift(_rows(h, at), met, not reverse)
        _store(da, at, decay_gradient(c, g, before))
        return after

    _over_rows(reverse, rows, h[0].shape[0], dstate)


def _first_step_copies(source: Any, target: Any) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _():
        for a, b in zip(source, target, strict=True):
            b[...] = a[...]


def _over_rows(reverse: bool, body: Any, size: int, carried: Any) -> None:
    """Runs a body over the tiles of a block, its carry in from references and out to them."""
    tiles = size // ROWS

    def step(i: Any, carry: Planes) -> Planes:
        return body(tiles - 1 - i if reverse else i, carry)

    after = jax.lax.fori_loop(0, tiles, step, tuple(c[...] for c in carried))
    for c, a in zip(carried, after, strict=True):
        c[...] = a


def _rows(refs: Any, at: Any) -> Planes:
    rows = pl.ds(pl.multiple_of(at * ROWS, ROWS), ROWS)
    return tuple(r[rows, :].astype(jnp.float32) for r in refs)


def _store(refs: Any, at: Any, planes: Planes) -> None:
    rows = pl.ds(pl.multiple_of(at * ROWS, ROWS), ROWS)
    for r, p in zip(refs, planes, strict=True):
        r[rows, :] = p.astype(r.dtype)


def _in_order(reverse: bool, a: Planes, x: Planes, carry: Planes) -> Any:
    """(all states, the last one) of a tile, scanned register by register."""
    out = []
    starts = range(0, ROWS, _HEIGHT)
    for i in reversed(starts) if reverse else starts:
        part = slice(i, i + _HEIGHT)
        h, carry = _scan(tuple(p[part] for p in a), tuple(p[part] for p in x), carry, reverse)
        out.append(h)
    out = out[::-1] if reverse else out
    return tuple(jnp.concatenate(planes, axis=0) for planes in zip(*out, strict=True)), carry


def _scan(a: Planes, x: Planes, carry: Planes, reverse: bool) -> tuple[Planes, Planes]:
    """The states of 8 rows from the one before them, and the last of them [1, W]."""
    shape = a[0].shape
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    past = shape[0] - 1 - row if reverse else row  # rows that the scan has come to before
    reach = 1
    while reach < shape[0]:
        inside = past >= reach
        a_before, x_before = (tuple(_roll(p, reach, reverse) for p in both) for both in (a, x))
        x_before = tuple(jnp.where(inside, p, 0.0) for p in x_before)
        # Beyond the first row a decay of 1, which has no imaginary part.
        a_before = tuple(jnp.where(inside, p, float(i == 0)) for i, p in enumerate(a_before))
        x, a = plus(x, times(a, x_before)), times(a, a_before)
        reach *= 2
    h = plus(x, times(a, carry))
    end = 0 if reverse else shape[0] - 1
    return h, tuple(p[end : end + 1] for p in h)


def _shift(x: Planes, first: Planes, reverse: bool) -> Planes:
    """What the scan came to before each row, `first` before the first."""
    row = jax.lax.broadcasted_iota(jnp.int32, x[0].shape, 0)
    at = row == (x[0].shape[0] - 1 if reverse else 0)
    return tuple(jnp.where(at, f, _roll(p, 1, reverse)) for p, f in zip(x, first, strict=True))


def _roll(x: jax.Array, reach: int, reverse: bool) -> jax.Array:
    """Row t holds what stood `reach` rows before it in the scan's direction."""
    return pltpu.roll(x, x.shape[0] - reach if reverse else reach, 0)
