"""The key-value cache: what softmax attention keeps of the tokens before.

Rows may hold different numbers of tokens: padding is not stored, so that the tokens of a row lie
one after another in the order they came, and a row's current document is the last stretch of
them. The cache is a dict:
  key, value: [B, G, S, D], heads in front, as the products of decoding read them; token number n
    lies in slot n, or n modulo S in a ring (a window); in a ring behind `first` slots, these hold
    the current document's first tokens;
  count: int32 [B], tokens stored so far;
  start: int32 [B], number of the current document's first token;
  segment: int32 [B], the current document's id, 0 before the first token;
  position: int32 [B], position of the last token in its document, -1 before the first.
A slot's token number and document follow from these, so that nothing else is kept a slot.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo

Cache = dict[str, jax.Array]


def init(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> Cache:
    """Returns an empty cache."""
    return {
        'key': jnp.zeros((batch, kv_heads, slots, head_dim), dtype),
        'value': jnp.zeros((batch, kv_heads, slots, head_dim), dtype),
        'count': jnp.zeros(batch, jnp.int32),
        'start': jnp.zeros(batch, jnp.int32),
        'segment': jnp.zeros(batch, jnp.int32),
        'position': jnp.full(batch, -1, jnp.int32),
    }


def check_state(name: str, state: Cache, make: Callable[[int], Cache]) -> Cache:
    """Returns a mixer's state, whatever it remembers, if `make(batch)` has arrays of its shapes.

    Raises:
      ConfigError: it is not a state of the mixer called `name`, or of another size.
    """
    batch = len(state['segment']) if 'segment' in state else 0
    wanted = {key: x.shape for key, x in jax.eval_shape(lambda: make(batch)).items()}
    found = {key: x.shape for key, x in state.items()}
    if found != wanted:
        raise ConfigError(
            f'{name} got the state of another config: arrays {found} where it keeps {wanted}; make '
            'one with init_state.'
        )
    return state


def kv_bytes(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> int:
    """Bytes of the keys and values."""
    return 2 * math.prod((batch, slots, kv_heads, head_dim)) * jnp.dtype(dtype).itemsize


def state_bytes(batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any) -> int:
    """Bytes of a whole cache: the keys and values, and four int32 a row."""
    return kv_bytes(batch, slots, kv_heads, head_dim, dtype) + 16 * batch


def size(cache: Cache) -> int:
    """Slots S of a cache."""
    return cache['key'].shape[2]


def contents(cache: Cache, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values as attention takes them, [B, S, G, D]."""
    key, value = (cache[name].swapaxes(1, 2).astype(dtype) for name in ('key', 'value'))
    return key, value


def segments(cache: Cache, info: SeqInfo) -> jax.Array:
    """Returns the documents [B, T] of new tokens; without ids they continue the current one."""
    if info.segment_ids is not None:
        return info.segment_ids
    return jnp.broadcast_to(jnp.maximum(cache['segment'], 1)[:, None], info.positions.shape)


def numbers(cache: Cache, segment_ids: jax.Array) -> jax.Array:
    """Returns the token numbers [B, T] of new tokens; padding has that of the token before."""
    real = (segment_ids != 0).astype(jnp.int32)
    return cache['count'][:, None] + jnp.cumsum(real, axis=1) - 1


def slots(cache: Cache, *, ring: bool, first: int = 0) -> tuple[jax.Array, jax.Array]:
    """Returns each slot's token number and document, both [B, S]; 0 where it may not be read.

    Slots of earlier documents read as padding, and so does the ring's copy of a token that the
    `first` slots hold.
    """
    ring_size = size(cache) - first
    start, last = cache['start'][:, None], cache['count'][:, None] - 1
    slot = jnp.arange(ring_size)[None]
    number = (
        last - (last - slot) % ring_size if ring else jnp.broadcast_to(slot, (len(last), ring_size))
    )
    live = (number >= start + first) & (number <= last)
    if first:
        front = start + jnp.arange(first)
        number = jnp.concatenate([front, number], axis=1)
        live = jnp.concatenate([front <= last, live], axis=1)
    return number, jnp.where(live, cache['segment'][:, None], 0)


def extend(
    cache: Cache, key: jax.Array, value: jax.Array, info: SeqInfo, *, ring: bool, first: int = 0
) -> Cache:
    """Returns the cache after new tokens with keys and values [B, T, G, D].

    Tokens beyond the last slot of a full cache are not stored; of a ring, the oldest give way,
    but for the current document's `first` ones.
    """
    segment_ids = segments(cache, info)
    number = numbers(cache, segment_ids)
    real = segment_ids != 0
    whole = size(cache)
    ring_size = whole - first
    count = cache['count'] + jnp.sum(real, axis=1, dtype=jnp.int32)
    some, last = last_real(segment_ids)
    segment = jnp.where(some, _at(segment_ids, last), cache['segment'])
    far = jnp.iinfo(jnp.int32).max
    begin = jnp.min(jnp.where(segment_ids == segment[:, None], number, far), axis=1)
    start = jnp.where(segment == cache['segment'], cache['start'], begin)
    if ring:  # two tokens must not write one slot: their order would be undefined
        fits = number >= count[:, None] - ring_size
        slot = jnp.where(real & fits, first + number % ring_size, whole)
    else:
        slot = jnp.where(real, number, whole)
    place = number - start[:, None]
    front = jnp.where((segment_ids == segment[:, None]) & real & (place < first), place, whole)
    row = jnp.arange(key.shape[0])[:, None]

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(old.dtype)
        out = old.at[row, :, slot].set(new, mode='drop')
        return out.at[row, :, front].set(new, mode='drop') if first else out

    return {
        'key': write(cache['key'], key),
        'value': write(cache['value'], value),
        'count': count,
        'start': start,
        'segment': segment,
        'position': jnp.where(some, _at(info.positions, last), cache['position']),
    }


def last_real(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns whether a row has a token that is no padding, and where its last one stands."""
    length = segment_ids.shape[1]
    last = jnp.max(jnp.where(segment_ids != 0, jnp.arange(length), -1), axis=1)
    return last >= 0, jnp.maximum(last, 0)


def next_token(cache: Cache, reset: jax.Array | None) -> SeqInfo:
    """Returns the info of one more token a row, [B, 1]."""
    segment = jnp.maximum(cache['segment'], 1)
    position = cache['position'] + 1
    if reset is not None:
        # The first token of all begins its document anyway.
        segment = segment + (reset & (cache['segment'] > 0))
        position = jnp.where(reset, 0, position)
    return SeqInfo(positions=position[:, None], segment_ids=segment[:, None])


def _at(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]
