"""The token embedding, whose table may serve as the head too."""

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context


class TokenEmbedding(nnx.Module):
    """One row of a table a token, normal with std 0.02.

    Args:
      ctx: the model's context.
      size: entries of the vocabulary V.
      units: what a row's dimension counts: the model's units, or None where products stand between
        the table and the model (`embed_width`).
    """

    def __init__(self, ctx: Context, size: int, *, units: str | None = 'embed', rngs: nnx.Rngs):
        shape, dtype = (size, ctx.width), ctx.policy.param_dtype
        self.policy = ctx.policy
        table = 0.02 * jax.random.normal(rngs.params(), shape, dtype)
        self.table = param(table, ('vocab', 'embed'), role='table', units=('vocab', units))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns vectors [..., D] of tokens [...] in the compute dtype.

        Rows are cast after the look-up: the table is not copied, and its gradient, in which a
        frequent token sums many rows, adds up in the table's own dtype.
        """
        return self.policy.cast(jnp.take(self.table[...], tokens, axis=0))

    def head_weight(self) -> jax.Array:
        """Returns the tied head's weight [D, V] in the compute dtype (arXiv 1608.05859)."""
        return self.policy.cast(self.table[...]).T
