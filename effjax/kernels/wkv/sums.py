"""RWKV-4's weighted average by two diagonal recurrences, of the numerator and the denominator.

With any m_t, the sums times e^-m_t obey
    n_t = e^(m_{t-1} + w - m_t) n_{t-1} + e^(k_t - m_t) v_t,
which is `diagonal_scan`, kernels included. m_t is the largest exponent in the sums,
    m_t = max over j <= t of k_j + (t - j) w = t w + max over j <= t of (k_j - j w),
a running maximum. Far along a row of a fast decay t w is large, and m_t is wrong by its rounding,
so that an exponent may be positive by as much; but the m_t that was found is in both exponents,
and what it is cancels. It is a constant in gradients.
"""

import jax
import jax.numpy as jnp

from effjax.kernels.diagonal_scan import diagonal_scan
from effjax.kernels.wkv.reference import EMPTY, State, read


def run(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    state: State,
    real: jax.Array | None,
    resets: jax.Array | None,
    implementation: str,
) -> tuple[jax.Array, State]:
    """Returns (o [B, T, D], the state after the last document's last token).

    Args:
      k, v, log_decay, bonus, state: as in `op`, of one dtype; `EMPTY` is an empty one's m.
      real: [B, T], tokens that are no padding; None where all are.
      resets: [B, T], tokens that begin a document; None where none do.
      implementation: of `diagonal_scan`.
    """
    numerator, denominator, m = state
    most = jax.lax.stop_gradient(_exponents(k, log_decay, m, real, resets))
    before, most = most[:, :-1], most[:, 1:]
    decay, own = before + log_decay - most, jnp.exp(k - most)
    if real is not None:
        decay = jnp.where(real[..., None], decay, 0)
        own = jnp.where(real[..., None], own, 0)
    if resets is not None:
        decay = jnp.where(resets[..., None], -jnp.inf, decay)
        before = jnp.where(resets[..., None], EMPTY, before)
    start = jnp.concatenate([numerator, denominator], axis=-1)
    sums = diagonal_scan(
        jnp.concatenate([own * v, own], axis=-1),
        jnp.concatenate([decay, decay], axis=-1),
        initial_state=start,
        implementation=implementation,
    )
    seen = jnp.split(jnp.concatenate([start[:, None], sums[:, :-1]], axis=1), 2, axis=-1)
    o = read((seen[0], seen[1], before), k + bonus, v)
    last = jnp.split(sums[:, -1], 2, axis=-1)
    return o, (last[0], last[1], most[:, -1])


def _exponents(
    k: jax.Array,
    log_decay: jax.Array,
    m: jax.Array,
    real: jax.Array | None,
    resets: jax.Array | None,
) -> jax.Array:
    """m before the first token and after each [B, T + 1, D]; about the largest exponents."""
    if real is None:
        age = jnp.arange(1, k.shape[1] + 1, dtype=k.dtype)[None, :, None]
    else:
        age = jnp.cumsum(real, axis=1, dtype=k.dtype)[..., None]
    faded = age * log_decay
    largest = k - faded
    if real is not None:
        largest = jnp.where(real[..., None], largest, EMPTY)
    largest = jnp.concatenate([m[:, None], largest], axis=1)
    if resets is None:
        largest = jax.lax.cummax(largest, axis=1)
    else:
        document = jnp.pad(jnp.cumsum(resets, axis=1), ((0, 0), (1, 0)))[..., None]
        _, largest = jax.lax.associative_scan(_larger, (document, largest), axis=1)
    return largest + jnp.pad(jnp.broadcast_to(faded, k.shape), ((0, 0), (1, 0), (0, 0)))


def _larger(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The larger number of two stretches; where another document begins, the right one."""
    larger = jnp.maximum(left[1], right[1])
    return right[0], jnp.where(left[0] == right[0], larger, right[1])
