"""Mega: moving averages of several rates a channel, then gated attention with a single head."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import GrowthSpec, param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import diagonal_scan, fft_conv
from effjax.kernels.documents import last_real
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, start
from effjax.layers.mixers.state_space import by_chunks, power_sums
from effjax.layers.positions import Rope

QUERIES = 128  # queries whose scores exist at a time where every token sees all before it


class Mega(Recurrent):
    """`u * (h - x)`, `h = silu(W m + V (r * attend(q, k, v)))` with `m = silu(EMA(x) + omega x)`.

    Ma et al., arXiv 2209.10655. The average `a_t = p b x_t + (1 - p d) a_{t-1}` runs with
    `averages` rates a channel (multi-dimensional damped EMA), as one convolution by Fourier
    transform, or as a scan where a state comes before or after. Queries and keys are two scalings
    of one product of m, values come from x; u and r gate. `x + u (h - x)` is Mega's own residual
    path: with `block='postnorm'` the two are the same; a pre-norm block hands this mixer its
    normalised input, and x is that. Positions enter as rotations of two learned vectors, whose
    product depends on the distance of a query and a key and is added to their score. In a model
    that looks both ways, averages from the last token to the first, with rates of their own, come
    in addition (without the token itself), and a token attends to all of its document or chunk.

    Args:
      ctx: the model's context.
      key_dim: dimensions of queries and keys, even.
      value_dim: dimensions of values; None means twice the width.
      averages: rates a channel.
      chunk: tokens attend within stretches of this many of their document (Mega-chunk, whose cost
        is linear); None: within all of it.
      weights: 'softmax', or 'laplace': `(1 + erf((s - mu) / (sigma sqrt 2))) / 2` of scores
        divided by the number of keys.
      implementation: of convolution and scan; None picks the best that can run.

    Raises:
      ConfigError: sizes and names that cannot be.
    """

    name = 'mega'
    supports = frozenset({'packing', 'stepping', 'bidirectional'})
    growth_spec = GrowthSpec()  # a gate of its own stands between its products and its result
    directed = True

    def __init__(
        self,
        ctx: Context,
        *,
        key_dim: int = 64,
        value_dim: int | None = None,
        averages: int = 16,
        chunk: int | None = None,
        weights: str = 'softmax',
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.value_dim = 2 * ctx.width if value_dim is None else value_dim
        sizes = {'key_dim': key_dim, 'value_dim': self.value_dim, 'averages': averages}
        for what, size in {**sizes, 'chunk': 1 if chunk is None else chunk}.items():
            if size < 1:
                raise ConfigError(f'mega: {what} must be at least 1, got {size}.')
        if key_dim % 2:
            raise ConfigError(
                f'mega: key_dim must be even to turn with the position, not {key_dim}.'
            )
        if weights not in _WEIGHTS:
            raise ConfigError(f"mega: weights are 'softmax' or 'laplace', not {weights!r}.")
        self.width, self.key_dim, self.averages = ctx.width, key_dim, averages
        self.policy, self.bias, self.max_len = ctx.policy, ctx.bias, ctx.max_len
        self.causal = ctx.causal
        self.chunk, self.weights, self.implementation = chunk, weights, implementation
        self.rope = Rope(key_dim)
        self._make_projections(ctx, rngs)
        self.average = Averages(ctx, averages, rngs=branch(rngs, 'average'))
        self.back = None if self.causal else Averages(ctx, averages, rngs=branch(rngs, 'back'))
        skip = jax.random.normal(branch(rngs, 'skip').params(), (ctx.width,), jnp.float32)
        skip = skip.astype(ctx.policy.param_dtype)
        self.skip = param(skip, ('embed',), no_decay=True, keep_fp32=True)
        self.query_scale, self.query_offset, self.query_position = _vectors(
            ctx, key_dim, branch(rngs, 'query')
        )
        self.key_scale, self.key_offset, self.key_position = _vectors(
            ctx, key_dim, branch(rngs, 'key')
        )

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        def make(name: str, axes, size_in: int, size_out: int, residual: bool = False):
            return Projection(
                ctx, '...i,ij->...j', (size_in, size_out), axes, bias=ctx.bias,
                init=initializer(ctx, size_in, residual=residual), rngs=branch(rngs, name),
            )  # fmt: skip

        width, values = ctx.width, self.value_dim
        self.value = make('value', ('embed', 'mlp'), width, values)
        self.update = make('update', ('embed', None), width, width)
        self.shared = make('shared', ('embed', 'head_dim'), width, self.key_dim)
        self.reset = make('reset', ('embed', 'mlp'), width, values)
        self.inward = make('inward', ('embed', None), width, width)
        self.out = make('out', ('mlp', 'embed'), values, width, True)

    # ---- the state: averages, and the keys and values that may still be attended to -------------

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the memory with room for the longest sequence."""
        return self._memory(batch, self.max_len, dtype)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns the empty state with room for `max_len` tokens, or for a chunk."""
        self._need_causal('decoding state')
        return {**self._memory(batch, max_len, dtype), **start(batch)}

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state, none where it looks both ways."""
        return super().state_bytes(batch, max_len, dtype) if self.causal else 0

    def _need_causal(self, what: str) -> None:
        if not self.causal:
            raise ConfigError(
                f'mega over both directions has no {what}: it needs the whole sequence at once; '
                'use a causal model to decode.'
            )

    def state_length(self, state: State) -> int:
        """Returns how many tokens a state has room for."""
        return state['key'].shape[1] if 'key' in state else 1

    def _memory(self, batch: int, max_len: int, dtype: Any) -> State:
        slots = max_len if self.chunk is None else min(self.chunk, max_len)
        wide = jnp.promote_types(dtype, jnp.float32)
        return {
            'average': jnp.zeros((batch, self.width, self.averages), wide),
            'key': jnp.zeros((batch, slots, self.key_dim), dtype),
            'value': jnp.zeros((batch, slots, self.value_dim), dtype),
            'stored': jnp.zeros(batch, jnp.int32),
        }

    # ---- the parallel form ----------------------------------------------------------------------

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Averages and attention over a stretch of tokens; see `Recurrent.mix`."""
        if return_memory:
            self._need_causal('decoding state')
        if memory is None and return_memory:
            memory = self.memory(x_BTD.shape[0], x_BTD.dtype)
        m, average = self._average(x_BTD, info, memory)
        z, v = jax.nn.silu(self.shared(m)), jax.nn.silu(self.value(x_BTD))
        cast = self.policy.cast
        q, k = (
            z * cast(scale[...]) + cast(offset[...])
            for scale, offset in (
                (self.query_scale, self.query_offset),
                (self.key_scale, self.key_offset),
            )
        )
        o, stored = self._attend(q, k, v, info, memory)
        h = jax.nn.silu(self.inward(m) + self.out(o * jax.nn.silu(self.reset(m))))
        y = jax.nn.sigmoid(self.update(m)) * (h - x_BTD)
        if not return_memory or average is None:
            return y, None
        return y, {'average': average, **stored}

    def _average(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(m [B, T, D], the averages after), m being silu of the damped averages and the input."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        log_decay, read = self.average.discrete(wide)
        x, ids, new = x_BTD.astype(wide), info.segment_ids, None
        convolve = functools.partial(fft_conv, implementation=self.implementation)
        if memory is None:
            y = convolve(x, power_sums(log_decay, read, x.shape[1]), segment_ids=ids)
        else:

            def one(state, x, ids):
                x = jnp.broadcast_to(x[..., None], (*x.shape, self.averages))
                a, state = diagonal_scan(
                    x, log_decay, initial_state=state, segment_ids=ids, return_state=True, chunk=8,
                    implementation=self.implementation,
                )  # fmt: skip
                return jnp.sum(a * read, axis=-1), state

            y, new = by_chunks(one, memory['average'], x, ids, 64)
        if self.back is not None:
            taps = power_sums(*self.back.discrete(wide), x.shape[1])
            taps = jnp.where(jnp.arange(len(taps))[:, None] == 0, 0, taps)  # the token was counted
            turned = None if ids is None else ids[:, ::-1]
            y = y + convolve(x[:, ::-1], taps, segment_ids=turned)[:, ::-1]
        m = jax.nn.silu(y + self.skip[...].astype(wide) * x)
        return self.policy.cast(m), new

    # ---- attention ------------------------------------------------------------------------------

    def _attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo, memory: State | None
    ) -> tuple[jax.Array, State]:
        """(o [B, T, V], the keys and values to remember) of q, k [B, T, K] and v [B, T, V]."""
        length, place = q.shape[1], info.positions
        ids = jnp.ones(place.shape, jnp.int32) if info.segment_ids is None else info.segment_ids
        first = None
        if memory is not None and info.segment_ids is not None:
            # What is remembered stands right in front of a row's first real token.
            first = jnp.argmax(ids != 0, axis=1)[:, None]
            there = jnp.arange(length) + first
            ids = jnp.where(there < length, _take(ids, there), 0)
            q, k, v, place = (_take(x, there) for x in (q, k, v, place))
        tokens = _Tokens(k, v, place, ids)
        if memory is not None:
            tokens = _remembered(memory, tokens).before(tokens)
        queries = _Tokens(q, v, place, ids)
        if self.chunk is None or length <= self.chunk:
            o = self._every_key(queries, tokens)
        else:
            o = self._near_chunks(queries, tokens, self.chunk)
        if first is not None:
            o = _take(o, jnp.arange(length) - first)
        return o, {} if memory is None else _remember(memory, tokens, ids)

    def _every_key(self, queries: '_Tokens', keys: '_Tokens') -> jax.Array:
        """Scores of `QUERIES` queries at a time against all keys."""
        length = queries.ids.shape[1]
        if length <= QUERIES:
            return self._scored(queries, keys)
        blocks = queries.split(QUERIES)
        one = jax.checkpoint(lambda block: self._scored(block, keys), prevent_cse=False)
        o = jnp.moveaxis(
            jax.lax.map(one, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), blocks)), 0, 1
        )
        return o.reshape(o.shape[0], -1, o.shape[-1])[:, :length]

    def _near_chunks(self, queries: '_Tokens', keys: '_Tokens', chunk: int) -> jax.Array:
        """Scores of each stretch of `chunk` queries against it and its neighbours.

        A chunk of a document begins anywhere in a row, so that it may reach into the stretch
        before, and where tokens look both ways also into the one behind.
        """
        length = queries.ids.shape[1]
        count = -(-length // chunk)
        # Exactly one stretch before the first query, and one behind the last if it is read.
        front = chunk - (keys.ids.shape[1] - length)
        ways = 2 if self.causal else 3
        blocks = keys.pad(front, (count + ways - 2) * chunk - length).split(chunk)
        near = jax.tree.map(
            lambda x: jnp.concatenate([x[:, i : count + i] for i in range(ways)], axis=2), blocks
        )
        o = jax.checkpoint(self._scored)(queries.split(chunk), near)
        return o.reshape(o.shape[0], -1, o.shape[-1])[:, :length]

    def _scored(self, queries: '_Tokens', keys: '_Tokens') -> jax.Array:
        """Attention of q [..., Q, K] to keys [..., S, K]; rows that see nothing give 0."""
        wide = jnp.promote_types(queries.key.dtype, jnp.float32)
        far = queries.place[..., :, None] - keys.place[..., None, :]
        mask = queries.ids[..., :, None] == keys.ids[..., None, :]
        mask &= keys.ids[..., None, :] != 0
        if self.causal:
            mask &= far >= 0
        if self.chunk is not None:
            query, key = queries.place // self.chunk, keys.place // self.chunk
            mask &= query[..., :, None] == key[..., None, :]
        product = functools.partial(jnp.einsum, preferred_element_type=wide)
        scores = product('...qk,...sk->...qs', queries.key, keys.key)
        bias = product(
            '...qk,...sk->...qs',
            self._turned(self.query_position, queries.place, wide),
            self._turned(self.key_position, keys.place, wide),
        )
        weights = _WEIGHTS[self.weights](scores, bias, mask, self.key_dim)
        o = product('...qs,...sv->...qv', weights.astype(keys.value.dtype), keys.value)
        return o.astype(keys.value.dtype)

    def _turned(self, vector: nnx.Param, place: jax.Array, dtype: Any) -> jax.Array:
        """The vector, turned by each position: [..., T, K]."""
        flat = place.reshape(-1, place.shape[-1])
        wide = jnp.broadcast_to(vector[...].astype(dtype), (*flat.shape, 1, self.key_dim))
        return self.rope(wide, flat).reshape(*place.shape, self.key_dim)

    # ---- costs ----------------------------------------------------------------------------------

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: products, pairs that the mask allows, the averages.

        The averages count as two Fourier transforms a channel and direction; their taps are made
        once for all rows and do not count.
        """
        tokens, width, values = batch * seq_len, self.width, self.value_dim
        chunk = min(self.chunk or seq_len, seq_len)
        whole, rest = divmod(seq_len, chunk)
        pairs = whole * chunk * chunk + rest * rest
        if self.causal:
            pairs = (pairs + seq_len) // 2
        ways = 1 if self.causal else 2
        products = width * (3 * values + 2 * width + self.key_dim)
        params = products + width * (4 * ways * self.averages + 1) + 6 * self.key_dim
        params += (2 * values + 3 * width + self.key_dim) * self.bias
        return Cost(
            matmul=matmul_flops(tokens, 1, products)
            + 2.0 * batch * pairs * (2 * self.key_dim + values),
            fft=ways * model_flops(batch, seq_len, width),
            params=params,
            params_used=params,
            # The input, m, the products before and after their activations, queries, keys, the
            # output before and after its gate; in float32 the averages and their transforms.
            activation_bytes=tokens
            * (6 * width + 6 * values + 4 * self.key_dim)
            * self.policy.compute_dtype.itemsize
            + 16.0 * tokens * width,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


class Averages(nnx.Module):
    """Multi-dimensional damped moving averages of each channel: what they are, not how they run.

    Args:
      ctx: the model's context.
      rates: averages n a channel.
      rngs: streams of the part.
    """

    def __init__(self, ctx: Context, rates: int, *, rngs: nnx.Rngs):
        shape, dtype = (ctx.width, rates), ctx.policy.param_dtype
        signs = jnp.where(jnp.arange(rates) % 2, -1.0, 1.0)

        def make(mean: Any, deviation: float) -> nnx.Param:
            value = mean + deviation * jax.random.normal(rngs.params(), shape, jnp.float32)
            axes = ('embed', 'state')
            return param(value.astype(dtype), axes, no_decay=True, keep_fp32=True)

        self.rates = rates
        self.strength, self.damping = make(0.0, 0.2), make(0.0, 0.2)
        self.enter, self.leave = make(signs, 0.02), make(0.0, 1.0)

    def discrete(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (log of the decays, what of each average is read), [D, n]."""
        leaves = (self.strength, self.damping, self.enter, self.leave)
        strength, damping, enter, leave = (leaf[...].astype(dtype) for leaf in leaves)
        strength = jax.nn.sigmoid(strength)
        # At least e^-16 a token: strength and damping of 1 would forget at once.
        decay = jnp.log1p(-jnp.minimum(strength * jax.nn.sigmoid(damping), 1 - 2.0**-23))
        return decay, strength * enter * leave * self.rates**-0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Keys (or queries) and values of tokens, with their places and documents, [B, T, ...]."""

    key: jax.Array
    value: jax.Array
    place: jax.Array
    ids: jax.Array

    def before(self, other: '_Tokens') -> '_Tokens':
        """These tokens, then others."""
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)], 1), self, other)

    def pad(self, front: int, end: int) -> '_Tokens':
        """With padding in front and at the end."""
        return jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (front, end)] + [(0, 0)] * (x.ndim - 2)), self
        )

    def split(self, size: int) -> '_Tokens':
        """[B, N, size, ...], padding at the end."""

        def one(x: jax.Array) -> jax.Array:
            x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], -1, size, *x.shape[2:])

        return jax.tree.map(one, self)


def _remembered(memory: State, tokens: _Tokens) -> _Tokens:
    """The remembered tokens, the newest last: those right before the first of `tokens`."""
    slots = memory['key'].shape[1]
    slot = jnp.arange(slots) - slots
    live = slot >= -memory['stored'][:, None]
    ids = jnp.where(live, tokens.ids[:, :1], 0)
    return _Tokens(memory['key'], memory['value'], tokens.place[:, :1] + slot, ids)


def _remember(memory: State, tokens: _Tokens, ids: jax.Array) -> State:
    """The last tokens of the last document of remembered and new `tokens`."""
    some, last = last_real(ids)
    slots = memory['key'].shape[1]
    there = last[:, None] + 1 + jnp.arange(slots)
    current = jnp.take_along_axis(ids, last[:, None], axis=1)
    live = _take(tokens.ids, there) == current

    def newest(x: jax.Array, old: jax.Array) -> jax.Array:
        x = jnp.where(live[..., None], _take(x, there), 0).astype(old.dtype)
        return jnp.where(some[:, None, None], x, old)

    stored = jnp.where(some, jnp.sum(live, axis=1, dtype=jnp.int32), memory['stored'])
    return {
        'key': newest(tokens.key, memory['key']),
        'value': newest(tokens.value, memory['value']),
        'stored': stored,
    }


def _take(x: jax.Array, there: jax.Array) -> jax.Array:
    """x [B, T, ...] at places [B, S], those outside moved to the nearest end."""
    there = jnp.clip(there, 0, x.shape[1] - 1)
    there = jnp.broadcast_to(there, (x.shape[0], there.shape[1]))
    return jnp.take_along_axis(x, there.reshape(*there.shape, *[1] * (x.ndim - 2)), axis=1)


def _vectors(ctx: Context, size: int, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param, nnx.Param]:
    """Scale, offset and position of queries or keys, [K] each."""
    dtype = ctx.policy.param_dtype
    scale, position = 0.02 * jax.random.normal(rngs.params(), (2, size), dtype)

    def make(value: jax.Array) -> nnx.Param:
        return param(value, ('head_dim',), no_decay=True)

    return make(scale), make(jnp.zeros(size, dtype)), make(position)


def _softmax(scores: jax.Array, bias: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    scores = jnp.where(mask, scores * size**-0.5 + bias, -jnp.inf)
    most = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores - jnp.maximum(most, -1e30), 0)), 0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def _laplace(scores: jax.Array, bias: jax.Array, mask: jax.Array, size: int) -> jax.Array:
    """With the mean and deviation at which it comes closest to the squared relu."""
    del size
    seen = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    z = (scores / seen + bias - np.sqrt(0.5)) / (np.sqrt(0.25 / np.pi) * np.sqrt(2))
    return jnp.where(mask, 0.5 * (1 + jax.lax.erf(z)), 0)


_WEIGHTS: dict[str, Callable[..., jax.Array]] = {'softmax': _softmax, 'laplace': _laplace}
