"""Shaped attention, the mixer of He and Hofmann's simplified blocks (arXiv 2311.01906)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec, param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.layers.linear import identity, zeros
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

    supports = frozenset({'packing', 'stepping', 'bidirectional'})
    growth_spec = GrowthSpec()  # it is the whole of its block's path: there is no skip connection
    name = 'shaped_attention'

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
        one = jnp.ones(heads, ctx.policy.param_dtype)
        self.alpha = param(one, ('heads',), no_decay=True)
        self.beta = param(one, ('heads',), no_decay=True)
        self.gamma = param(one, ('heads',), no_decay=True)

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        self.query = self._inward(ctx, 'heads', branch(rngs, 'query'), zeros)
        self.key = self._inward(ctx, 'heads', branch(rngs, 'key'))
        with_values = self.with_values
        self.value = (
            self._inward(ctx, 'heads', branch(rngs, 'value'), identity) if with_values else None
        )
        self.out = self._outward(ctx, branch(rngs, 'out'), identity) if with_values else None

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

    def _continue(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        segment_ids = kv.segments(state, info)
        mean, total = _running_mean(v, segment_ids, state, state['total'])
        o, new = super()._continue(q, k, v, info, state)
        return self._shape(v, o, mean, segment_ids), {**new, 'total': total}

    def _advance(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        segment_ids = kv.segments(state, info)
        mean, total = _running_mean(v, segment_ids, state, state['total'])
        o, new = super()._advance(q, k, v, info, state)
        return self._shape(v, o, mean, segment_ids), {**new, 'total': total}

    def _first_state(self, k: jax.Array, v: jax.Array, info: SeqInfo) -> State:
        state = self.init_state(k.shape[0], self.max_len, k.dtype)
        _, total = _running_mean(v, kv.segments(state, info), state, state['total'])
        return {**super()._first_state(k, v, info), 'total': total}

    def _shape(
        self, v: jax.Array, o: jax.Array, mean: jax.Array, segment_ids: jax.Array | None
    ) -> jax.Array:
        """alpha v + beta o - gamma mean, [B, T, H, D]; 0 where there is padding."""

        def gain(p: nnx.Param) -> jax.Array:
            return self.policy.cast(p[...])[:, None]

        y = gain(self.alpha) * v + gain(self.beta) * o - gain(self.gamma) * mean
        return y if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], y, 0)


def _mean(v_BTHD: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    """The mean of each token's whole document, [B, T, H, D]."""
    wide = jnp.promote_types(v_BTHD.dtype, jnp.float32)
    if segment_ids is None:
        mean = jnp.mean(v_BTHD.astype(wide), axis=1, keepdims=True)
        return jnp.broadcast_to(mean, v_BTHD.shape).astype(v_BTHD.dtype)
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]).astype(wide)
    share = same / jnp.sum(same, axis=-1, keepdims=True)
    return jnp.einsum('bts,bshd->bthd', share, v_BTHD.astype(wide)).astype(v_BTHD.dtype)


def _running_mean(
    v_BTHD: jax.Array,
    segment_ids: jax.Array | None,
    cache: State | None,
    total_BHD: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The mean of each token's document up to it, and the sum over the last document.

    Args:
      v_BTHD: values.
      segment_ids: [B, T] or None.
      cache: what came before, or None.
      total_BHD: sum of the cache's current document, given with a cache.
    """
    wide = jnp.promote_types(v_BTHD.dtype, jnp.float32)
    batch, length = v_BTHD.shape[:2]
    ids = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    real = (ids != 0)[..., None, None]
    keep = _goes_on(ids, None if cache is None else cache['segment'])[..., None, None]
    # One more column counts the tokens, so that sums and counts are scanned together.
    one = jnp.ones((*v_BTHD.shape[:3], 1), wide)
    x = jnp.where(real, jnp.concatenate([v_BTHD.astype(wide), one], axis=-1), 0)

    def combine(a: Any, b: Any) -> Any:
        return a[0] * b[0], a[1] * b[0] + b[1]

    kept, sums = jax.lax.associative_scan(combine, (keep.astype(wide), x), axis=1)
    if cache is not None and total_BHD is not None:
        count = (cache['count'] - cache['start'])[:, None, None]
        count = jnp.broadcast_to(count, (*total_BHD.shape[:2], 1))
        before = jnp.concatenate([total_BHD.astype(wide), count.astype(wide)], axis=-1)
        sums = sums + kept * before[:, None]
    mean = sums[..., :-1] / jnp.maximum(sums[..., -1:], 1)
    return mean.astype(v_BTHD.dtype), sums[:, -1, :, :-1].astype(jnp.float32)


def _goes_on(ids_BT: jax.Array, before_B: jax.Array | None) -> jax.Array:
    """False where a token begins a document; padding does not end one."""
    batch, length = ids_BT.shape
    if before_B is None:
        before_B = jnp.zeros(batch, ids_BT.dtype)
    padded = jnp.concatenate([before_B[:, None], ids_BT[:, :-1]], axis=1)
    place = jnp.where(padded != 0, jnp.arange(length), 0)
    newest = jax.lax.cummax(place, axis=1)  # the last real token before each token
    previous = jnp.take_along_axis(padded, newest, axis=1)
    return (ids_BT == 0) | (ids_BT == previous)
