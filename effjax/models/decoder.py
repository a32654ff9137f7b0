"""The decoder language model: a causal body that also runs token by token."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from effjax.core.info import SeqInfo
from effjax.layers.dropout import dropout
from effjax.layers.mixers.cache import last_real
from effjax.models import blocks
from effjax.models.text import TextModel

Tree = Any


class Decoder(TextModel):
    """A causal language model; its arguments are those of `models.text.TextModel`."""

    causal = True

    def init_state(self, batch: int, max_len: int, dtype: Any = None) -> Tree:
        """Returns an empty decoding state for `max_len` tokens.

        Raises:
          ConfigError: longer than the model was built for.
        """
        self._check_length(max_len)
        position = jnp.zeros(batch, jnp.int32)
        if self.memory is not None:
            max_len = self.memory.length
        cache = self.body.init_state(batch, max_len, dtype or self.compute_dtype)
        if self.memory is None:
            return {'body': cache, 'position': position}
        # The first step puts the trained memory here: a state's shape asks for no arrays.
        shape = (batch, self.memory.tokens, self.width)
        memory = jnp.zeros(shape, self.compute_dtype)
        return {'body': cache, 'position': position, 'memory': memory}

    def prefill(
        self, tokens_BT: jax.Array, state: Tree, info: SeqInfo | None = None
    ) -> tuple[jax.Array, Tree]:
        """Reads tokens at once, continuing from `state`; returns (hidden [B, T, D], state).

        Args:
          tokens_BT: int32.
          state: from `init_state`, or what an earlier call returned.
          info: default: one document, whose positions continue the state's. Padding (segment 0)
            leaves a row's state as it was.

        A model with a memory reads token by token, since rows may change segments at any of them;
        in it position 0 begins a document.
        """
        if info is None:
            info = SeqInfo.of(*tokens_BT.shape)
            info = SeqInfo(positions=info.positions + state['position'][:, None])
        if self.memory is not None:
            return self._read(tokens_BT, state, info)
        hidden, cache, _ = self._forward(tokens_BT, info, state['body'], True)
        if info.segment_ids is None:
            return hidden, {'body': cache, 'position': info.positions[:, -1] + 1}
        some, last = last_real(info.segment_ids)
        position = jnp.take_along_axis(info.positions, last[:, None], 1)[:, 0] + 1
        position = jnp.where(some, position, state['position'])
        return hidden, {'body': cache, 'position': position}

    def by_layer(self, state: Tree) -> Tree:
        """Returns a decoding state that `step` writes in place; only `step` takes it.

        With a recurrent memory the state stays as it is.
        """
        if self.memory is not None:
            return state
        return {**state, 'body': self.body.by_layer(state['body'])}

    def step(
        self, token_B: jax.Array, state: Tree, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """Advances each row by one token; returns (hidden [B, D], state).

        Args:
          token_B: int32.
          state: from `init_state`, `prefill`, `by_layer` or `step`.
          reset: bool [B]; True starts a new document with this token.
        """
        chex.assert_rank(token_B, 1)
        position = state['position']
        if reset is not None:
            position = jnp.where(reset, 0, position)
        if self.memory is not None:
            return self._step_in_segment(token_B, {**state, 'position': position})
        x_BD = self._embed(token_B, position)
        x_BD, cache = self.body.step(x_BD, state['body'], reset)
        return self._final(x_BD), {'body': cache, 'position': position + 1}

    # ---- with a recurrent memory ----------------------------------------------------------------

    def _forward(self, tokens_BT: jax.Array, info: SeqInfo, state: Tree, return_state: bool):
        if self.memory is None:
            return super()._forward(tokens_BT, info, state, return_state)
        chex.assert_rank(tokens_BT, 2)
        chex.assert_equal_shape([tokens_BT, info.positions])
        self._check_length(tokens_BT.shape[1])

        def run(x: jax.Array, info: SeqInfo) -> tuple[jax.Array, Tree]:
            x = dropout(self._placed(x, info.positions), self.rate, info.fold(blocks.EMBEDDING))
            x, _, aux = self.body(x, info)
            return self._normed(x), aux

        hidden, aux = self.memory(run, self._scaled(tokens_BT), info)
        return self._narrowed(hidden), None, aux

    def _step_in_segment(self, token_B: jax.Array, state: Tree) -> tuple[jax.Array, Tree]:
        """One token; rows at a segment's end write their memory and begin the next one."""
        assert self.memory is not None
        place = state['position'] % self.memory.segment
        state = jax.lax.cond(jnp.any(place == 0), self._turn, lambda state: state, state)
        x_BD = self._embed(token_B, self.memory.tokens + place)
        x_BD, cache = self.body.step(x_BD, state['body'])
        new = {**state, 'body': cache, 'position': state['position'] + 1}
        return self._final(x_BD), new

    def _turn(self, state: Tree) -> Tree:
        """Begins a segment in the rows that are at the end of one, or of nothing."""
        assert self.memory is not None
        position, memory, m = state['position'], state['memory'], self.memory.tokens
        due, batch = position % self.memory.segment == 0, len(position)

        def run(memory: jax.Array, first: int, rows: jax.Array, cache: Tree):
            places = jnp.broadcast_to(first + jnp.arange(m, dtype=jnp.int32), (batch, m))
            # Rows that are not to run see padding, which leaves their caches as they are.
            ids = jnp.broadcast_to(rows[:, None], (batch, m)).astype(jnp.int32)
            x, cache, _ = self.body(self._placed(memory, places), SeqInfo(places, ids), cache, True)
            return self._normed(x), cache

        write = due & (position > 0)
        new, cache = run(memory, m + self.memory.segment, write, state['body'])
        memory = jnp.where(due[:, None, None], self.memory.start(batch), memory)
        memory = jnp.where(write[:, None, None], new.astype(memory.dtype), memory)
        empty = self.body.init_state(batch, self.memory.length, self.compute_dtype)
        empty = jax.tree.map(lambda new, old: new.astype(old.dtype), empty, cache)
        _, cache = run(memory, 0, due, _rows(due, empty, cache, 1))
        return {**state, 'body': cache, 'memory': memory}

    def _read(self, tokens_BT: jax.Array, state: Tree, info: SeqInfo) -> tuple[jax.Array, Tree]:
        """Reads tokens one by one, padding left out."""
        ids = info.segment_ids
        real = jnp.ones_like(tokens_BT, bool) if ids is None else ids != 0

        def one(state: Tree, inputs: Any) -> tuple[Tree, jax.Array]:
            token, begins, real = inputs
            hidden, new = self.step(token, state, reset=begins & real)
            cache = _rows(real, new.pop('body'), state['body'], 1)
            rest = {name: _rows(real, x, state[name], 0) for name, x in new.items()}
            return {**rest, 'body': cache}, hidden

        inputs = (tokens_BT.T, (info.positions == 0).T, real.T)
        state, hidden = jax.lax.scan(one, state, inputs)
        return hidden.swapaxes(0, 1), state


def _rows(which_B: jax.Array, new: Tree, old: Tree, axis: int) -> Tree:
    """New arrays in some rows, old ones in the others; rows lie along `axis`."""

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        shape = [-1 if i == axis else 1 for i in range(new.ndim)]
        return jnp.where(which_B.reshape(shape), new, old)

    return jax.tree.map(one, new, old)
