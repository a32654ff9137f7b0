"""What recurrent mixers share: the place in a document, resets, padding, and the contract's calls.

A recurrent mixer carries a memory of fixed size: a dict of arrays with the batch in front, zeros
for a document's first token. A subclass of `Recurrent` says what the memory is and how a stretch of
tokens moves it; resets between calls, places and checks are done here. Inside a stretch
`info.segment_ids` tells the documents apart, and the kernels reset at their borders; the memory
that a stretch begins with belongs to each row's first real token, and is 0 where a document begins
there. `QueryKeyValue`, `ToHeads` and `from_heads` are the projections that most of
them have.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.core.trees import nbytes
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.cache import check_state, last_real, next_token, segments
from effjax.layers.mixers.short_conv import ShortConv

State = dict[str, jax.Array]
_PLACE = ('segment', 'position')


class Recurrent(nnx.Module):
    """A causal mixer whose state has a fixed size; see `layers.mixers` for the contract.

    Subclasses set `name` (in messages) and define `memory` and `mix`; `__init__` begins with
    `need_causal(ctx, self.name)`.
    """

    causal: bool = True
    supports = frozenset({'packing', 'stepping'})
    growth_spec = GrowthSpec(outputs=('out',))
    name: str = 'a recurrent mixer'

    @abc.abstractmethod
    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the memory before the first token; `dtype` is that of activations."""

    @abc.abstractmethod
    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Mixes a stretch of tokens.

        Args:
          x_BTD: the input [B, T, D].
          info: `segment_ids` None means that all tokens of a row are of one document, the
            memory's; padding neither reads nor writes and its output is 0 or unread.
          memory: what came before each row's first real token; None means zeros.
          return_memory: static; whether the memory after the last document is wanted.

        Returns:
          (y [B, T, D], the new memory, or None where it is not wanted).
        """

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
        chex.assert_rank(x_BTD, 3)
        chex.assert_shape(info.positions, x_BTD.shape[:2])
        if context is not None:
            raise ConfigError(
                f'{self.name} reads its own sequence only: it takes no context; use '
                "mixer.kind='attention'."
            )
        if state is None and not return_state:
            return self.mix(x_BTD, info, None, False)[0], None, {}
        given = self.check_state(state) if state is not None else None
        memory = None if given is None else continued(given, info)
        y, memory = self.mix(x_BTD, info, memory, True)
        assert memory is not None
        place = given or start(x_BTD.shape[0])
        return y, {**memory, **moved(place, info)}, {}

    def init_state(self, batch: int, max_len: int, dtype: Any) -> State:
        """Returns the state before the first token; its size does not depend on `max_len`."""
        del max_len
        return {**self.memory(batch, dtype), **start(batch)}

    def step(
        self, x_BD: jax.Array, state: State, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, State]:
        """Advances every row by one token; returns (y [B, D], state)."""
        chex.assert_rank(x_BD, 2)
        info = next_token(self.check_state(state), reset)
        memory, place = continued(state, info), moved(state, info)
        # One token lies in one document: kernels need no ids.
        one = dataclasses.replace(info, segment_ids=None)
        y, new = self.mix(x_BD[:, None], one, memory, True)
        assert new is not None
        return y[:, 0], {**new, **place}

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state: the memory, and two int32 a row."""
        return nbytes(jax.eval_shape(lambda: self.init_state(batch, max_len, dtype)))

    def state_length(self, state: State) -> int:
        """Returns the `max_len` that a state was made for, where its size depends on it."""
        del state
        return 1

    def check_state(self, state: State) -> State:
        """Returns the state.

        Raises:
          ConfigError: it is not a state of this mixer, or of another size.
        """
        length = self.state_length(state)
        make = lambda batch: self.init_state(batch, length, jnp.float32)  # noqa: E731
        return check_state(self.name, state, make)


class ToHeads(nnx.Module):
    """x [B, T, D] to [B, T, H, K]: a projection, and a short convolution behind it if asked.

    Args:
      ctx: the model's context.
      heads: heads H.
      size: dimensions K of a head.
      conv: tokens that the convolution sees; 0 leaves it out.
      activation: what comes behind both, None for nothing.
      rngs: the product's own branch.
    """

    def __init__(
        self,
        ctx: Context,
        heads: int,
        size: int,
        *,
        conv: int = 0,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.linear = Projection(
            ctx, '...d,dhk->...hk', (ctx.width, heads, size), ('embed', 'heads', 'head_dim'),
            bias=False, init=initializer(ctx, ctx.width), rngs=rngs,
        )  # fmt: skip
        axes = ('heads', 'head_dim')
        make = functools.partial(ShortConv, ctx, (heads, size), axes, taps=conv)
        self.conv = make(rngs=branch(rngs, 'conv')) if conv else None

    def memory(self, name: str, batch: int, dtype: Any) -> State:
        """Returns the convolution's entry of a memory, {} without one."""
        return {} if self.conv is None else {name: self.conv.memory(batch, dtype)}

    def __call__(
        self, x_BTD: jax.Array, name: str, info: SeqInfo, memory: State | None
    ) -> tuple[jax.Array, State]:
        """Returns ([B, T, H, K], the memory's new entry `name`, {} without a convolution)."""
        x, new = self.linear(x_BTD), {}
        if self.conv is not None:
            before = None if memory is None else memory[name]
            x, new[name] = self.conv(x, info.segment_ids, before)
        return x if self.activation is None else self.activation(x), new


class QueryKeyValue(nnx.Module):
    """Queries, keys and values of all heads, each with a short convolution if asked.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions K of a head's queries and keys.
      value_dim: dimensions V of a head's values.
      conv: tokens that the convolutions see; 0 leaves them out.
      activation: what comes behind them, None for nothing.
      rngs: the mixer's.
    """

    def __init__(
        self,
        ctx: Context,
        heads: int,
        key_dim: int,
        value_dim: int,
        *,
        conv: int = 0,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        rngs: nnx.Rngs,
    ):
        self.shape, self.width = (heads, key_dim, value_dim), ctx.width

        def make(name: str, size: int) -> ToHeads:
            return ToHeads(
                ctx, heads, size, conv=conv, activation=activation, rngs=branch(rngs, name)
            )

        self.query = make('query', key_dim)
        self.key = make('key', key_dim)
        self.value = make('value', value_dim)

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns what the convolutions remember."""
        parts = {'query': self.query, 'key': self.key, 'value': self.value}
        return {n: x for name, p in parts.items() for n, x in p.memory(name, batch, dtype).items()}

    def __call__(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, State]:
        """Returns (q [B, T, H, K], k, v [B, T, H, V], the memory of the convolutions)."""
        q, new_q = self.query(x_BTD, 'query', info, memory)
        k, new_k = self.key(x_BTD, 'key', info, memory)
        v, new_v = self.value(x_BTD, 'value', info, memory)
        return q, k, v, {**new_q, **new_k, **new_v}

    @property
    def columns(self) -> int:
        """Numbers that a token is projected to."""
        heads, key_dim, value_dim = self.shape
        return heads * (2 * key_dim + value_dim)

    @property
    def params(self) -> int:
        """Number of parameters."""
        convs = (p.conv for p in (self.query, self.key, self.value))
        return self.width * self.columns + sum(conv.params for conv in convs if conv is not None)

    @property
    def activations(self) -> int:
        """Numbers kept for a token: the outputs, and what the convolutions read."""
        return self.columns * (1 if self.query.conv is None else 2)


def matrix_memory(batch: int, heads: int, key_dim: int, value_dim: int, dtype: Any) -> jax.Array:
    """Returns a matrix of zeros [B, H, K, V] in float32 (float64 for float64)."""
    return jnp.zeros((batch, heads, key_dim, value_dim), jnp.promote_types(dtype, jnp.float32))


def from_heads(ctx: Context, heads: int, size: int, *, rngs: nnx.Rngs) -> Projection:
    """Returns the projection [heads, head_dim, embed] back to the width."""
    return Projection(
        ctx, '...hv,hvd->...d', (heads, size, ctx.width), ('heads', 'head_dim', 'embed'),
        bias=False, init=initializer(ctx, heads * size, residual=True), rngs=rngs,
    )  # fmt: skip


def need_causal(ctx: Context, name: str) -> None:
    """Raises ConfigError where the model looks in both directions."""
    if not ctx.causal:
        raise ConfigError(
            f'{name} is causal: a token sees those before it only, so that it cannot look in both '
            'directions; use attention in a bidirectional model.'
        )


def start(batch: int) -> State:
    """Returns the place before the first token: no document, position -1."""
    return {
        'segment': jnp.zeros(batch, jnp.int32),
        'position': jnp.full(batch, -1, jnp.int32),
    }


def continued(state: Mapping[str, jax.Array], info: SeqInfo) -> State:
    """Returns the memory of a state, 0 in rows whose first real token begins a document."""
    memory = {name: x for name, x in state.items() if name not in _PLACE}
    if info.segment_ids is None:
        return memory
    real = info.segment_ids != 0
    first = jnp.argmax(real, axis=1)
    entered = jnp.take_along_axis(info.segment_ids, first[:, None], axis=1)[:, 0]
    goes_on = ~real.any(axis=1) | (entered == state['segment'])

    def keep(x: jax.Array) -> jax.Array:
        return jnp.where(goes_on.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros_like(x))

    return jax.tree.map(keep, memory)


def moved(state: Mapping[str, jax.Array], info: SeqInfo) -> State:
    """Returns the place after new tokens: the last document's id and the position in it."""
    ids = segments(dict(state), info)
    some, last = last_real(ids)

    def newest(x: jax.Array, before: jax.Array) -> jax.Array:
        return jnp.where(some, jnp.take_along_axis(x, last[:, None], axis=1)[:, 0], before)

    return {
        'segment': newest(ids, state['segment']),
        'position': newest(info.positions, state['position']),
    }
