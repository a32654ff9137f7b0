"""The inputs of one call, checked, with what is static about them kept apart."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Others(NamedTuple):
    """A second sequence that every query may read, by labels instead of distances.

    Attributes:
      k: keys [B, S, H, D].
      v: values [B, S, H, D].
      label_keys: [L, H, D], what a label adds to the key of a pair.
      labels: int32 [B, T, S], the label of each pair, in [0, L); -1: the query does not see the
        key. They are the mask: documents and structure are said by them.
    """

    k: jax.Array
    v: jax.Array
    label_keys: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a call.

    Attributes:
      length: tokens T of the sequence itself.
      radius: how far a query sees in it; None: all of it.
      reach: the largest distance with a key of its own; those beyond it share the last one's.
      scale: factor on the scores.
      dropout: rate at which attention weights are dropped.
      wide: dtype of scores and softmax.
    """

    length: int
    radius: int | None
    reach: int
    scale: float
    dropout: float
    wide: jnp.dtype

    @property
    def masked(self) -> float:
        """The score of a pair that may not attend; finite, so that gradients stay so too."""
        return -0.7 * float(jnp.finfo(self.wide).max)


def check(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    distance_keys: jax.Array,
    others: Others | None,
    radius: int | None,
) -> None:
    """Checks shapes and dtypes.

    Raises:
      ValueError: what does not fit.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            f'labelled_attention takes q, k and v [B, T, H, D], not {q.shape}, {k.shape} and '
            f'{v.shape}.'
        )
    batch, length, *head = q.shape
    table = distance_keys.shape
    if len(table) != 3 or table[0] % 2 == 0 or list(table[1:]) != head:
        raise ValueError(
            'labelled_attention: distance_keys are [2 K + 1, H, D], for distances from -K to K, '
            f'not {table} with q {q.shape}.'
        )
    if radius is not None and radius < 0:
        raise ValueError(f'labelled_attention: radius must not be negative, got {radius}.')
    if others is None:
        return
    count = others.k.shape[1] if others.k.ndim == 4 else -1
    wanted = ((batch, count, *head), (batch, count, *head), (batch, length, count))
    found = (others.k.shape, others.v.shape, others.labels.shape)
    integers = jnp.issubdtype(others.labels.dtype, jnp.integer)
    if found != wanted or list(others.label_keys.shape[1:]) != head or not integers:
        raise ValueError(
            'labelled_attention: others have k and v [B, S, H, D], label_keys [L, H, D] and '
            f'integer labels [B, T, S], not {found[0]}, {found[1]}, {others.label_keys.shape} and '
            f'{others.labels.dtype} {found[2]} with q {q.shape}.'
        )
