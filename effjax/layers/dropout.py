"""Dropout (Srivastava et al., JMLR 2014) with the key that `info` carries."""

import jax
import jax.numpy as jnp

from effjax.core.info import SeqInfo


def dropout(x: jax.Array, rate: float, info: SeqInfo) -> jax.Array:
    """Zeroes elements at `rate` and scales the rest by 1 / (1 - rate), while training only.

    Args:
      x: any array.
      rate: in [0, 1).
      info: `train` and the key; fold it first, so that no two places share a key.

    Raises:
      ValueError: training with a rate above 0 and no key.
    """
    if not rate or not info.train:
        return x
    if info.rng is None:
        raise ValueError('dropout while training needs a PRNG key: set SeqInfo.rng.')
    keep = jax.random.bernoulli(info.rng, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
