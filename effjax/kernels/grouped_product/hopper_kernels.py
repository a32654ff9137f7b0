"""The Pallas kernels of the grouped product for Hopper GPUs (Mosaic GPU).

Two warpgroups form products of 64 rows each, a third brings in what they multiply, as far ahead as
there is room. Tiles begin at whole units of rows and none reaches over an array's end: one that
would begins earlier, and a block's own rows stand further down in it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.grouped_product.cost import ROWS, STAGES, STEP, UNIT, columns
from effjax.kernels.hopper_memory import matrix

_WORKERS = 2  # warpgroups that multiply
_PART = ROWS // _WORKERS  # rows of each
_REGISTERS = 240, 24  # of a thread that multiplies, of one that brings


def rows(x: jax.Array, w: jax.Array, places: jax.Array, along: int) -> jax.Array:
    """Rows times the matrix of their group.

    Args:
      x: bfloat16 [M, K], or [M, N] with `along` 1; M in whole units.
      w: bfloat16 [E, K, N].
      places: int32 [3, blocks], of each block its group, its first row and how many rows it has;
        group E is that of the rows behind the groups.
      along: the dimension of a matrix that is summed over.

    Returns:
      bfloat16 [M, N], or [M, K]; 0 in the rows of group E.
    """
    width = w.shape[2 - along]
    tile = columns(width)
    ring = matrix(STAGES, _WORKERS, _PART, STEP)
    other = (STEP, tile) if along == 0 else (tile, STEP)
    return plgpu.kernel(
        functools.partial(_rows_body, along),
        out_type=jax.ShapeDtypeStruct((x.shape[0], width), x.dtype),
        scratch_types=[_shared(ring, matrix(STAGES, *other), tile, copies=_WORKERS + 1)],
        grid=(width // tile, places.shape[1]),
        grid_names=('tile', 'block'),
        kernel_name='grouped_product_rows',
        num_threads=_WORKERS + 1,
        thread_name='role',
        compiler_params=_params(),
    )(places, x, w)


def matrices(x: jax.Array, dy: jax.Array, groups: jax.Array) -> jax.Array:
    """The gradient of the matrices, `x^T dy` over the rows of each group.

    Args:
      x: bfloat16 [M, K], M in whole units.
      dy: bfloat16 [M, N].
      groups: int32 [2, E], of each group its first row and how many it has.

    Returns:
      bfloat16 [E, K, N].
    """
    (length, height), width = x.shape, dy.shape[1]
    tile = columns(width)
    ring = matrix(STAGES, _WORKERS, STEP, _PART)
    return plgpu.kernel(
        functools.partial(_matrices_body, length),
        out_type=jax.ShapeDtypeStruct((groups.shape[1], height, width), x.dtype),
        scratch_types=[_shared(ring, matrix(STAGES, STEP, tile), tile, copies=_WORKERS + 1)],
        grid=(width // tile, height // ROWS, groups.shape[1]),
        grid_names=('tile', 'block', 'group'),
        kernel_name='grouped_product_matrices',
        num_threads=_WORKERS + 1,
        thread_name='role',
        compiler_params=_params(),
    )(groups, x, dy)


class _Shared(NamedTuple):
    """Shared memory.

    Attributes:
      left: a ring of the workers' own tiles [stages, workers, ...].
      right: a ring of the tiles that both multiply with.
      out: each worker's results [workers, part, tile].
      full, empty: barriers of the rings' entries.
      masked: a barrier of both workers.
    """

    left: Any
    right: Any
    out: Any
    full: Any
    empty: Any
    masked: Any


def _shared(left: Any, right: Any, tile: int, *, copies: int) -> _Shared:
    return _Shared(
        left,
        right,
        # Not in tiles: a group's last rows may leave from any row on.
        out=plgpu.SMEM((_WORKERS, _PART, tile), jnp.bfloat16),
        full=plgpu.Barrier(num_barriers=STAGES, num_arrivals=copies),
        empty=plgpu.Barrier(num_barriers=STAGES, num_arrivals=_WORKERS),
        masked=plgpu.Barrier(num_arrivals=_WORKERS),
    )


def _params() -> plgpu.CompilerParams:
    return plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane)


def _as_roles(work: Any, bring: Any) -> None:
    """Runs a function of a worker's number in the workers, the other one in the last warpgroup."""
    role = lax.axis_index('role')

    @pl.when(role < _WORKERS)
    def _():
        plgpu.set_max_registers(_REGISTERS[0], action='increase')
        work(role)

    @pl.when(role == _WORKERS)
    def _():
        plgpu.set_max_registers(_REGISTERS[1], action='decrease')
        bring()


def _bring(shared: _Shared, steps: jax.Array, left: Any, right: Any) -> None:
    """Copies tiles into the rings; `left(step, worker)` and `right(step)` are their sources."""

    @pl.loop(0, steps)
    def _(step):
        stage = lax.rem(step, jnp.int32(STAGES))

        @pl.when(step >= STAGES)
        def _():
            plgpu.barrier_wait(shared.empty.at[stage])

        full = shared.full.at[stage]
        for worker in range(_WORKERS):
            plgpu.copy_gmem_to_smem(left(step, worker), shared.left.at[stage, worker], full)
        plgpu.copy_gmem_to_smem(right(step), shared.right.at[stage], full)


def _multiply(
    shared: _Shared, steps: jax.Array, worker: jax.Array, tile: int, multiply: Any
) -> None:
    """Leaves a worker's sum of products [part, tile] in shared memory.

    Args:
      shared: of the block of threads.
      steps: how many products.
      worker: its number.
      tile: columns.
      multiply: starts a step's product, `multiply(accumulator, step, stage)`.
    """

    def total(accumulator):
        def step(i, _):
            stage = lax.rem(i, jnp.int32(STAGES))
            plgpu.barrier_wait(shared.full.at[stage])
            multiply(accumulator, i, stage)
            plgpu.wgmma_wait(1)

            @pl.when(i > 0)  # the product before this one is through
            def _():
                plgpu.barrier_arrive(shared.empty.at[lax.rem(i - 1, jnp.int32(STAGES))])

            return ()

        lax.fori_loop(0, steps, step, ())
        plgpu.wgmma_wait(0)
        return accumulator[...]

    made = pl.run_scoped(total, plgpu.ACC((_PART, tile), jnp.float32))
    target, made = shared.out.at[worker], made.astype(jnp.bfloat16)
    if hasattr(plgpu, 'store'):  # from jax 0.12 on; before, no store was refused for being slow
        plgpu.store(target, made, optimized=False)
    else:
        target[...] = made
    plgpu.commit_smem()


def _rows_body(along: int, places: Any, x: Any, w: Any, y: Any, shared: _Shared) -> None:
    block, tile = lax.axis_index('block'), shared.out.shape[2]
    group, first, own = (places[i, block] for i in range(3))
    groups, length = w.shape[0], x.shape[0]
    steps = jnp.where(group < groups, jnp.int32(x.shape[1] // STEP), 0)
    group, start = jnp.minimum(group, groups - 1), jnp.minimum(_unit(first), length - ROWS)
    wide = pl.ds(lax.axis_index('tile') * tile, tile)

    def left(step: jax.Array, worker: int) -> Any:
        return x.at[pl.ds(start + worker * _PART, _PART), pl.ds(step * STEP, STEP)]

    def right(step: jax.Array) -> Any:
        deep = pl.ds(step * STEP, STEP)
        return w.at[group, deep, wide] if along == 0 else w.at[group, wide, deep]

    def work(worker: jax.Array) -> None:
        def multiply(accumulator: Any, _: Any, stage: jax.Array) -> None:
            other = shared.right.at[stage]
            plgpu.wgmma(
                accumulator, shared.left.at[stage, worker], other if along == 0 else other.T
            )

        _multiply(shared, steps, worker, tile, multiply)
        # The block's own rows among this worker's.
        begin = jnp.clip(first - start - worker * _PART, 0, _PART)
        end = jnp.clip(first + own - start - worker * _PART, 0, _PART)
        _put(shared.out.at[worker], begin, end - begin, y, start + worker * _PART, wide)

    pl.when(own > 0)(lambda: _as_roles(work, lambda: _bring(shared, steps, left, right)))


def _put(source: Any, begin: jax.Array, count: jax.Array, y: Any, start: jax.Array, wide: Any):
    """Copies some rows of a tile out: their number's binary digits tell which copies are made."""
    size = _PART
    while size:
        here = begin

        @pl.when((count & size) != 0)
        def _(here=here, size=size):
            target = y.at[pl.ds(start + here, size), wide]
            plgpu.copy_smem_to_gmem(source.at[pl.ds(here, size)], target)

        begin = begin + (count & size)
        size //= 2
    plgpu.wait_smem_to_gmem(0)


def _unit(row: jax.Array) -> jax.Array:
    """The first row of a row's unit."""
    return row & -UNIT


def _matrices_body(length: int, groups: Any, x: Any, dy: Any, dw: Any, shared: _Shared) -> None:
    group, tile = lax.axis_index('group'), shared.out.shape[2]
    begin, own = groups[0, group], groups[1, group]
    end, low = begin + own, _unit(begin)
    steps = jnp.where(own > 0, lax.div(end - low + (STEP - 1), jnp.int32(STEP)), 0)
    tall = lax.axis_index('block') * ROWS
    wide = pl.ds(lax.axis_index('tile') * tile, tile)

    def start(step: jax.Array) -> jax.Array:
        return jnp.minimum(low + step * STEP, length - STEP)

    def left(step: jax.Array, worker: int) -> Any:
        return x.at[pl.ds(start(step), STEP), pl.ds(tall + worker * _PART, _PART)]

    def right(step: jax.Array) -> Any:
        return dy.at[pl.ds(start(step), STEP), wide]

    def work(worker: jax.Array) -> None:
        def mask(stage: jax.Array, step: jax.Array) -> None:
            """Leaves only the group's rows; both factors, for others need not even be finite."""
            first = jnp.maximum(begin, low + step * STEP) - start(step)
            last = end - start(step)

            def clear(ref: Any) -> None:
                i = plgpu.broadcasted_iota(jnp.int32, ref.shape, 0, layout=plgpu.Layout.WGMMA)
                there = plgpu.load(ref, layout=plgpu.Layout.WGMMA)
                ref[...] = jnp.where((i >= first) & (i < last), there, jnp.bfloat16(0))

            clear(shared.left.at[stage, worker])
            half = tile // _WORKERS
            for part in range(_WORKERS):
                columns_of = shared.right.at[stage, :, pl.ds(part * half, half)]
                pl.when(worker == part)(functools.partial(clear, columns_of))
            plgpu.commit_smem()
            plgpu.barrier_arrive(shared.masked)
            plgpu.barrier_wait(shared.masked)

        def multiply(accumulator: Any, step: jax.Array, stage: jax.Array) -> None:
            pl.when((step == 0) | (step == steps - 1))(lambda: mask(stage, step))
            plgpu.wgmma(accumulator, shared.left.at[stage, worker].T, shared.right.at[stage])

        _multiply(shared, steps, worker, tile, multiply)
        target = dw.at[group, pl.ds(tall + worker * _PART, _PART), wide]
        plgpu.copy_smem_to_gmem(shared.out.at[worker], target)
        plgpu.wait_smem_to_gmem(0)

    _as_roles(work, lambda: _bring(shared, steps, left, right))
