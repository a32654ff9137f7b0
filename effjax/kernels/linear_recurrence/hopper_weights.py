"""The Pallas kernel of `hopper_vector` that forms what the walks read, all chunks at once."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from effjax.kernels.hopper_memory import matrix
from effjax.kernels.linear_recurrence.hopper_chunks import (
    SQUARE,
    WGMMA,
    Pairs,
    bounded,
    decayed,
    either,
    firsts,
    keep,
    left,
    number,
    over_levels,
    pairs_of_chunk,
    params,
    place,
)
from effjax.kernels.linear_recurrence.hopper_kernels import product
from effjax.kernels.linear_recurrence.hopper_plan import CHUNK, PART, Plan


def run(plan: Plan, q, k, log_decay) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the walks read.

    Args:
      plan: of the call.
      q, k: bfloat16 [B, N * C, G, K].
      log_decay: float32 [B, N * C, H, K].

    Returns:
      Queries times their decays from the chunk's begin and keys times theirs to its end, bfloat16
      [B, N * C, H, K]; weights of pairs, bfloat16 [B, H, N, C, C]; decays over chunks, float32
      [B, H, N, K].
    """
    batch, length, heads, width = log_decay.shape
    chunks = length // CHUNK
    shape = jax.ShapeDtypeStruct
    keys = shape((batch, length, heads, width), q.dtype)
    shared = _Weights(
        q=matrix(CHUNK, width),
        k=matrix(CHUNK, width),
        decay=matrix(CHUNK, width),
        z=matrix(CHUNK, width),
        square=matrix(*SQUARE),
        kept=plgpu.SMEM((width,), jnp.float32),
        first=plgpu.SMEM((CHUNK,), jnp.float32),
        arrived=plgpu.Barrier(num_arrivals=2),
    )
    out = plgpu.kernel(
        functools.partial(_weights, plan),
        out_type=[
            keys,
            keys,
            shape((batch, heads, chunks, *SQUARE), q.dtype),
            shape((batch, heads, chunks, width), jnp.float32),
        ],
        scratch_types=[shared],
        grid=(chunks, heads, batch),
        grid_names=('chunk', 'head', 'row'),
        kernel_name=f'linear_recurrence_walk{"_strict" * plan.strict}_weights',
        compiler_params=params(),
    )(q, k, log_decay)
    return tuple(out)


class _Weights(NamedTuple):
    """Shared memory of the first kernel."""

    q: Any
    k: Any
    decay: Any
    z: Any
    square: Any
    kept: Any
    first: Any
    arrived: Any


def _weights(plan: Plan, q, k, log_decay, read, written, pairs, kept, shared: _Weights) -> None:
    at = place(plan)
    plgpu.copy_gmem_to_smem(at.tokens(q, at.group), shared.q, shared.arrived)
    plgpu.copy_gmem_to_smem(at.tokens(k, at.group), shared.k, shared.arrived)
    parts = [pl.ds(i, PART) for i in range(0, plan.key_dim, PART)]
    for part in parts:
        decay = bounded(plan, at.tokens(log_decay, at.head, part))
        shared.decay.at[:, part][...] = decay.astype(jnp.bfloat16)
    first = firsts(plan, decay, shared.first)
    keep(parts, shared.decay, shared.z, shared.kept)
    plgpu.barrier_wait(shared.arrived)
    these = pairs_of_chunk(plan)
    found = _weigh(plan, these, parts, first, shared)

    # Queries leave from `z`; keys from the place of queries, which are not needed after them.
    for reach, more, source, target in (
        (these.seen(), first, shared.q, shared.z),
        (these.behind(), None, shared.k, shared.q),
    ):
        reach = left(plan, number(reach), shared.square)
        for part in parts:
            decay = decayed(product(SQUARE, reach, shared.decay.at[:, part]), more)
            x = plgpu.load(source.at[:, part], layout=WGMMA)
            target.at[:, part][...] = x * decay.astype(jnp.bfloat16)
    shared.square[...] = found.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(shared.z, at.tokens(read, at.head))
    plgpu.copy_smem_to_gmem(shared.q, at.tokens(written, at.head))
    plgpu.copy_smem_to_gmem(shared.square, at.own(pairs))
    plgpu.copy_smem_to_gmem(shared.kept, at.own(kept))
    plgpu.wait_smem_to_gmem(0)


def _weigh(plan: Plan, these: Pairs, parts: list[Any], first: Any, shared: _Weights) -> jax.Array:
    """The weights of pairs [C, C], float32, 0 where a token may not look."""
    found = plgpu.layout_cast(jnp.zeros(SQUARE, jnp.float32), WGMMA)
    if not plan.strict:
        found = jnp.where(these.own(), product(SQUARE, shared.q, shared.k.T), 0.0)

    def level(half: Any, found: jax.Array) -> jax.Array:
        reach = left(plan, these.reach(half), shared.square)
        for part in parts:
            right = these.right(half)
            decay = decayed(product(SQUARE, reach, shared.decay.at[:, part]), first, right)
            z = either(right, shared.q.at[:, part], shared.k.at[:, part], decay)
            shared.z.at[:, part][...] = z
        plgpu.commit_smem()
        scores = product(SQUARE, shared.z, shared.z.T)
        return jnp.where(these.across(half), scores, found)

    return jnp.where(these.seen(), over_levels(plan, level, found), 0.0)
