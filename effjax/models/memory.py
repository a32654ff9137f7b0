"""Recurrent memory: segments of a row read tokens of memory and write those of the next segment."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.registry import check_arguments

PATH = 'config.model.memory'
Run = Callable[[jax.Array, SeqInfo], tuple[jax.Array, Any]]


class RecurrentMemory(nnx.Module):
    """What stands around each segment, and the scan over segments (arXiv 2207.06881).

    A segment runs as `[memory, its tokens, memory]`: tokens read the memory in front; what the
    model makes of the copies behind is the memory of the next segment. The first memory is trained.
    All of it is causal, the tokens of a memory among themselves too. The last segment writes
    nothing.

    Args:
      ctx: the model's context.
      tokens: tokens m of the memory.
      segment: tokens L of a segment; only the last of a row may have fewer.
      truncate: gradients pass at most so many segments: the memory that enters segments k, 2k, ...
        brings none. None never stops them.

    Raises:
      ConfigError: sizes that cannot be, or rows of a single segment.
    """

    def __init__(
        self,
        ctx: Context,
        *,
        tokens: int,
        segment: int,
        truncate: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.tokens, self.segment, self.truncate = tokens, segment, truncate
        self.policy, self.width = ctx.policy, ctx.width
        first = 0.02 * jax.random.normal(rngs.params(), (tokens, ctx.width), jnp.float32)
        first = first.astype(ctx.policy.param_dtype)
        self.first = param(first, ('position', 'embed'), no_decay=True)

    @property
    def length(self) -> int:
        """Tokens of a segment with both memories."""
        return self.segment + 2 * self.tokens

    def start(self, batch: int) -> jax.Array:
        """Returns the memory of a row's first segment, [B, m, D]."""
        first = self.policy.cast(self.first[...])
        return jnp.broadcast_to(first, (batch, self.tokens, self.width))

    def __call__(self, run: Run, x_BTD: jax.Array, info: SeqInfo) -> tuple[jax.Array, Any]:
        """Runs the segments of a row one after another.

        Args:
          run: `(x [B, S, D], info) -> (hidden [B, S, D], aux)`, the model on one stretch.
          x_BTD: embedded tokens without positions.
          info: of the row; each segment gets positions of its own and a key of its own.

        Returns:
          (hidden [B, T, D], aux: (sum, weight) pairs, summed over segments).

        Raises:
          ConfigError: rows with documents or padding.
        """
        if info.segment_ids is not None:
            raise ConfigError(
                f'{PATH} carries what a row has read from segment to segment and cannot keep its '
                "documents apart; set config.data.packing to 'stream', or leave memory at None."
            )
        batch, length, width = x_BTD.shape
        m, size, whole = self.tokens, self.segment, self.before(length)

        def stretch(memory: jax.Array, x: jax.Array, index: Any, write: bool) -> Any:
            parts = [memory, x, memory] if write else [memory, x]
            x = jnp.concatenate([part.astype(x.dtype) for part in parts], axis=1)
            own = SeqInfo.of(batch, x.shape[1], rng=info.rng, train=info.train).fold(index)
            return run(x, own)

        def one(memory: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> Any:
            index, x = inputs
            out, aux = stretch(self.cut(memory, index), x, index, True)
            return out[:, m + size :].astype(memory.dtype), (out[:, m : m + size], aux)

        memory, parts, before = self.start(batch), [], None
        if whole:
            x = x_BTD[:, : whole * size].reshape(batch, whole, size, width).swapaxes(0, 1)
            memory, (hidden, before) = jax.lax.scan(one, memory, (jnp.arange(whole), x))
            parts = [hidden.swapaxes(0, 1).reshape(batch, whole * size, -1)]
        index = jnp.asarray(whole)
        out, aux = stretch(self.cut(memory, index), x_BTD[:, whole * size :], index, False)
        if before is not None:
            aux = jax.tree.map(lambda all, last: jnp.sum(all, axis=0) + last, before, aux)
        return jnp.concatenate([*parts, out[:, m:]], axis=1), aux

    def cut(self, memory: jax.Array, index: jax.Array) -> jax.Array:
        """Returns the memory that enters segment `index`, without gradient where it is cut."""
        if self.truncate is None:
            return memory
        return jnp.where(index % self.truncate == 0, jax.lax.stop_gradient(memory), memory)

    def before(self, length: int) -> int:
        """Returns how many segments of a row of so many tokens come before its last."""
        return (length - 1) // self.segment

    def rows(self, length: int) -> int:
        """Returns how many tokens a row of so many runs as, memories included."""
        return length + self.tokens * (2 * self.before(length) + 1)

    def cost(self, of_body: Callable[[int], dict[str, Cost]], length: int) -> dict[str, Cost]:
        """Returns the body's cost over a row's segments, from that of one stretch by its length."""
        whole = self.before(length)
        full, last = of_body(self.length), of_body(self.tokens + length - whole * self.segment)

        def joined(full: Cost, last: Cost) -> Cost:
            return dataclasses.replace(
                full.times(whole, shared=True) + last,
                params=full.params,
                params_used=full.params_used,
                state_bytes=full.state_bytes,
            )

        return {part: joined(full[part], last[part]) for part in full}


def check(memory: Mapping[str, Any], max_len: int) -> None:
    """Checks a model's memory block.

    Raises:
      ConfigError: unknown or missing keys, or sizes that cannot be.
    """
    check_arguments(RecurrentMemory, memory, 'a memory', PATH)
    for key in ('tokens', 'segment', 'truncate'):
        value = memory.get(key)
        if value is not None and value < 1:
            raise ConfigError(f'{PATH}.{key} must be at least 1, got {value}.')
    if memory['segment'] >= max_len:
        raise ConfigError(
            f'{PATH}.segment {memory["segment"]} makes one segment of a row of {max_len} tokens, '
            'so that no memory is ever read; give a shorter segment, or leave memory at None.'
        )
