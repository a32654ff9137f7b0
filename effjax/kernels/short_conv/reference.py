"""The truth: a token loop in float32 (float64 for float64 inputs)."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.documents import begins


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
    del state_given
    wide = jnp.promote_types(x.dtype, jnp.float32)
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    fresh, real = begins(ids), ids != 0

    def rows(flag: jax.Array) -> jax.Array:
        return flag.reshape(-1, *[1] * (x.ndim - 1))

    def token(held: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        x_t, fresh_t, real_t = at
        seen = jnp.where(rows(fresh_t), 0, held)
        seen = jnp.concatenate([seen, x_t[:, None]], axis=1)
        y = jnp.sum(jnp.where(rows(real_t), seen * w.astype(wide), 0), axis=1)
        return jnp.where(rows(real_t), seen[:, 1:], held), y

    inputs = (jnp.swapaxes(x, 0, 1).astype(wide), fresh.T, real.T)
    new, y = jax.lax.scan(token, state.astype(wide), inputs)
    y = jnp.swapaxes(y, 0, 1).astype(x.dtype)
    return y, new.astype(state.dtype) if return_state else None
