"""K shifted products, summed: XLA makes one loop over the output of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.documents import last_real, spread


def conv(
    x: jax.Array,
    w: jax.Array,
    state: jax.Array,
    segment_ids: jax.Array | None,
    *,
    state_given: bool,
    return_state: bool,
) -> tuple[jax.Array, Any]:
    """Returns (y, the new state or None); see `op.short_conv`."""
    if segment_ids is not None and state_given:
        x_all, ids_all = _after_padding(x, state, segment_ids)
    else:
        x_all = jnp.concatenate([state.astype(x.dtype), x], axis=1)
        ids_all = None
        if segment_ids is not None:
            ids_all = jnp.pad(segment_ids, ((0, 0), (w.shape[0] - 1, 0)))
    # Rematerialised, so that the shifted copies are not kept for the gradient of w.
    run = jax.checkpoint(functools.partial(_shifted, x.shape[1]))
    y = run(x_all, w, ids_all, segment_ids)
    new = None
    if return_state:
        taps = w.shape[0] - 1
        new = x_all[:, x_all.shape[1] - taps :].astype(state.dtype)
        if segment_ids is not None:
            new = _tail(x_all, ids_all, state, segment_ids)
    return y, new


def _shifted(
    length: int,
    x_all: jax.Array,
    w: jax.Array,
    ids_all: jax.Array | None,
    here: jax.Array | None,
) -> jax.Array:
    """The sum; `here` are the ids of the outputs, other than `ids_all` where the state lies."""
    wide = jnp.promote_types(x_all.dtype, jnp.float32)
    total = jnp.zeros((), wide)
    for k in range(w.shape[0]):
        part = jax.lax.slice_in_dim(x_all, k, k + length, axis=1).astype(wide)
        if ids_all is not None and here is not None:
            same = (ids_all[:, k : k + length] == here) & (here != 0)
            part = jnp.where(spread(same, part), part, 0)
        total = total + part * w[k].astype(wide)
    return total.astype(x_all.dtype)


def _after_padding(
    x: jax.Array, state: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins state and x with the state right in front of each row's first real token."""
    taps = state.shape[1]
    real = segment_ids != 0
    first = jnp.where(real.any(1), jnp.argmax(real, axis=1), 0)
    first_id = jnp.take_along_axis(segment_ids, first[:, None], axis=1)
    back = jnp.arange(taps + x.shape[1])[None] - first[:, None]  # place in the state
    of_state = (back >= 0) & (back < taps)
    padded = jnp.pad(x, [(0, 0), (taps, 0)] + [(0, 0)] * (x.ndim - 2))
    ids = jnp.pad(segment_ids, ((0, 0), (taps, 0)))
    if not taps:
        return padded, ids
    index = spread(jnp.clip(back, 0, taps - 1), padded)
    moved = jnp.take_along_axis(state.astype(x.dtype), index, axis=1)
    return (
        jnp.where(spread(of_state, padded), moved, padded),
        jnp.where(of_state, first_id, ids),
    )


def _tail(x_all: Any, ids_all: Any, state: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The last inputs of the last document, or the old state where a row has no real token."""
    some, last = last_real(segment_ids)
    taps = state.shape[1]
    index = last[:, None] + 1 + jnp.arange(taps)[None]  # of x_all, up to the last real token
    tail = jnp.take_along_axis(x_all, spread(index, x_all), axis=1)
    ids = jnp.take_along_axis(ids_all, index, axis=1)
    last_id = jnp.take_along_axis(segment_ids, last[:, None], axis=1)
    tail = jnp.where(spread(ids == last_id, tail), tail, 0).astype(state.dtype)
    return jnp.where(some.reshape(-1, *[1] * (state.ndim - 1)), tail, state)
