"""Softmax attention: multi-head, grouped and multi-query, with a window or without."""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo, Source
from effjax.core.keys import branch
from effjax.kernels import MaskSpec, attention
from effjax.kernels.attention.cost import attention_flops, pairs
from effjax.kernels.attention.mask import pairs as pairs_of
from effjax.kernels.choice import platform
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers import cache as kv
from effjax.layers.norms import RMSNorm
from effjax.layers.positions import rotary
from effjax.parallel import auto_axes, current_rules, over

State = dict[str, jax.Array]


class Attention(nnx.Module):
    """`out(softmax(q k^T / sqrt(D)) v)` with H query heads on G key-value heads.

    Causal or bidirectional as the context says. Rotary positions are applied where the context
    has them. Multi-head (Vaswani et al., arXiv 1706.03762), multi-query (arXiv 1911.02150),
    grouped (arXiv 2305.13245), sliding window (arXiv 2004.05150).

    Args:
      ctx: the model's context.
      heads: query heads H.
      kv_heads: key-value heads G, a divisor of H; None means H.
      head_dim: dimensions of a head; None means width / heads.
      window: a token sees itself and the window - 1 tokens before it; where the model looks both
        ways, the window - 1 behind it too, |i - j| < window; None means all.
      qk_norm: RMSNorm over each head of queries and keys (arXiv 2302.05442).
      soft_cap: scores become cap * tanh(score / cap); None leaves them.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run. Steps and
        continuations from a state, which only 'xla' and 'reference' can run, pick for themselves
        where another one is named.

    Raises:
      ConfigError: heads, sizes or a window that cannot be.
    """

    causal: bool = True
    supports = frozenset({'packing', 'stepping', 'bidirectional', 'context'})
    name: str = 'attention'
    growth_spec = GrowthSpec(frozenset({'embed', 'heads', 'kv_heads'}), ('out',))

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        soft_cap: float | None = None,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check(self.name, ctx, heads, kv_heads, head_dim, window, attention_dropout)
        self.width, self.heads, self.kv_heads = ctx.width, heads, kv_heads or heads
        self.head_dim = head_dim or ctx.width // heads
        self.causal, self.window, self.max_len = ctx.causal, window, ctx.max_len
        self.soft_cap, self.attention_dropout = soft_cap, float(attention_dropout)
        self.implementation, self.policy = implementation, ctx.policy
        self.with_bias = ctx.bias if bias is None else bias
        self.rope = rotary(ctx, self.head_dim)
        norm = (ctx, self.head_dim, 'head_dim')
        self.query_norm = RMSNorm(*norm, rngs=rngs) if qk_norm else None
        self.key_norm = RMSNorm(*norm, rngs=rngs) if qk_norm else None
        self._make_projections(ctx, rngs)

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        self.query = self._inward(ctx, 'heads', branch(rngs, 'query'))
        self.key = self._inward(ctx, 'kv_heads', branch(rngs, 'key'))
        self.value: Any = self._inward(ctx, 'kv_heads', branch(rngs, 'value'))
        self.out: Any = self._outward(ctx, branch(rngs, 'out'))

    def _inward(self, ctx: Context, axis: str, rngs: nnx.Rngs, init: Any = None) -> Projection:
        """A projection [embed, `axis`, head_dim]."""
        heads = self.heads if axis == 'heads' else self.kv_heads
        return Projection(
            ctx,
            '...d,dhk->...hk',
            (ctx.width, heads, self.head_dim),
            ('embed', axis, 'head_dim'),
            bias=self.with_bias,
            init=init or initializer(ctx, ctx.width),
            rngs=rngs,
        )

    def _outward(self, ctx: Context, rngs: nnx.Rngs, init: Any = None) -> Projection:
        """The projection [heads, head_dim, embed] back to the width."""
        return Projection(
            ctx,
            '...hk,hkd->...d',
            (self.heads, self.head_dim, ctx.width),
            ('heads', 'head_dim', 'embed'),
            bias=self.with_bias,
            init=init or initializer(ctx, self.heads * self.head_dim, residual=True),
            rngs=rngs,
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        info: SeqInfo,
        context: Any = None,
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, State | None, dict[str, Any]]:
        """Returns (y [B, T, D], the new state or None, {}); see `layers.mixers`.

        Without a state but with `return_state` the new cache has `ctx.max_len` slots. With a
        `context`, a `Source` or an array [B, S, D], queries read all of it that is of their
        document, in no order: neither positions nor a window say anything between two sequences.
        """
        chex.assert_rank(x_BTD, 3)
        chex.assert_shape(info.positions, x_BTD.shape[:2])
        if context is not None:
            return self._output(self._across(x_BTD, info, context, state, return_state)), None, {}
        if state is not None or return_state:
            self._need_causal('decoding state')
        q, k, v = self._project(x_BTD, info)
        if state is not None:
            self.check_state(state)
            o, state = self._continue(q, k, v, info, state)
        else:
            o = self._parallel(q, k, v, info)
            state = self._first_state(k, v, info) if return_state else None
        return self._output(o), state, {}

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns an empty cache for `max_len` tokens a row, or a ring of the window's size."""
        self._need_causal('decoding state')
        return kv.init(batch, self._slots(max_len), self.kv_heads, self.head_dim, dtype)

    def step(
        self, x_BD: jax.Array, state: State, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        """Advances every row by one token; returns (y [B, D], state)."""
        chex.assert_rank(x_BD, 2)
        self._need_causal('step')
        info = kv.next_token(self.check_state(state), reset)
        q, k, v = self._project(x_BD[:, None], info)
        o, state = self._advance(q, k, v, info, state)
        return self._output(o)[:, 0], state

    def check_state(self, state: State) -> State:
        """Returns the state; one of another mixer or other sizes raises ConfigError."""
        slots = kv.size(state) if 'key' in state else 1
        make = lambda batch: self.init_state(batch, slots, jnp.float32)  # noqa: E731
        return kv.check_state(self.name, state, make)

    def kv_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the cached keys and values alone."""
        return kv.kv_bytes(batch, self._slots(max_len), self.kv_heads, self.head_dim, dtype)

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state: keys, values, and four int32 a row."""
        if not self.causal:
            return 0
        return kv.state_bytes(batch, self._slots(max_len), self.kv_heads, self.head_dim, dtype)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; scores and values count the pairs that the mask allows."""
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        inner_kv = self.kv_heads * self.head_dim
        scored = self._scored(seq_len)
        params = self.width * (2 * inner + 2 * inner_kv)
        if self.with_bias:
            params += inner + 2 * inner_kv + self.width
        if self.query_norm is not None:
            params += 2 * self.head_dim
        item = self.policy.compute_dtype.itemsize
        return Cost(
            matmul=matmul_flops(tokens, self.width, 2 * inner + 2 * inner_kv)
            + attention_flops(batch, self.heads, self.head_dim, scored),
            params=params,
            params_used=params,
            # The input, queries, keys, values and the output, and a float32 log-sum-exp a head.
            activation_bytes=tokens * ((self.width + 2 * inner + 2 * inner_kv) * item)
            + 4 * tokens * self.heads,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )

    def _scored(self, seq_len: int) -> float:
        """Pairs that a head scores, on average over the heads."""
        mask, window = self._mask()
        if isinstance(mask, MaskSpec):
            return pairs_of(mask, seq_len)
        return pairs(seq_len, mask=mask, window=window)

    def _mask(self) -> tuple[str | MaskSpec, int | None]:
        """The kernel's mask and window."""
        if self.causal:
            return 'causal', self.window
        return 'full' if self.window is None else MaskSpec(False, self.window), None

    def _slots(self, max_len: int) -> int:
        return max_len if self.window is None else min(self.window, max_len)

    def _need_causal(self, what: str) -> None:
        if not self.causal:
            raise ConfigError(
                f'{self.name} over both directions has no {what}: it needs the whole sequence at '
                'once; use a causal model to decode.'
            )

    def _project(self, x_BTD: jax.Array, info: SeqInfo) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = self.query(x_BTD), self.key(x_BTD), self._values(x_BTD)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, info.positions), self.rope(k, info.positions)
        return q, k, v

    def _values(self, x_BTD: jax.Array) -> jax.Array:
        return self.value(x_BTD)

    def _output(self, o_BTHD: jax.Array) -> jax.Array:
        return self.out(o_BTHD)

    def _parallel(self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo) -> jax.Array:
        dropout = self.attention_dropout if info.train else 0.0
        mask, window = self._mask()

        def kernel(
            q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None, named: str | None
        ) -> jax.Array:
            return attention(
                q,
                k,
                v,
                mask=mask,
                window=window,
                segment_ids=ids,
                soft_cap=self.soft_cap,
                dropout=dropout,
                rng=info.rng if dropout else None,
                implementation=named,
            )

        return self._over_devices(kernel, (q, k, v), (info.segment_ids,))

    def _over_devices(
        self,
        kernel: Callable[..., jax.Array],
        inputs: tuple[jax.Array, jax.Array, jax.Array],
        by_token: tuple[jax.Array | None, ...],
        *,
        by_head: bool = True,
    ) -> jax.Array:
        """Runs a kernel so that each device of a mesh has its rows and heads.

        Kernels of accelerators are opaque to the partitioner.

        Args:
          kernel: `kernel(q, k, v, *by_token, implementation)`.
          inputs: queries, keys, values.
          by_token: arrays [B, T], or None.
          by_head: heads may be parted: the kernel treats all alike.
        """
        mesh, named = auto_axes(), self.implementation
        if 'sequence' in mesh and named is None:
            named = 'xla'  # the only one that XLA can partition along the sequence
        if not mesh or 'sequence' in mesh or platform() == 'cpu':
            return kernel(*inputs, *by_token, named)
        heads, kv_heads = self._sharded_heads(mesh) if by_head else (None, None)
        q_axes, kv_axes = ('batch', None, heads, None), ('batch', None, kv_heads, None)
        in_axes = (q_axes, kv_axes, kv_axes, *[('batch', None) for _ in by_token])
        return over(lambda *args: kernel(*args, named), in_axes, q_axes)(*inputs, *by_token)

    def _sharded_heads(self, mesh: dict[str, int]) -> tuple[str | None, str | None]:
        """Names of the head dimensions of queries and of keys, None where they stay whole.

        One key-value head may serve the queries of every device; several must be divided just as
        the queries are, or a device would pair its queries with the wrong ones.
        """
        rules = current_rules()
        ways = math.prod(mesh.get(axis, 1) for axis in rules['heads'])
        if self.kv_heads == 1:
            return 'heads', None
        divides = self.kv_heads % ways == 0 and rules['heads'] == rules['kv_heads']
        return ('heads', 'kv_heads') if divides else (None, None)

    def _across(
        self, x_BTD: jax.Array, info: SeqInfo, context: Any, state: State | None, keep: bool
    ) -> jax.Array:
        """Cross-attention (arXiv 1706.03762): queries of x, keys and values of the context."""
        if 'context' not in self.supports:
            raise ConfigError(
                f'{self.name} reads its own sequence only: it takes no context; use '
                "mixer.kind='attention'."
            )
        if state is not None or keep:
            raise ConfigError(
                'attention to a context keeps no decoding state: call it with the whole context.'
            )
        source = context if isinstance(context, Source) else Source(context)
        chex.assert_shape(source.x, (x_BTD.shape[0], None, self.width))
        q, k, v = self.query(x_BTD), self.key(source.x), self._values(source.x)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        ids, kv_ids = info.segment_ids, source.segment_ids
        if ids is None and kv_ids is not None:  # one document, and a context with padding
            ids, kv_ids = jnp.ones(x_BTD.shape[:2], jnp.int32), (kv_ids != 0).astype(jnp.int32)
        if ids is not None and kv_ids is None:
            kv_ids, ids = jnp.ones(k.shape[:2], jnp.int32), (ids != 0).astype(jnp.int32)
        dropout = self.attention_dropout if info.train else 0.0
        return attention(
            q,
            k,
            v,
            mask='full',
            segment_ids=ids,
            kv_segment_ids=kv_ids,
            soft_cap=self.soft_cap,
            dropout=dropout,
            rng=info.rng if dropout else None,
            implementation=self.implementation,
        )

    def _first_state(self, k: jax.Array, v: jax.Array, info: SeqInfo) -> State:
        state = self.init_state(k.shape[0], self.max_len, k.dtype)
        return kv.extend(state, k, v, info, ring=self.window is not None)

    def _continue(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        """New tokens attend to the cache and to each other, then enter the cache."""
        ring = self.window is not None
        segment_ids = kv.segments(state, info)
        number = kv.numbers(state, segment_ids)
        old_number, old_segment = kv.slots(state, ring=ring)

        def joined(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.concatenate([old, new], axis=1)

        key, value = kv.contents(state, k.dtype)
        o = self._masked(
            q,
            joined(key, k),
            joined(value, v),
            (segment_ids, number),
            (joined(old_segment, segment_ids), joined(old_number, number)),
        )
        return o, kv.extend(state, k, v, info, ring=ring)

    def _advance(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, state: State
    ) -> tuple[jax.Array, State]:
        """One token enters the cache, then attends to it."""
        ring = self.window is not None
        state = kv.extend(state, k, v, info, ring=ring)
        key, value = kv.contents(state, q.dtype)
        number, segment = kv.slots(state, ring=ring)
        now = (state['segment'][:, None], state['count'][:, None] - 1)
        return self._masked(q, key, value, now, (segment, number)), state

    def _masked(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        q_place: tuple[jax.Array, jax.Array],
        kv_place: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """Attention between places, which are (documents, token numbers)."""
        named = self.implementation if self.implementation in ('xla', 'reference') else None
        return attention(
            q,
            k,
            v,
            window=self.window,
            segment_ids=q_place[0],
            kv_segment_ids=kv_place[0],
            q_positions=q_place[1],
            kv_positions=kv_place[1],
            soft_cap=self.soft_cap,
            implementation=named,
        )


def _check(
    name: str,
    ctx: Context,
    heads: int,
    kv_heads: int | None,
    head_dim: int | None,
    window: int | None,
    dropout: float,
) -> None:
    if heads < 1 or (head_dim is None and ctx.width % heads):
        raise ConfigError(
            f'{name}: heads {heads} do not divide width {ctx.width}; change heads or give head_dim.'
        )
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ConfigError(f'{name}: kv_heads {kv_heads} do not divide heads {heads}.')
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f'{name}: head_dim must be at least 1, got {head_dim}.')
    if window is not None and window < 1:
        raise ConfigError(f'{name}: window must be at least 1, got {window}.')
    if not 0 <= dropout < 1:
        raise ConfigError(f'{name}: attention_dropout must be in [0, 1), got {dropout}.')
