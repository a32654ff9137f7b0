"""The truth: a token loop in the dtype it is given, float32 or wider."""

import jax
import jax.numpy as jnp


def scan(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(h, last state) of decays and x [B, T, ...] and a state [B, ...]."""
    del chunk

    def token(h: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = at[0] * h + at[1]
        return h, h

    inputs = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0))
    state, h = jax.lax.scan(token, state, inputs, reverse=reverse)
    return jnp.moveaxis(h, 0, 1), state
