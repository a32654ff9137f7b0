"""The decoder language model: a causal body that also runs token by token."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from effjax.core.info import SeqInfo
from effjax.layers.mixers.cache import last_real
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
        cache = self.body.init_state(batch, max_len, dtype or self.compute_dtype)
        return {'body': cache, 'position': jnp.zeros(batch, jnp.int32)}

    def prefill(
        self, tokens_BT: jax.Array, state: Tree, info: SeqInfo | None = None
    ) -> tuple[jax.Array, Tree]:
        """Reads tokens at once, continuing from `state`; returns (hidden [B, T, D], state).

        Args:
          tokens_BT: int32.
          state: from `init_state`, or what an earlier call returned.
          info: default: one document, whose positions continue the state's. Padding (segment 0)
            leaves a row's state as it was.
        """
        if info is None:
            info = SeqInfo.of(*tokens_BT.shape)
            info = SeqInfo(positions=info.positions + state['position'][:, None])
        hidden, cache, _ = self._forward(tokens_BT, info, state['body'], True)
        if info.segment_ids is None:
            return hidden, {'body': cache, 'position': info.positions[:, -1] + 1}
        some, last = last_real(info.segment_ids)
        position = jnp.take_along_axis(info.positions, last[:, None], 1)[:, 0] + 1
        position = jnp.where(some, position, state['position'])
        return hidden, {'body': cache, 'position': position}

    def step(
        self, token_B: jax.Array, state: Tree, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        """Advances each row by one token; returns (hidden [B, D], state).

        Args:
          token_B: int32.
          state: from `init_state`, `prefill` or `step`.
          reset: bool [B]; True starts a new document with this token.
        """
        chex.assert_rank(token_B, 1)
        position = state['position']
        if reset is not None:
            position = jnp.where(reset, 0, position)
        x_BD = self._embed(token_B, position)
        x_BD, cache = self.body.step(x_BD, state['body'], reset)
        return self._final(x_BD), {'body': cache, 'position': position + 1}
