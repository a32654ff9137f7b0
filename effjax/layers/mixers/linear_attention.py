"""Linear attention: scores are products of features, so that sums replace the T x T matrix."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import linear_recurrence
from effjax.kernels.linear_recurrence.cost import model_flops
from effjax.layers.mixers.recurrent import (
    QueryKeyValue,
    Recurrent,
    State,
    from_heads,
    matrix_memory,
    need_causal,
)


class FeatureAttention(Recurrent):
    """`o_t = sum_{j<=t} s_tj v_j / sum_{j<=t} s_tj` with s_tj = f(q_t) . f(k_j) >= 0.

    A subclass sets `name`, defines the features f, says how many there are, and calls `_build`.
    Sums of values and of weights are kept in one matrix a head, in float32; nothing decays.
    """

    @abc.abstractmethod
    def features(self, x: jax.Array) -> jax.Array:
        """Returns the features [B, T, H, F] of queries or keys [B, T, H, K]."""

    @property
    @abc.abstractmethod
    def feature_count(self) -> int:
        """Number F of features."""

    def _build(
        self,
        ctx: Context,
        heads: int,
        key_dim: int | None,
        value_dim: int | None,
        conv: int,
        eps: float,
        implementation: str | None,
        rngs: nnx.Rngs,
    ) -> None:
        """Checks the arguments that all have in common and makes the projections."""
        need_causal(ctx, self.name)
        if heads < 1 or ((key_dim is None or value_dim is None) and ctx.width % heads):
            raise ConfigError(
                f'{self.name}: heads {heads} do not divide width {ctx.width}; change heads or give '
                'key_dim and value_dim.'
            )
        if eps <= 0:
            raise ConfigError(f'{self.name}: eps is above 0, not {eps}.')
        self.width, self.heads, self.policy = ctx.width, heads, ctx.policy
        self.key_dim = key_dim or ctx.width // heads
        self.value_dim = value_dim or ctx.width // heads
        self.eps, self.implementation = float(eps), implementation
        self.inputs = QueryKeyValue(ctx, heads, self.key_dim, self.value_dim, conv=conv, rngs=rngs)
        self.out = from_heads(ctx, heads, self.value_dim, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns sums of values and, in the last column, of weights, and of the convolutions."""
        sums = matrix_memory(batch, self.heads, self.feature_count, self.value_dim + 1, dtype)
        return {'sums': sums, **self.inputs.memory(batch, dtype)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Linear attention over a stretch of tokens; see `Recurrent.mix`."""
        q, k, v, new = self.inputs(x_BTD, info, memory)
        o, sums = linear_recurrence(
            self.features(q),
            self.features(k),
            jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1),
            initial_state=None if memory is None else memory['sums'],
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        o = o.astype(jnp.promote_types(o.dtype, jnp.float32))
        o = (o[..., :-1] / (o[..., -1:] + self.eps)).astype(v.dtype)
        return self.out(o), {'sums': sums, **new} if return_memory else None

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: four projections, and the sums with a column for weights."""
        tokens, values = batch * seq_len, self.heads * self.value_dim
        features = 2 * self.heads * self.feature_count
        params = self.inputs.params + self.width * values
        return Cost(
            matmul=matmul_flops(tokens, self.width, self.inputs.columns + values),
            scan=model_flops(
                batch, seq_len, self.heads, self.feature_count, self.value_dim + 1, decay=False
            ),
            params=params,
            params_used=params,
            # The input, projections, features, the sums and the output.
            activation_bytes=tokens
            * (self.width + self.inputs.activations + features + 2 * values)
            * self.policy.compute_dtype.itemsize,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


class LinearAttention(FeatureAttention):
    """Linear attention with features elu(x) + 1 (Katharopoulos et al., arXiv 2006.16236).

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions of a head's queries and keys; None means width / heads.
      value_dim: dimensions of a head's values; None means width / heads.
      conv: tokens that short convolutions of queries, keys and values see; 0, as in the paper,
        leaves them out.
      eps: added to the sum of weights.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or sizes that cannot be.
    """

    name = 'linear_attention'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 0,
        eps: float = 1e-6,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self._build(ctx, heads, key_dim, value_dim, conv, eps, implementation, rngs)

    @property
    def feature_count(self) -> int:
        """As many as dimensions of a key."""
        return self.key_dim

    def features(self, x: jax.Array) -> jax.Array:
        """Returns elu(x) + 1, in the dtype of x."""
        return jax.nn.elu(x) + 1
