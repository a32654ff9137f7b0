"""The Pallas kernel of `hopper` that forms what the transitions read, once both walks are done.

With the matrices of `hopper_system`, S the state before a chunk and Z the gradient of the state
behind it, all chunks at once,
    s = T A_ak v + T a' S,    r = M^T do + Y Z,
what the transitions read and the gradient of the system's right side A_ak v + a' S. The second has
the form of the first, with time turned round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.dplr.hopper_plan import CHUNK, PART, Plan
from effjax.kernels.dplr.hopper_system import System
from effjax.kernels.hopper_inverse import product
from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_chunks import params, place


class _Side(NamedTuple):
    """T A_ak or M [C, C], T a' or Y [C, K], v or do [C, 64], S or Z [K, 64], in either memory."""

    pairs: Any
    keys: Any
    values: Any
    state: Any


def run(plan: Plan, system: System, v, do, states, dstates) -> tuple[jax.Array, jax.Array]:
    """s and r, bfloat16 [B, N * C, H, V].

    Args:
      plan: of the call.
      system: saved.
      v, do: bfloat16 [B, N * C, H, V].
      states: before each chunk, bfloat16 [B, H, N, K, V].
      dstates: gradients of the states behind each chunk, alike.
    """
    batch, length, heads, width = v.shape
    keys, block = plan.key_dim, matrix(CHUNK, PART)
    side = _Side(matrix(CHUNK, CHUNK), matrix(CHUNK, keys), block, matrix(keys, PART))
    there = jax.ShapeDtypeStruct(v.shape, v.dtype)

    def body(*refs: Any) -> None:
        read, owed = _Side(*refs[:4]), _Side(*refs[4:8])
        _solve(plan, (read, owed), refs[8:10], *refs[10:])

    found = plgpu.kernel(
        body,
        out_type=[there, there],
        scratch_types=[[side, side], plgpu.Barrier(num_arrivals=8)],
        grid=(width // PART, length // CHUNK, heads, batch),
        grid_names=('tile', 'chunk', 'head', 'row'),
        kernel_name='dplr_solved',
        compiler_params=params(),
    )(system.found, system.reads, v, states, system.owed, system.writes, do, dstates)
    return found[0], found[1]


def _solve(plan: Plan, inputs: tuple[_Side, _Side], out: Any, shared: Any, arrived: Any) -> None:
    at, columns = place(plan), pl.ds(lax.axis_index('tile') * PART, PART)
    for source, target in zip(inputs, shared, strict=True):
        plgpu.copy_gmem_to_smem(at.own(source.pairs), target.pairs, arrived)
        plgpu.copy_gmem_to_smem(at.tokens(source.keys, at.head), target.keys, arrived)
        plgpu.copy_gmem_to_smem(at.tokens(source.values, at.head, columns), target.values, arrived)
        state = at.own(source.state, slice(None), columns)
        plgpu.copy_gmem_to_smem(state, target.state, arrived)
    plgpu.barrier_wait(arrived)
    read, owed = shared
    for side, pairs in ((read, read.pairs), (owed, owed.pairs.T)):
        found = product((CHUNK, PART), (pairs, side.values), (side.keys, side.state))
        plgpu.commit_smem()  # all warps are through with what was there
        side.values[...] = found.astype(jnp.bfloat16)
    plgpu.commit_smem()
    for side, target in zip(shared, out, strict=True):
        plgpu.copy_smem_to_gmem(side.values, at.tokens(target, at.head, columns))
    plgpu.wait_smem_to_gmem(0)
