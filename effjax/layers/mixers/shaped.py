"""Shaped attention, the mixer of He and Hofmann's simplified blocks (arXiv 2311.01906)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.layers.linear import Projection, identity, zeros
from effjax.layers.mixers import cache as kv
from effjax.layers.mixers.attention import Attention, State


class ShapedAttention(Attention):
    """`(alpha I + beta A - gamma C) x` in each head, without values or output projection.

    A is softmax attention, C the uniform average over the tokens that A may see (what A is while
    queries are 0), and alpha, beta, gamma are trained, one a head, from 1. Queries start at 0, so
    that the mixer starts as the identity and a block needs no skip connection.

    Args:
      ctx: the model's context.
      heads: heads H, a divisor of the width.
      values: keep the projections of values and output, both starting as the identity.
      qk_norm: RMSNorm over each head of queries and keys.
      implementation: of the attention kernel.

    Raises:
      ConfigError: heads that do not divide the width.
    """

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        values: bool = False,
        qk_norm: bool = False,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.with_values = values
        super().__init__(
            ctx, heads=heads, qk_norm=qk_norm, implementation=implementation, rngs=rngs
        )
        for name in ('alpha', 'beta', 'gamma'):
            value = jnp.ones(heads, ctx.policy.param_dtype)
            setattr(self, name, param(value, ('heads',), no_decay=True))

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        self.query = self._inward(ctx, 'heads', rngs, zeros)
        self.key = self._inward(ctx, 'heads', rngs)
        self.value = self.out = None
        if self.with_values:
            self.value = self._inward(ctx, 'heads', rngs, identity)
            self.out = Projection(
                ctx,
                '...hk,hkd->...d',
                (self.heads, self.head_dim, ctx.width),
                ('heads', 'head_dim', 'embed'),
                bias=self.with_bias,
                init=identity,
                rngs=rngs,
            )

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns an empty cache, and the sum of the current document's values in float32."""
        total = jnp.zeros((batch, self.heads, self.head_dim), jnp.float32)
        return {**super().init_state(batch, max_len, dtype), 'total': total}

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state: the cache, and a float32 sum of the model's width a row."""
        if not self.causal:
            return 0
        return super().state_bytes(batch, max_len, dtype) + 4 * batch * self.width

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; the running average is no product and counts nothing."""
        cost = super().cost(batch, seq_len)
        params = 3 * self.heads
        matmul = 0.0
        if not self.with_values:
            params -= 2 * self.width**2 + (2 * self.width if self.with_bias else 0)
            matmul -= matmul_flops(batch * seq_len, self.width, 2 * self.width)
        return cost + Cost(matmul=matmul, params=params, params_used=params)

    def _values(self, x_BTD: jax.Array) -> jax.Array:
        if self.value is not None:
            return self.value(x_BTD)
        return x_BTD.reshape(*x_BTD.shape[:-1], self.heads, self.head_dim)

    def _output(self, o_BTHD: jax.Array) -> jax.Array:
        if self.out is not None:
            return self.out(o_BTHD)
        return o_BTHD.reshape(*o_BTHD.shape[:-2], self.width)

    def _parallel(self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo) -> jax.Array:
        o = super()._parallel(q, k, v, info)
        if self.causal:
            mean, _ = _running_mean(v, info.segment_ids, None, None)
        else:
            mean = _mean(v, info.segment_ids)
        return self._shape(v, o, mean, info.segment_ids)
