"""Attention by hashing from its definition: ranks by counting, and the whole score matrix."""

import jax
import jax.numpy as jnp

from effjax.kernels.lsh_attention.problem import Problem


def attend(
    problem: Problem,
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    buckets_BRHT: jax.Array,
    order_BT: jax.Array,
    segments_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs [B, R, H, T, D] and log-sums [B, R, H, T] of every round."""
    wide = problem.wide
    scores = jnp.einsum('bihd,bjhd->bhij', q_BTHD.astype(wide), k_BTHD.astype(wide))
    seen = jax.vmap(lambda b: _seen(problem, b, order_BT, segments_BT), 1, 1)(buckets_BRHT)
    alone = ~jnp.any(seen, axis=-1, keepdims=True)
    eye = jnp.eye(q_BTHD.shape[1], dtype=bool)
    s = jnp.where(seen, scores[:, None], problem.masked)
    s = jnp.where(alone & eye, 0.0, s)
    weights = jax.nn.softmax(s, axis=-1)
    o = jnp.einsum('brhij,bjhd->brhid', weights, v_BTHD.astype(wide))
    lse = jax.nn.logsumexp(s, axis=-1)
    return o, jnp.where(alone[..., 0], problem.masked, lse)


def _seen(
    problem: Problem, buckets_BHT: jax.Array, order_BT: jax.Array, segments_BT: jax.Array
) -> jax.Array:
    """Returns bool [B, H, T, T]: which tokens (last) each token sees, itself left out."""
    order, document = order_BT[:, None], segments_BT[:, None]
    together = _same(document) & (document != 0)[..., None]
    if problem.by_bucket:
        together &= _same(buckets_BHT)
    # A token's rank is the number of tokens of its group that are sorted before it.
    same_bucket = _same(buckets_BHT)
    earlier = jnp.where(
        same_bucket,
        order[..., None, :] < order[..., :, None],
        buckets_BHT[..., None, :] < buckets_BHT[..., :, None],
    )
    rank = jnp.sum(together & earlier, axis=-1)
    chunk = rank // problem.chunk
    behind = chunk[..., :, None] - chunk[..., None, :]
    seen = together & ((behind == 0) | (behind == 1))
    if problem.causal:
        seen &= order[..., None, :] < order[..., :, None]
    return seen & ~jnp.eye(order_BT.shape[1], dtype=bool)


def _same(x: jax.Array) -> jax.Array:
    return x[..., :, None] == x[..., None, :]
