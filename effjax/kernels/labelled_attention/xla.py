"""Attention by labels in plain XLA: no key of a pair is made, and none of T x T within a radius.

A label's part of a score is a product of the query with the label's vector, once a query and label;
what a pair needs of it is picked afterwards. Two forms, by `cost.strategy`:
  dense: the whole score matrix, as one block;
  band: blocks of queries against the blocks of keys that hold those within the radius.
Each takes the second sequence into the same softmax. Scores and softmax are in the wide dtype,
products in the inputs' dtype. Dimensions: N blocks, C tokens of one, M keys that one reads.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.labelled_attention import cost
from effjax.kernels.labelled_attention.problem import Others, Problem


def refuse(problem: Problem) -> None:
    """Runs anything."""
    del problem


def attend(
    problem: Problem,
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    distance_keys: jax.Array,
    others: Others | None,
    segments_BT: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array:
    """Returns [B, T, H, D]."""
    size, beside = problem.length, 0
    if cost.strategy(problem.length, problem.radius) == 'band':
        assert problem.radius is not None
        size = cost.block(problem.radius)
        beside = cost.beside(problem.radius, size)
    # Rematerialised, so that keys and values that several blocks read are not kept so.
    run = jax.checkpoint(by_blocks, static_argnums=(0, 1, 2))
    o = run(
        problem, size, beside, q_BTHD, k_BTHD, v_BTHD, distance_keys, others, segments_BT, rng
    )  # fmt: skip
    return checkpoint_name(o, 'attention_out')


def by_blocks(
    problem: Problem,
    size: int,
    beside: int,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    distance_keys: jax.Array,
    others: Others | None,
    segments: jax.Array | None,
    rng: jax.Array | None,
) -> jax.Array:
    """Blocks of `size` queries, each against its own block and so many `beside` it."""
    batch, length = q.shape[:2]
    q_N, k_N, v_N = (_split(x, size) for x in (q, k, v))
    near_k, near_v = (_near(x, beside) for x in (k_N, v_N))
    scores = jnp.einsum('bnchd,bnmhd->bnhcm', q_N, near_k, preferred_element_type=problem.wide)
    scores += _by_distance(_with_labels(problem, q_N, distance_keys), near_k.shape[2], beside)
    seen = _seen(problem, size, beside, segments)
    scores = jnp.where(seen[:, :, None], scores * problem.scale, problem.masked)
    if others is not None:
        far = _other_scores(problem, q_N, others, size)
        scores = jnp.concatenate([scores, far], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    if problem.dropout:
        assert rng is not None
        keep = jax.random.bernoulli(rng, 1 - problem.dropout, weights.shape)
        weights = jnp.where(keep, weights / (1 - problem.dropout), 0)
    weights, keys = weights.astype(v.dtype), near_k.shape[2]
    o = jnp.einsum('bnhcm,bnmhd->bnchd', weights[..., :keys], near_v)
    if others is not None:
        o += jnp.einsum('bnhcs,bshd->bnchd', weights[..., keys:], others.v)
    return o.reshape(batch, -1, *o.shape[3:])[:, :length]


def _other_scores(problem: Problem, q_N: jax.Array, others: Others, size: int) -> jax.Array:
    """Scores [B, N, H, C, S] with the second sequence."""
    s = jnp.einsum('bnchd,bshd->bnhcs', q_N, others.k, preferred_element_type=problem.wide)
    labels = _split(others.labels, size)[:, :, None]
    by_label = _with_labels(problem, q_N, others.label_keys)
    # Labels are few: a sum that melts into the softmax, where a look-up would be a scatter behind.
    for n in range(others.label_keys.shape[0]):
        s += jnp.where(labels == n, by_label[..., n : n + 1], 0)
    return jnp.where(labels >= 0, s * problem.scale, problem.masked)


def _with_labels(problem: Problem, q_N: jax.Array, keys_LHD: jax.Array) -> jax.Array:
    """Products [B, N, H, C, L] of each query with each label's vector."""
    keys = keys_LHD.astype(q_N.dtype)
    return jnp.einsum('bnchd,lhd->bnhcl', q_N, keys, preferred_element_type=problem.wide)


def _by_distance(s: jax.Array, keys: int, beside: int) -> jax.Array:
    """Turns s [..., C, 2 K + 1] by clipped distance into [..., C, M] by place of the key.

    Key j of a block's M stands j - beside C - a tokens ahead of query a: the distances are drawn
    out to all that occur, then each row is moved one further than the row before.
    """
    queries, reach = s.shape[-2], (s.shape[-1] - 1) // 2
    before = beside * queries + queries - 1
    behind = keys - 1 - beside * queries
    edges = ((before - reach), (behind - reach))
    s = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [edges], mode='edge')
    if queries == 1:
        return s
    wide = s.shape[-1] - 1  # one column less a row moves each row one further
    flat = s.reshape(*s.shape[:-2], -1)[..., queries - 1 : queries - 1 + queries * wide]
    return flat.reshape(*s.shape[:-2], queries, wide)[..., :keys]


def _seen(problem: Problem, size: int, beside: int, segments: jax.Array | None) -> jax.Array:
    """Which keys queries see, bool [B or 1, N, C, M]."""
    blocks = -(-problem.length // size)
    here = jnp.arange(blocks)[:, None] * size
    rows = here + jnp.arange(size)
    columns = here + jnp.arange(-beside * size, (beside + 1) * size)
    seen = ((columns >= 0) & (columns < problem.length))[:, None, :]
    if problem.radius is not None:
        seen = seen & (abs(columns[:, None, :] - rows[:, :, None]) <= problem.radius)
    seen = jnp.broadcast_to(seen, (blocks, size, columns.shape[1]))[None]
    if segments is None:
        return seen
    ids = _split(segments, size)
    return seen & (ids[..., :, None] == _near(ids, beside)[..., None, :])


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...], zeros behind."""
    blocks = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], blocks, size, *x.shape[2:])


def _near(x: jax.Array, beside: int) -> jax.Array:
    """[B, N, C, ...] -> [B, N, M, ...]: each block with those beside it."""
    if not beside:
        return x
    blocks = x.shape[1]
    x = jnp.pad(x, [(0, 0), (beside, beside)] + [(0, 0)] * (x.ndim - 2))
    return jnp.concatenate([x[:, n : n + blocks] for n in range(2 * beside + 1)], axis=2)
