"""Based: linear attention whose scores are the exponential's Taylor polynomial of degree 2."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.layers.mixers.linear_attention import FeatureAttention


class Based(FeatureAttention):
    """Attention with weights 1 + s + s^2 / 2, s = q . k / sqrt(K), instead of exp(s).

    The linear attention of Based (Arora et al., arXiv 2402.18668). The weights are products of
    features 1, x and x_i x_j, hence sums replace the T x T matrix; they are never below 1/2.
    Equal products x_i x_j and x_j x_i share one feature, so that (K + 1) (K + 2) / 2 of them do
    what the paper's 1 + K + K^2 do. In the paper such layers stand among layers of attention with
    a small window and of gated convolutions: that is a layer pattern, `configs/lm_based.py`.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions K of a head's queries and keys.
      value_dim: dimensions of a head's values; None means width / heads.
      conv: tokens that short convolutions of queries, keys and values see; 0 leaves them out.
      eps: added to the sum of weights.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or sizes that cannot be.
    """

    name = 'based'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int = 16,
        value_dim: int | None = None,
        conv: int = 0,
        eps: float = 1e-6,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if key_dim < 1:
            raise ConfigError(f'based: key_dim is at least 1, not {key_dim}.')
        self._build(ctx, heads, key_dim, value_dim, conv, eps, implementation, rngs)

    @property
    def feature_count(self) -> int:
        """Constant, linear and quadratic features."""
        return (self.key_dim + 1) * (self.key_dim + 2) // 2

    def features(self, x: jax.Array) -> jax.Array:
        """Returns features whose product is the polynomial; formed in float32, of x's dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * self.key_dim**-0.25
        i, j = np.triu_indices(self.key_dim)
        # Off the diagonal a product stands for two: sqrt(2) / sqrt(2).
        factor = np.where(i == j, 0.5**0.5, 1.0).astype(wide.dtype)
        squares = wide[..., i] * wide[..., j] * factor
        return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, squares], -1).astype(x.dtype)
