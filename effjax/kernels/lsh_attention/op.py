"""The public functions: the hash, and attention among what it brings together."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.documents import check_segments
from effjax.kernels.lsh_attention import reference, xla
from effjax.kernels.lsh_attention.problem import Problem

_IMPLEMENTATIONS: dict[str, Any] = {'xla': xla, 'reference': reference}


def lsh_buckets(x_BTHD: jax.Array, rotations: jax.Array) -> jax.Array:
    """Hashes vectors by their direction: `argmax [x R; -x R]` (arXiv 1509.02897).

    Vectors at a small angle meet in a bucket more often than others. Products are float32 (float64
    for float64 inputs); there is no gradient.

    Args:
      x_BTHD: [B, T, H, D].
      rotations: [H, D, R, N / 2], normal: one projection for each of R rounds.

    Returns:
      int32 [B, R, H, T], in [0, N).
    """
    wide = jnp.promote_types(x_BTHD.dtype, jnp.float32)
    x = jax.lax.stop_gradient(x_BTHD).astype(wide)
    turned = jnp.einsum(
        'bthd,hdrn->brhtn', x, rotations.astype(wide), precision=jax.lax.Precision.HIGHEST
    )
    both = jnp.concatenate([turned, -turned], axis=-1)
    return jnp.argmax(both, axis=-1).astype(jnp.int32)


def lsh_attention(
    q: jax.Array,
    v: jax.Array,
    buckets: jax.Array,
    *,
    chunk: int,
    by_bucket: bool = False,
    causal: bool = False,
    order: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of each token to those that a hash puts near it (arXiv 2001.04451).

    In each round a document's tokens are sorted by (bucket, order) and cut into chunks, and a token
    sees its own chunk and the one before. With `by_bucket` the chunks begin with each bucket, and a
    token sees its own bucket only; then, if `causal` too, what a token sees depends on nothing
    behind it. Keys are the queries divided by their length, and scores are not scaled. A token sees
    itself only where it sees nothing else. Rounds are weighted by their softmax sums; a pair that
    meets in several rounds counts in each.

    Scores and sums are float32 (float64 for float64 inputs), products in the inputs' dtype.

    Args:
      q: [B, T, H, D], queries and, normalised, keys.
      v: [B, T, H, D].
      buckets: int [B, R, H, T], of `lsh_buckets`.
      chunk: tokens of a chunk.
      by_bucket: whether chunks begin with each bucket.
      causal: no token sees one that is behind it.
      order: int [B, T], a document's order, such as positions; None is the order in the row.
      segment_ids: int32 [B, T], the document of each token; 0 is padding, which is never read and
        whose output is 0. None: one document a row.
      implementation: 'xla', 'reference', or None for the best that can run.

    Returns:
      [B, T, H, D] in the dtype of v.

    Raises:
      ValueError: shapes that do not fit, a chunk below 1, or an unknown implementation.
    """
    _check(q, v, buckets, chunk)
    check_segments('lsh_attention', segment_ids, q.shape[:2])
    wide = jnp.promote_types(q.dtype, jnp.float32)
    problem = Problem(chunk, by_bucket, causal, segment_ids is not None, wide)
    chosen = choice.pick(
        'lsh_attention',
        implementation,
        dict.fromkeys(_IMPLEMENTATIONS),
        shape=q.shape,
        rounds=buckets.shape[1],
        chunk=chunk,
    )
    if order is None:
        order = jnp.broadcast_to(jnp.arange(q.shape[1], dtype=jnp.int32), q.shape[:2])
    segments = jnp.ones(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    with jax.named_scope(f'lsh_attention_{chosen}'):
        run = _IMPLEMENTATIONS[chosen].attend
        o, lse = run(problem, q, _keys(q, wide), v, buckets, order, segments)
        weights = jax.nn.softmax(lse, axis=1)[..., None]
        out = jnp.swapaxes(jnp.sum(o * weights, axis=1), 1, 2)
        return jnp.where((segments != 0)[..., None, None], out, 0).astype(v.dtype)


def _keys(q: jax.Array, wide: jnp.dtype) -> jax.Array:
    """Returns queries of length 1, in their own dtype; a query of 0 stays 0."""
    x = q.astype(wide)
    size = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
    return (x * size * q.shape[-1] ** -0.5).astype(q.dtype)


def _check(q: jax.Array, v: jax.Array, buckets: jax.Array, chunk: int) -> None:
    batch, length, heads = q.shape[:3]
    fits = buckets.ndim == 4 and (batch, heads, length) == (
        buckets.shape[0],
        *buckets.shape[2:],
    )
    if q.ndim != 4 or v.shape != q.shape or not fits:
        raise ValueError(
            'lsh_attention takes q and v [B, T, H, D] and buckets [B, R, H, T], not '
            f'{q.shape}, {v.shape} and {buckets.shape}.'
        )
    if chunk < 1:
        raise ValueError(f'lsh_attention: chunk must be at least 1, got {chunk}.')
