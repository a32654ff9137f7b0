"""Longformer: each token sees its neighbourhood, and a few first tokens see all and are seen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import MaskSpec, attention
from effjax.layers.mixers.attention import State
from effjax.layers.mixers.sparse import SparseAttention


class Longformer(SparseAttention):
    """Attention to the tokens less than `reach` away, and with the document's first tokens.

    Beltagy et al., arXiv 2004.05150. Looking both ways, the global tokens' own outputs come from
    queries, keys and values of a second set of projections, as in the paper. In a causal model
    they see what lies before them, with the same projections as all others.

    Args:
      ctx: the model's context.
      heads: query heads H.
      reach: a token sees those less than this away, itself included; the paper's window w, to
        both sides together, is reach = w / 2 + 1.
      global_tokens: first tokens of a document that all see, and that see all.
      dilation: of the tokens within reach only each so-manieth is seen.
      kv_heads: key-value heads G, a divisor of H; None means H.
      head_dim: dimensions of a head; None means width / heads.
      global_projections: whether global tokens have projections of their own; None: where the
        model looks both ways and there are global tokens.
      qk_norm: RMSNorm over each head of queries and keys.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: sizes that cannot be.
    """

    name = 'longformer'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        reach: int = 128,
        global_tokens: int = 1,
        dilation: int = 1,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        global_projections: bool | None = None,
        qk_norm: bool = False,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self._needs(1, reach=reach, dilation=dilation)
        self._needs(0, global_tokens=global_tokens)
        self.reach, self.globals, self.dilation = reach, global_tokens, dilation
        super().__init__(
            ctx, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, bias=bias,
            attention_dropout=attention_dropout, implementation=implementation, rngs=rngs,
        )  # fmt: skip
        wanted = not ctx.causal if global_projections is None else global_projections
        self.apart = bool(wanted and global_tokens and not ctx.causal)
        if self.apart:
            self.global_query = self._inward(ctx, 'heads', branch(rngs, 'global_query'))
            self.global_key = self._inward(ctx, 'kv_heads', branch(rngs, 'global_key'))
            self.global_value = self._inward(ctx, 'kv_heads', branch(rngs, 'global_value'))

    def mask(self) -> tuple[MaskSpec, ...]:
        """Returns the mask of each head, the same for all."""
        one = MaskSpec(
            self.causal,
            self.reach,
            stride=self.dilation if self.dilation > 1 else None,
            global_tokens=self.globals,
        )
        return (one,) * self.heads

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        info: SeqInfo,
        context: Any = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, State | None, dict[str, Any]]:
        """Returns (y [B, T, D], the new state or None, {}); see `layers.mixers`."""
        if not self.apart:
            return super().__call__(
                x_BTD, info=info, context=context, state=state, return_state=return_state
            )
        if context is not None:
            self._across(x_BTD, info, context, state, return_state)
        if state is not None or return_state:
            self._need_causal('decoding state')
        q, k, v = self._project(x_BTD, info)
        o = self._parallel(q, k, v, info)
        return self._output(self._with_globals(o, x_BTD, info)), None, {}

    def _with_globals(self, o: jax.Array, x_BTD: jax.Array, info: SeqInfo) -> jax.Array:
        """Puts the global tokens' own outputs in their places."""
        positions, ids = info.positions, info.segment_ids
        few = ids is None
        rows = min(self.globals, x_BTD.shape[1]) if few else x_BTD.shape[1]
        q = self.global_query(x_BTD[:, :rows])
        k, v = self.global_key(x_BTD), self.global_value(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, positions[:, :rows]), self.rope(k, positions)
        dropout = self.attention_dropout if info.train else 0.0
        rng = jax.random.fold_in(info.rng, 1) if dropout and info.rng is not None else None
        own = attention(
            q, k, v, mask='full', segment_ids=ids, dropout=dropout, rng=rng,
            implementation=self.implementation,
        )  # fmt: skip
        if few:
            return o.at[:, :rows].set(own)
        return jnp.where((positions < self.globals)[..., None, None], own, o)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; scores and values count the pairs that the mask allows."""
        cost = super().cost(batch, seq_len)
        if not self.apart:
            return cost
        inner, inner_kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        params = self.width * (inner + 2 * inner_kv)
        params += (inner + 2 * inner_kv) * self.with_bias
        few, tokens = batch * min(self.globals, seq_len), batch * seq_len
        # Queries of the global tokens, keys and values of all for them; the pairs are those of
        # the mask.
        more = matmul_flops(few, self.width, inner) + matmul_flops(tokens, self.width, 2 * inner_kv)
        item = self.policy.compute_dtype.itemsize
        return dataclasses.replace(
            cost,
            matmul=cost.matmul + more,
            params=cost.params + params,
            params_used=cost.params_used + params,
            activation_bytes=cost.activation_bytes + 2.0 * tokens * inner_kv * item,
        )
