"""Transformer-XL: attention to a segment and a memory of what stands before it, by distances."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels.documents import last_real
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, from_heads, need_causal, start


class TransformerXL(Recurrent):
    """Segments of `segment` tokens attend to themselves and to `memory` inputs before them.

    Dai et al., arXiv 1901.02860. A document is cut into segments from its first token. A token
    sees those of its segment up to itself, and the last `memory` tokens before the segment, whose
    inputs to this layer come without a gradient; weights still learn from them. All segments of a
    row run at once. Scores are `((q + u) k + (q + v) r_d) / sqrt(head_dim)` with r_d a product of
    the sines and cosines of the distance d, and the trained biases u (content) and v (position)
    of each layer. The model's own positions are not used. In a 'postnorm' block the remembered
    inputs are the paper's hidden states; a pre-norm block remembers them normalised. The decoding
    state is inputs, not keys and values: a step moves its query through the key's weights instead.

    Args:
      ctx: the model's context.
      heads: heads H.
      segment: tokens of a segment.
      memory: tokens before a segment that it sees; None means `segment`, 0 leaves segments alone.
      head_dim: dimensions of a head; None means width / heads.

    Raises:
      ConfigError: a model that looks both ways, or sizes that cannot be.
    """

    name = 'transformer_xl'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        segment: int = 64,
        memory: int | None = None,
        head_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        _check(ctx, heads, segment, memory, head_dim)
        self.width, self.heads, self.segment = ctx.width, heads, segment
        self.before = segment if memory is None else memory
        self.head_dim = head_dim or ctx.width // heads
        self.policy, self.with_bias, self.max_len = ctx.policy, ctx.bias, ctx.max_len
        self.query = self._inward(ctx, ctx.bias, branch(rngs, 'query'))
        # A key's bias would add the same to every score of a query.
        self.key = self._inward(ctx, False, branch(rngs, 'key'))
        self.value = self._inward(ctx, ctx.bias, branch(rngs, 'value'))
        self.distance = self._inward(ctx, False, branch(rngs, 'distance'))
        self.out = from_heads(ctx, heads, self.head_dim, rngs=branch(rngs, 'out'))

        def vector(name: str) -> nnx.Param:
            shape = (heads, self.head_dim)
            value = 0.02 * jax.random.normal(branch(rngs, name).params(), shape, jnp.float32)
            axes = ('heads', 'head_dim')
            return param(value.astype(ctx.policy.param_dtype), axes, no_decay=True)

        self.content_bias, self.position_bias = vector('content_bias'), vector('position_bias')

    def _inward(self, ctx: Context, bias: bool, rngs: nnx.Rngs) -> Projection:
        return Projection(
            ctx, '...d,dhk->...hk', (ctx.width, self.heads, self.head_dim),
            ('embed', 'heads', 'head_dim'), bias=bias, init=initializer(ctx, ctx.width), rngs=rngs,
        )  # fmt: skip

    # ---- the state: the inputs that later tokens may see ----------------------------------------

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the memory with room for what a token of the longest sequence sees."""
        return self._memory(batch, self.max_len, dtype)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns the empty state: at most `segment + memory - 1` inputs a row."""
        return {**self._memory(batch, max_len, dtype), **start(batch)}

    def state_length(self, state: State) -> int:
        """Returns how many inputs a state has room for."""
        return state['input'].shape[1] if 'input' in state else 1

    def _memory(self, batch: int, max_len: int, dtype: Any) -> State:
        slots = max(1, min(self.segment + self.before - 1, max_len))
        return {
            'input': jnp.zeros((batch, slots, self.width), dtype),
            'stored': jnp.zeros(batch, jnp.int32),
        }

    # ---- a stretch of tokens --------------------------------------------------------------------

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Attention over a stretch of tokens; see `Recurrent.mix`."""
        if memory is not None and x_BTD.shape[1] == 1 and info.segment_ids is None:
            return self._one(x_BTD[:, 0], info.positions[:, 0], memory)
        length, place, first = x_BTD.shape[1], info.positions, None
        ids = jnp.ones(place.shape, jnp.int32) if info.segment_ids is None else info.segment_ids
        aligned = memory is None and info.segment_ids is None
        if aligned:  # a whole document: its segments begin at fixed places of the row
            place = jnp.broadcast_to(jnp.arange(length, dtype=place.dtype), place.shape)
        elif memory is not None and info.segment_ids is not None:
            # What is remembered stands right in front of a row's first real token.
            first = jnp.argmax(ids != 0, axis=1)[:, None]
            there = jnp.arange(length) + first
            ids = jnp.where(there < length, _take(ids, there), 0)
            x_BTD, place = _take(x_BTD, there), _take(place, there)
        tokens = _Tokens(x_BTD, place, ids)
        keys = tokens if memory is None else _remembered(memory, tokens).before(tokens)
        y = self.out(self._attend(tokens, keys, aligned))
        if first is not None:
            y = _take(y, jnp.arange(length) - first)
        if not return_memory:
            return y, None
        if memory is None:
            memory = self.memory(len(ids), x_BTD.dtype)
            keys = _remembered(memory, tokens).before(tokens)
        return y, _remember(memory, keys, ids)

    def _attend(self, queries: '_Tokens', keys: '_Tokens', aligned: bool) -> jax.Array:
        """Returns o [B, T, H, K]: blocks of queries against the keys that may be theirs.

        The keys end where the queries do. Block n sees two stretches of them: its own segment's
        with gradients, and those before without. Where segments begin at fixed places the two lie
        side by side; elsewhere they overlap, and the mask takes each key of a query once.
        """
        batch, length = queries.ids.shape
        block = min(self.segment, length)
        count = -(-length // block)
        end, known = count * block - length, keys.ids.shape[1] - length
        # Keys before a block that it may see, and those of them that may be of its own segment.
        far = min(self.before + (0 if aligned else self.segment - 1), known + (count - 1) * block)
        own = 0 if aligned else min(self.segment - 1, far)
        q = _pad(self.query(queries.x), 0, end)
        q = q.reshape(batch, count, block, self.heads, self.head_dim)
        front = far - known
        rows = jnp.arange(count)[:, None] * block
        near = rows + jnp.arange(far - own, far + block)
        past = rows + jnp.arange(far if aligned else far + block)

        def windows(own: jax.Array, old: jax.Array) -> jax.Array:  # [B, S, ...] -> [B, N, C, ...]
            old, own = (
                jnp.take(_pad(x, front, end), at, axis=1) for x, at in ((old, past), (own, near))
            )
            return jnp.concatenate([old, own], axis=2)

        # XLA merges the two products, which differ in what they pass back.
        old = jax.lax.stop_gradient(keys.x)
        k = windows(self.key(keys.x), self.key(old))
        v = windows(self.value(keys.x), self.value(old))
        place, ids = (windows(x, x)[:, :, None] for x in (keys.place, keys.ids))
        q_place, q_ids = (
            _pad(x, 0, end).reshape(batch, count, block, 1) for x in (queries.place, queries.ids)
        )
        begin = q_place - q_place % self.segment
        is_own = jnp.arange(place.shape[-1]) >= past.shape[1]
        mask = jnp.where(
            is_own,
            (place >= begin) & (place <= q_place),
            (place < begin) & (place >= begin - self.before),
        )
        mask &= (ids == q_ids) & (ids != 0)
        r = self.distance(self._waves(far + block))
        run = functools.partial(self._scored, past=past.shape[1], near=near.shape[1])
        o = jax.checkpoint(run)(q, k, v, mask, r)
        return o.reshape(batch, -1, self.heads, self.head_dim)[:, :length]

    def _scored(self, q, k, v, mask, r, *, past: int, near: int) -> jax.Array:
        """Attention of q [B, N, Q, H, K] to k, v [B, N, C, H, K] with mask [B, N, Q, C]."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        u, w = (self.policy.cast(b[...]) for b in (self.content_bias, self.position_bias))
        scores = jnp.einsum('bnqhk,bnchk->bnhqc', q + u, k, preferred_element_type=wide)
        by_distance = jnp.einsum('bnqhk,dhk->bnhqd', q + w, r, preferred_element_type=wide)
        by_place = _shift(by_distance)
        scores += jnp.concatenate([by_place[..., :past], by_place[..., -near:]], axis=-1)
        weights = _softmax(scores * self.head_dim**-0.5, mask[:, :, None])
        return jnp.einsum('bnhqc,bnchk->bnqhk', weights.astype(v.dtype), v)

    def _waves(self, count: int) -> jax.Array:
        """Sines and cosines [count, D] of the distances count - 1, ..., 0."""
        half = self.width // 2
        speed = 10000.0 ** -(np.arange(half) / half)
        angle = np.arange(count)[::-1, None] * speed
        return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1),
                           self.policy.compute_dtype)  # fmt: skip

    # ---- one token ------------------------------------------------------------------------------

    def _one(self, x_BD: jax.Array, place_B: jax.Array, memory: State) -> tuple[jax.Array, State]:
        """A step: queries go through the weights of keys, so that inputs need no products."""
        inputs = jnp.concatenate([memory['input'].astype(x_BD.dtype), x_BD[:, None]], axis=1)
        slots = memory['input'].shape[1]
        ago = slots - jnp.arange(slots + 1)
        within = (place_B % self.segment)[:, None]  # tokens of the segment before this one
        own = ago <= within
        mask = (ago <= within + self.before) & (ago <= memory['stored'][:, None])
        h = jnp.where(own[..., None], inputs, jax.lax.stop_gradient(inputs))
        wide = jnp.promote_types(x_BD.dtype, jnp.float32)
        weight = {
            name: self.policy.cast(getattr(self, name).kernel[...])
            for name in ('key', 'value', 'distance')
        }
        u, w = (self.policy.cast(b[...]) for b in (self.content_bias, self.position_bias))
        q = self.query(x_BD)
        content = jnp.einsum('bhk,dhk->bhd', q + u, weight['key'])
        position = jnp.einsum('bhk,dhk->bhd', q + w, weight['distance'])
        scores = jnp.einsum('bhd,bsd->bhs', content, h, preferred_element_type=wide)
        waves = self._waves(slots + 1)
        scores += jnp.einsum('bhd,sd->bhs', position, waves, preferred_element_type=wide)
        weights = _softmax(scores * self.head_dim**-0.5, mask[:, None]).astype(h.dtype)
        o = jnp.einsum('bhd,dhk->bhk', jnp.einsum('bhs,bsd->bhd', weights, h), weight['value'])
        if self.value.bias is not None:
            o += self.policy.cast(self.value.bias[...])
        new = {
            'input': inputs[:, 1:].astype(memory['input'].dtype),
            'stored': jnp.minimum(memory['stored'] + 1, slots),
        }
        return self.out(o)[:, None], new

    # ---- costs ----------------------------------------------------------------------------------

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: products, and content, distance and value of each pair.

        Keys and values count once a token, as all segments of a row share them; the products of
        the distances are made once for all rows and do not count.
        """
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        whole, rest = divmod(seq_len, self.segment)
        scored = (whole * self.segment * (self.segment + 1) + rest * (rest + 1)) // 2
        scored += sum(
            min(self.before, begin) * min(self.segment, seq_len - begin)
            for begin in range(0, seq_len, self.segment)
        )
        params = 5 * self.width * inner + 2 * inner + 2 * inner * self.with_bias
        return Cost(
            matmul=matmul_flops(tokens, self.width, 4 * inner) + 6.0 * batch * scored * inner,
            params=params,
            params_used=params,
            # The input, queries, keys, values and the output.
            activation_bytes=tokens * (self.width + 4 * inner) * self.policy.compute_dtype.itemsize,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Inputs [B, T, D] of tokens with their places and documents [B, T]."""

    x: jax.Array
    place: jax.Array
    ids: jax.Array

    def before(self, other: '_Tokens') -> '_Tokens':
        """These tokens, then others."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b], 1), self, other)


def _remembered(memory: State, tokens: _Tokens) -> _Tokens:
    """The remembered inputs, the newest last: those right before the first of `tokens`."""
    slots = memory['input'].shape[1]
    slot = jnp.arange(slots) - slots
    live = slot >= -memory['stored'][:, None]
    ids = jnp.where(live, tokens.ids[:, :1], 0)
    return _Tokens(memory['input'], tokens.place[:, :1] + slot, ids)


def _remember(memory: State, tokens: _Tokens, ids: jax.Array) -> State:
    """The last inputs of the last document of remembered and new `tokens`."""
    some, last = last_real(ids)
    there = last[:, None] + 1 + jnp.arange(memory['input'].shape[1])
    live = _take(tokens.ids, there) == jnp.take_along_axis(ids, last[:, None], axis=1)
    newest = jnp.where(live[..., None], _take(tokens.x, there), 0).astype(memory['input'].dtype)
    return {
        'input': jnp.where(some[:, None, None], newest, memory['input']),
        'stored': jnp.where(some, jnp.sum(live, axis=1, dtype=jnp.int32), memory['stored']),
    }


def _take(x: jax.Array, there: jax.Array) -> jax.Array:
    """x [B, T, ...] at places [B, S], those outside moved to the nearest end."""
    there = jnp.clip(there, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, there.reshape(*there.shape, *[1] * (x.ndim - 2)), axis=1)


def _pad(x: jax.Array, front: int, end: int) -> jax.Array:
    """x [B, T, ...] with zeros before and behind, or without its first rows (`front` < 0)."""
    x = x[:, max(0, -front) :]
    return jnp.pad(x, [(0, 0), (max(0, front), end)] + [(0, 0)] * (x.ndim - 2))


def _shift(s: jax.Array) -> jax.Array:
    """Turns scores by distance into scores by place.

    s [..., Q, C] holds distances C - 1, ..., 0; query a stands at place C - Q + a of C, so that
    out[a, c] = s[a, c + Q - 1 - a]; places behind the query hold values that nothing may read.
    """
    queries, places = s.shape[-2:]
    if queries == 1:
        return s
    s = jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(0, queries - 1)])
    size = places + queries - 2  # one column less a row moves each row one further
    flat = s.reshape(*s.shape[:-2], -1)[..., queries - 1 : queries - 1 + queries * size]
    return flat.reshape(*s.shape[:-2], queries, size)[..., :places]


def _softmax(scores: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over what the mask allows; rows that see nothing give 0."""
    scores = jnp.where(mask, scores, -0.7 * float(jnp.finfo(scores.dtype).max))
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)


def _check(
    ctx: Context, heads: int, segment: int, memory: int | None, head_dim: int | None
) -> None:
    if heads < 1 or (head_dim is None and ctx.width % heads):
        raise ConfigError(
            f'transformer_xl: heads {heads} do not divide width {ctx.width}; change heads or give '
            'head_dim.'
        )
    if head_dim is not None and head_dim < 1:
        raise ConfigError(f'transformer_xl: head_dim must be at least 1, got {head_dim}.')
    if segment < 1:
        raise ConfigError(f'transformer_xl: segment must be at least 1 token, got {segment}.')
    if memory is not None and memory < 0:
        raise ConfigError(f'transformer_xl: memory must not be negative, got {memory}.')
    if ctx.width % 2:
        raise ConfigError(
            f'transformer_xl: its distances are sines and cosines, halves of the width, which '
            f'must be even, not {ctx.width}.'
        )
