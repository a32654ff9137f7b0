"""The selective scan chunk by chunk: the states of one chunk's tokens exist at a time.

A scan over chunks carries the state. Inside a chunk all decays and writes are formed, and the
diagonal recurrence runs over them: with the chunk cut into about as many parts as each has tokens,
or on GPUs as a parallel prefix. The chunk's work is rematerialised: the backward pass keeps one
state a chunk and the inputs as they came.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.diagonal_scan.xla import form, time_first
from effjax.kernels.selective_scan.cost import sizes


def run(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    state: jax.Array,
    fresh: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (y [B, T, D], the last state [B, D, N]); padding has zeros in u, dt, B and C."""
    length = u.shape[1]
    size, inner = sizes(length, chunk)
    n = -(-length // size)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [N, C, B, ...]
        x = jnp.moveaxis(x, 1, 0)
        x = jnp.pad(x, [(0, n * size - length)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, size, *x.shape[1:])

    flags = None if fresh is None else split(fresh)
    inside = None if form() == 'prefix' else inner
    one = jax.checkpoint(functools.partial(_chunk, inside), prevent_cse=False)

    def step(state: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        return one(A, state, *at)

    state, y = jax.lax.scan(step, state, (*(split(x) for x in (u, dt, B, C)), flags))
    y = y.reshape(n * size, *y.shape[2:])[:length]
    return checkpoint_name(jnp.moveaxis(y, 0, 1), 'selective_scan_out'), state


def _chunk(
    inner: int | None,
    A: jax.Array,
    state: jax.Array,
    u: jax.Array,
    dt: jax.Array,
    B: jax.Array,
    C: jax.Array,
    fresh: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(the state after the chunk, y [C, B, D]) of inputs [C, B, ...]."""
    u, dt, B, C = (x.astype(A.dtype) for x in (u, dt, B, C))
    decay = jnp.exp(dt[..., None] * A)
    if fresh is not None:
        decay = jnp.where(fresh[..., None, None], 0, decay)
    write = (dt * u)[..., None] * B[:, :, None]
    h = time_first(decay, write, state, False, inner)
    return h[-1], jnp.sum(h * C[:, :, None], axis=-1)
