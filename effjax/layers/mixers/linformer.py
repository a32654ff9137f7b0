"""Linformer: softmax attention over keys and values whose length is projected down."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels.attention.cost import attention_flops
from effjax.layers.mixers.whole import WholeRow


class Linformer(WholeRow):
    """`softmax(q (E k)^T / sqrt(D)) (F v)`, E and F being R x T (Wang et al., arXiv 2006.04768).

    E and F are trained for `ctx.max_len` places; a shorter row takes their first columns, of which
    there are as many as it has tokens. Rotary positions turn queries and keys before E.

    Args:
      ctx: the model's context, which must not be causal.
      heads: heads H.
      rank: rows R that the length is projected to.
      share: 'none' has an E and an F of its own for each head, 'heads' one E and one F for all
        heads, 'key_value' one matrix that is both. The paper's sharing over layers is `share` of
        the model.
      head_dim: dimensions of a head; None means width / heads.
      bias: whether projections of the width carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: a causal model, or sizes that cannot be.
    """

    name = 'linformer'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        rank: int = 64,
        share: Literal['none', 'heads', 'key_value'] = 'heads',
        head_dim: int | None = None,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self._check_context(ctx)
        if rank < 1:
            raise ConfigError(f'linformer: rank must be at least 1, got {rank}.')
        super().__init__(
            ctx, heads=heads, head_dim=head_dim, bias=bias, attention_dropout=attention_dropout,
            implementation=implementation, rngs=rngs,
        )  # fmt: skip
        self.rank, self.share = rank, share
        self.shrink_key = self._shrink(ctx, branch(rngs, 'shrink_key'))
        self.shrink_value = (
            None if share == 'key_value' else self._shrink(ctx, branch(rngs, 'shrink_value'))
        )

    def _shrink(self, ctx: Context, rngs: nnx.Rngs) -> nnx.Param:
        """A matrix that keeps the size of what it sums: normal with std 1 / sqrt(max_len)."""
        shape: tuple[int, ...] = (self.rank, ctx.max_len)
        axes: tuple[str | None, ...] = ('rank', 'position')
        if self.share == 'none':
            shape, axes = (self.heads, *shape), ('heads', *axes)
        draw = jax.random.normal(rngs.params(), shape, ctx.policy.param_dtype)
        return param(ctx.max_len**-0.5 * draw, axes)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: keys and values are shrunk to R, which T queries score."""
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        matrices = (1 if self.shrink_value is None else 2) * self.rank * self.max_len
        params = 4 * self.width * inner + matrices * (self.heads if self.share == 'none' else 1)
        if self.with_bias:
            params += 3 * inner + self.width
        item = self.policy.compute_dtype.itemsize
        return Cost(
            matmul=matmul_flops(tokens, self.width, 4 * inner)
            + 2 * matmul_flops(self.rank, tokens, inner)
            + attention_flops(batch, self.heads, self.head_dim, seq_len * self.rank),
            params=params,
            params_used=params,
            # The input, queries, keys, values and the output; what was shrunk; a log-sum-exp.
            activation_bytes=tokens * (self.width + 4 * inner) * item
            + 2 * batch * self.rank * inner * item
            + 4 * tokens * self.heads,
        )

    def _parallel(self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo) -> jax.Array:
        e = self.shrink_key
        f = e if self.shrink_value is None else self.shrink_value
        info = dataclasses.replace(info, segment_ids=None)
        return super()._parallel(q, self._shrunk(e, k), self._shrunk(f, v), info)

    def _shrunk(self, matrix: Any, x_BTHD: jax.Array) -> jax.Array:
        """Returns [B, R, H, D]: the row's length projected."""
        weight = self.policy.cast(matrix[...])[..., : x_BTHD.shape[1]]
        equation = 'hrt,bthd->brhd' if self.share == 'none' else 'rt,bthd->brhd'
        wide = jnp.promote_types(x_BTHD.dtype, jnp.float32)
        out = jnp.einsum(equation, weight, x_BTHD, preferred_element_type=wide)
        # Without the barrier XLA on a CPU joins the cast with attention's product of bfloat16 into
        # one that it cannot run.
        return jax.lax.optimization_barrier(out).astype(x_BTHD.dtype)
