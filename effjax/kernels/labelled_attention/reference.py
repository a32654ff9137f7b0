"""The equation in float32 (float64 for float64 inputs): each pair has a key of its own."""

import jax
import jax.numpy as jnp

from effjax.kernels.labelled_attention.problem import Others, Problem


def refuse(problem: Problem) -> str | None:
    """The reference runs anything but dropout."""
    return 'it has no dropout' if problem.dropout else None


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
    """Returns [B, T, H, D] in the wide dtype."""
    del rng
    wide, place = problem.wide, jnp.arange(problem.length)
    q, k, v, table = (x.astype(wide) for x in (q_BTHD, k_BTHD, v_BTHD, distance_keys))
    ahead = place[None, :] - place[:, None]
    label = jnp.clip(ahead, -problem.reach, problem.reach) + problem.reach
    scores = _scores(q, k[:, None] + table[label])
    seen = jnp.ones_like(ahead, bool)[None]
    if problem.radius is not None:
        seen &= abs(ahead) <= problem.radius
    if segments_BT is not None:
        seen &= segments_BT[:, :, None] == segments_BT[:, None, :]
    seen = jnp.broadcast_to(seen, (len(q), *ahead.shape))
    if others is not None:
        own = others.label_keys.astype(wide)[jnp.maximum(others.labels, 0)]
        scores = jnp.concatenate([scores, _scores(q, others.k.astype(wide)[:, None] + own)], -1)
        seen = jnp.concatenate([seen, others.labels >= 0], axis=-1)
        v = jnp.concatenate([v, others.v.astype(wide)], axis=1)
    scores = jnp.where(seen[:, None], scores * problem.scale, problem.masked)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum('bhts,bshd->bthd', weights, v, precision='highest')


def _scores(q_BTHD: jax.Array, k_BTSHD: jax.Array) -> jax.Array:
    return jnp.einsum('bthd,btshd->bhts', q_BTHD, k_BTSHD, precision='highest')
