"""The Pallas kernel of `hopper` that solves each chunk's system, before any state is known.

A block of threads has one chunk of one head. With G the running sums of log-decays and
    A_ij = beta_i e^(G_i - G_j) k_i . k_j  for j < i,    T = (I + A)^-1,
it returns T, U = T beta V and -W = -T beta e^G K, so that what the tokens write, given the state S
before the chunk, is U - W S.

It is formed by `hopper_inverse`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.delta_rule import hopper_blocks as blocks
from effjax.kernels.delta_rule.hopper_blocks import BETA, BY_COLUMN, BY_ROW, SEEN, along
from effjax.kernels.delta_rule.hopper_plan import Plan
from effjax.kernels.hopper_inverse import Room, indices, invert, product
from effjax.kernels.hopper_memory import matrix


class Solved(NamedTuple):
    """T bfloat16 [B, N, H, C, C], -W [B, N * C, H, K] and U [B, N * C, H, V]."""

    inverse: Any
    reads: Any
    values: Any


class _Shared(NamedTuple):
    """Shared memory; each of the last three holds a matrix [C, C] in two parts."""

    k: Any
    v: Any
    rows: Any
    system: Any
    inverse: Any
    between: Any
    arrived: Any


def solve(plan: Plan, k: jax.Array, v: jax.Array, rows: jax.Array) -> Solved:
    """Solves the systems of all chunks.

    Args:
      plan: how the call is cut up.
      k: bfloat16 [B, N * C, H, K].
      v: bfloat16 [B, N * C, H, V].
      rows: float32 [B, H, N, ROWS, C].
    """
    size, shape = plan.size, jax.ShapeDtypeStruct
    batch, heads, chunks = rows.shape[:3]
    inverse = shape((batch, chunks, heads, size, size), k.dtype)
    square = matrix(2, size, size)
    scratch = _Shared(
        matrix(size, plan.key_dim),
        matrix(size, plan.value_dim),
        plgpu.SMEM(rows.shape[3:], jnp.float32),
        square,
        square,
        square,
        plgpu.Barrier(num_arrivals=3),
    )
    found = plgpu.kernel(
        functools.partial(_body, plan),
        out_type=[inverse, shape(k.shape, k.dtype), shape(v.shape, v.dtype)],
        scratch_types=[scratch],
        grid=(chunks, heads, batch),
        grid_names=('chunk', 'head', 'row'),
        kernel_name='delta_rule_system',
        # With layouts named here: finding them takes pallas minutes for so many arrays.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(k, v, rows)
    return Solved(*found)


def _body(plan: Plan, k, v, rows, inverse, reads, values, shared: _Shared) -> None:
    row, head, chunk = (lax.axis_index(n) for n in ('row', 'head', 'chunk'))
    tokens = pl.ds(chunk * plan.size, plan.size)
    plgpu.copy_gmem_to_smem(k.at[row, tokens, head], shared.k, shared.arrived)
    plgpu.copy_gmem_to_smem(v.at[row, tokens, head], shared.v, shared.arrived)
    plgpu.copy_gmem_to_smem(rows.at[row, head, chunk], shared.rows, shared.arrived)
    plgpu.barrier_wait(shared.arrived)
    room = Room(shared.system, shared.inverse, shared.between)
    found = invert(plan.size, _system(plan.size, shared), room)
    square = plan.size, plan.size
    by_value = found * along(plgpu.load(shared.rows.at[BETA], layout=BY_COLUMN), square, 1)
    by_key = by_value * along(plgpu.load(shared.rows.at[SEEN], layout=BY_COLUMN), square, 1)
    # The parts of the system are not needed any more.
    shared.system.at[0][...] = found.astype(jnp.bfloat16)
    shared.between.at[0][...] = by_value.astype(jnp.bfloat16)
    shared.between.at[1][...] = (-by_key).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.system.at[0], inverse.at[row, chunk, head])
    _multiply(shared.between.at[0], shared.v, plan.value_dim)
    _multiply(shared.between.at[1], shared.k, plan.key_dim)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.v, values.at[row, tokens, head])
    plgpu.copy_smem_to_gmem(shared.k, reads.at[row, tokens, head])
    plgpu.wait_smem_to_gmem(0)


def _multiply(by: Any, x: Any, width: int) -> None:
    """Multiplies x [C, width] in place from the left, some columns at a time."""
    step = 64 if width % 128 else 128
    for i in range(0, width, step):
        part = x.at[:, pl.ds(i, step)]
        part[...] = product((x.shape[0], step), (by, part)).astype(jnp.bfloat16)


def _system(size: int, shared: _Shared) -> jax.Array:
    """A, [C, C]."""
    i, j = indices(size)
    beta = along(plgpu.load(shared.rows.at[BETA], layout=BY_ROW), (size, size), 0)
    keys = product((size, size), (shared.k, shared.k.T)) * blocks.between(shared.rows, size)
    return jnp.where(i > j, keys * beta, 0.0)  # what overflows stands where the mask is False
