"""Token shift, as RWKV has it: a token's input mixed with that of the token before."""

import jax
import jax.numpy as jnp

from effjax.core.info import SeqInfo
from effjax.layers.mixers.cache import last_real


def shifted(
    x_BTD: jax.Array, info: SeqInfo, before: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's predecessor in its document, 0 where it has none.

    A document's tokens stand next to each other: padding lies between documents, or in front of
    the rest of the document that `before` belongs to.

    Args:
      x_BTD: inputs [B, T, D].
      info: of the stretch of tokens.
      before: [B, D], the input before the row's first real token, 0 where that begins a document;
        None is 0.

    Returns:
      (predecessors [B, T, D], 0 at padding; the last real token [B, D], or `before` without one).
    """
    first = jnp.zeros_like(x_BTD[:, 0]) if before is None else before.astype(x_BTD.dtype)
    previous = jnp.concatenate([first[:, None], x_BTD[:, :-1]], axis=1)
    ids = info.segment_ids
    if ids is None:
        return previous, x_BTD[:, -1]
    real = ids != 0
    same = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)))
    previous = jnp.where((real & same)[..., None], previous, 0)
    entry = real & (jnp.cumsum(real, axis=1) == 1)
    previous = jnp.where(entry[..., None], first[:, None], previous)
    some, place = last_real(ids)
    last = jnp.take_along_axis(x_BTD, place[:, None, None], axis=1)[:, 0]
    return previous, jnp.where(some[:, None], last, first)
