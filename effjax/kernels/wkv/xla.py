"""RWKV-4's weighted average as one parallel scan over stretches of tokens.

A stretch is (decay, numerator, denominator, m): its log-decay in all, and its two sums times
e^-m, m being the largest exponent inside. Two stretches join by decaying the left one and scaling
both to the larger exponent; no exponential of a positive number is formed. Where a document begins
the decay is so strong that nothing of the left is kept.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.wkv.reference import State, read

_FORGET = -1e30  # log-decay across a document's beginning; a few add up without overflow
_EMPTY = -1e38


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
    decay, ones = jnp.broadcast_to(log_decay, k.shape), jnp.ones_like(k)
    exponent = k
    if real is not None:
        there = real[..., None]
        decay, ones = jnp.where(there, decay, 0), jnp.where(there, ones, 0)
        exponent = jnp.where(there, k, _EMPTY)
    if resets is not None:
        decay = jnp.where(resets[..., None], _FORGET, decay)
    first = (jnp.zeros_like(state[0]), *state)
    tokens = (decay, v * ones, ones, exponent)
    stretches = jax.tree.map(lambda a, b: jnp.concatenate([a[:, None], b], 1), first, tokens)
    _, *sums = jax.lax.associative_scan(_join, stretches, axis=1)
    sums = [checkpoint_name(x, 'wkv_sums') for x in sums]
    seen = [x[:, :-1] for x in sums]
    if resets is not None:  # a document's first token reads nothing
        seen[2] = jnp.where(resets[..., None], _EMPTY, seen[2])
    o = read((seen[0], seen[1], seen[2]), k + bonus, v)
    last = tuple(x[:, -1] for x in sums)
    return checkpoint_name(o, 'wkv_out'), (last[0], last[1], last[2])


def _join(left, right):
    """The stretch of two that follow one another."""
    faded = jnp.maximum(left[3] + right[0], _EMPTY)
    most = jax.lax.stop_gradient(jnp.maximum(faded, right[3]))
    old, new = jnp.exp(faded - most), jnp.exp(right[3] - most)
    return (
        jnp.maximum(left[0] + right[0], _EMPTY),
        left[1] * old + right[1] * new,
        left[2] * old + right[2] * new,
        most,
    )
