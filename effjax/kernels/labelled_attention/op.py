"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.documents import check_segments, spread
from effjax.kernels.labelled_attention import cost, reference, xla
from effjax.kernels.labelled_attention.problem import Others, Problem, check

_IMPLEMENTATIONS: dict[str, Any] = {'xla': xla, 'reference': reference}


def labelled_attention(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    distance_keys: jax.Array,
    *,
    radius: int | None = None,
    others: Others | None = None,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention whose pairs have labels, and labels vectors that join the keys.

    The score of query i and key j is `scale q_i (k_j + a_label(i, j))` (Shaw et al., arXiv
    1803.02155; Ainslie et al., arXiv 2004.08483). Within the sequence the label is the distance
    j - i, clipped to [-K, K], and a query sees what is at most `radius` away; `others` are a second
    sequence, whose labels say what is seen. One softmax takes both. Looks both ways.

    Args:
      q_BTHD: queries [B, T, H, D].
      k_BTHD: keys [B, T, H, D].
      v_BTHD: values [B, T, H, D].
      distance_keys: [2 K + 1, H, D]: the vector of distance j - i stands at j - i + K.
      radius: how far a query sees to either side, itself always; None: everything.
      others: a second sequence, see `Others`; None: there is none.
      segment_ids: int32 [B, T], the document of each token, which sees its own only; 0 is padding,
        which is never read and whose output is 0. None: one document a row.
      scale: factor on the scores; None means 1 / sqrt(D).
      dropout: rate at which attention weights are dropped; needs `rng`.
      rng: PRNG key for dropout.
      implementation: 'xla', 'reference', or None for the best that can run.

    Returns:
      [B, T, H, D] in the dtype of v.

    Raises:
      ValueError: shapes that do not fit, or an implementation that cannot run this call.
    """
    check(q_BTHD, k_BTHD, v_BTHD, distance_keys, others, radius)
    batch, length, _, head_dim = q_BTHD.shape
    check_segments('labelled_attention', segment_ids, (batch, length))
    if dropout and rng is None:
        raise ValueError('labelled_attention: dropout needs a PRNG key (rng).')
    clip = (distance_keys.shape[0] - 1) // 2
    reach = cost.reach(length, radius, clip)
    problem = Problem(
        length=length,
        radius=radius,
        reach=reach,
        scale=head_dim**-0.5 if scale is None else float(scale),
        dropout=float(dropout),
        wide=jnp.promote_types(q_BTHD.dtype, jnp.float32),
    )
    chosen = choice.pick(
        'labelled_attention',
        implementation,
        {name: module.refuse(problem) for name, module in _IMPLEMENTATIONS.items()},
        {'xla': cost.strategy(length, radius)},
        shape=q_BTHD.shape,
        radius=radius,
        others=0 if others is None else others.k.shape[1],
    )
    with jax.named_scope(f'labelled_attention_{chosen}'):
        o = _IMPLEMENTATIONS[chosen].attend(
            problem, q_BTHD, k_BTHD, v_BTHD, distance_keys[clip - reach : clip + reach + 1], others,
            segment_ids, rng,
        )  # fmt: skip
        if segment_ids is not None:
            o = jnp.where(spread(segment_ids != 0, o), o, 0)
        return o.astype(v_BTHD.dtype)
