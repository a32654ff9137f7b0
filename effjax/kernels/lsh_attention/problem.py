"""What one call of attention by hashing is: its static facts."""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of a call.

    Attributes:
      chunk: tokens of a chunk.
      by_bucket: chunks begin with each bucket, and a token sees its own bucket only.
      causal: a token sees none behind it.
      documents: rows hold several documents, or padding.
      wide: dtype of scores and sums.
    """

    chunk: int
    by_bucket: bool
    causal: bool
    documents: bool
    wide: jnp.dtype

    @property
    def masked(self) -> float:
        """The score of a pair that is not seen; finite, for the sake of gradients."""
        return -0.7 * float(jnp.finfo(self.wide).max)
