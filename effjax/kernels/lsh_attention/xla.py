"""Attention by hashing in sorted order: blocks of tokens against the few blocks around them.

Tokens are sorted by (document, bucket, order). Chunks may begin anywhere in that order, but two
neighbouring chunks never touch more blocks than `cost.neighbours` lists, so that memory grows with
T C for each round and T x T is never formed.
Dimensions: R rounds, N blocks, C tokens of a block, J tokens of the blocks that it reads.
"""

import jax
import jax.numpy as jnp

from effjax.kernels.lsh_attention import cost
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
    length = q_BTHD.shape[1]
    place, group, chunk, order = _sorted(problem, buckets_BRHT, order_BT, segments_BT)
    size = min(problem.chunk, length)
    count = -(-length // size)
    read = cost.neighbours(
        count,
        by_bucket=problem.by_bucket,
        documents=problem.documents,
        causal=problem.causal,
    )

    def blocks(x: jax.Array, fill: int = 0) -> jax.Array:
        """[B, R, H, T, ...] in sorted order as [B, R, H, N, C, ...]."""
        width = [(0, 0)] * x.ndim
        width[3] = (0, count * size - length)
        return jnp.pad(x, width, constant_values=fill).reshape(
            *x.shape[:3], count, size, *x.shape[4:]
        )

    def around(x: jax.Array, fill: int = 0) -> jax.Array:
        """[B, R, H, N, C, ...] as [B, R, H, N, J, ...]: the blocks that each block reads."""
        return jnp.concatenate([_shift(x, offset, fill) for offset in read], axis=4)

    q, k, v = (blocks(_take(x, place)) for x in (q_BTHD, k_BTHD, v_BTHD))
    # Group 0 is padding, also that which fills the last block.
    facts = [blocks(x) for x in (group, chunk, order, place)]
    seen = _seen(problem, facts, [around(x) for x in facts])
    o, lse = _softmax(problem, q, around(k), around(v), seen)
    o = jnp.where((lse == problem.masked)[..., None], v.astype(o.dtype), o)  # it sees itself
    # Back to the order of the row.
    back = jnp.argsort(place, axis=-1)
    o = o.reshape(*o.shape[:3], count * size, -1)
    lse = lse.reshape(*lse.shape[:3], count * size)
    return (
        jnp.take_along_axis(o, back[..., None], axis=3),
        jnp.take_along_axis(lse, back, axis=3),
    )


def _sorted(
    problem: Problem, buckets_BRHT: jax.Array, order_BT: jax.Array, segments_BT: jax.Array
) -> tuple[jax.Array, ...]:
    """Returns, in sorted order [B, R, H, T]: places in the row, groups, chunks and order.

    A group is what chunks begin with: a document, or a bucket of one. Groups count from 1, padding
    being 0; chunks count from 0 in each group.
    """
    shape = buckets_BRHT.shape

    def spread(x_BT: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x_BT[:, None, None], shape)

    place = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    keys = (spread(segments_BT), buckets_BRHT, spread(order_BT), place)
    document, bucket, order, place = jax.lax.sort(keys, dimension=3, num_keys=3)
    begins = _changes(document)
    if problem.by_bucket:
        begins |= _changes(bucket)
    index = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=3)
    group = jnp.where(document == 0, 0, jnp.cumsum(begins, axis=3))
    return place, group, (index - first) // problem.chunk, order


def _changes(x: jax.Array) -> jax.Array:
    """Returns where a value differs from the one before; true at the beginning."""
    changed = x[..., 1:] != x[..., :-1]
    return jnp.concatenate([jnp.ones_like(x[..., :1], bool), changed], axis=-1)


def _take(x_BTHD: jax.Array, place_BRHT: jax.Array) -> jax.Array:
    """Returns [B, R, H, T, D] in sorted order."""
    x = jnp.swapaxes(x_BTHD, 1, 2)[:, None]
    return jnp.take_along_axis(x, place_BRHT[..., None], axis=3)


def _shift(x: jax.Array, offset: int, fill: int) -> jax.Array:
    """Returns blocks moved so that block n holds block n + offset, or `fill` where none is."""
    width = [(0, 0)] * x.ndim
    count = x.shape[3]
    width[3] = (max(-offset, 0), max(offset, 0))
    start = max(offset, 0)
    padded = jnp.pad(x, width, constant_values=fill)
    return jax.lax.slice_in_dim(padded, start, start + count, axis=3)


def _seen(problem: Problem, ours: list[jax.Array], others: list[jax.Array]) -> jax.Array:
    """Returns bool [B, R, H, N, C, J]: which tokens each token sees, itself left out."""
    (group, chunk, order, place) = (x[..., :, None] for x in ours)
    (their_group, their_chunk, their_order, their_place) = (x[..., None, :] for x in others)
    behind = chunk - their_chunk
    seen = (group == their_group) & (group != 0) & ((behind == 0) | (behind == 1))
    if problem.causal:
        seen &= their_order < order
    return seen & (place != their_place)


def _softmax(
    problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns outputs [..., C, D] and log-sums [..., C], `masked` of a token that sees none."""
    wide = problem.wide
    s = jnp.einsum('...cd,...jd->...cj', q, k, preferred_element_type=wide)
    s = jnp.where(seen, s, problem.masked)
    alone = ~jnp.any(seen, axis=-1)
    top = jax.lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    e = jnp.where(seen, jnp.exp(s - top), 0.0)
    total = jnp.where(alone, 1.0, jnp.sum(e, axis=-1))
    weights = (e / total[..., None]).astype(v.dtype)
    o = jnp.einsum('...cj,...jd->...cd', weights, v, preferred_element_type=wide)
    lse = jnp.where(alone, problem.masked, jnp.log(total) + top[..., 0])
    return o, lse
