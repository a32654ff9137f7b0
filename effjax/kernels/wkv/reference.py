"""The truth: the recurrence one token after another, in float32 (float64 for float64 inputs)."""

import jax
import jax.numpy as jnp

EMPTY = -1e38  # exponent of a sum that holds nothing
State = tuple[jax.Array, jax.Array, jax.Array]


def run(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    state: State,
    real: jax.Array | None,
    resets: jax.Array | None,
) -> tuple[jax.Array, State]:
    """Returns (o [B, T, D], the state after the last document's last token)."""

    def token(state, at):
        k, v, real, resets = at
        if resets is not None:
            empty = (0.0, 0.0, EMPTY)
            state = tuple(
                jnp.where(resets[:, None], e, x) for e, x in zip(empty, state, strict=True)
            )
        o = read(state, k + bonus, v)
        numerator, denominator, m = state
        most = jax.lax.stop_gradient(jnp.maximum(m + log_decay, k))
        old, own = jnp.exp(m + log_decay - most), jnp.exp(k - most)
        new = (numerator * old + own * v, denominator * old + own, most)
        if real is not None:
            new = tuple(jnp.where(real[:, None], n, x) for n, x in zip(new, state, strict=True))
        return new, o

    by_token = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (k, v, real, resets))
    state, o = jax.lax.scan(token, state, by_token)
    return jnp.moveaxis(o, 0, 1), state


def read(state: State, exponent: jax.Array, v: jax.Array) -> jax.Array:
    """Returns the average of what a state holds and of one more value with its exponent."""
    numerator, denominator, m = state
    most = jax.lax.stop_gradient(jnp.maximum(m, exponent))
    old, own = jnp.exp(m - most), jnp.exp(exponent - most)
    return (numerator * old + own * v) / (denominator * old + own)
