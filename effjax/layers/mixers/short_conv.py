"""The short convolution as a layer: taps, bias and activation, and the inputs it remembers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.kernels import short_conv


class ShortConv(nnx.Module):
    """Causal depthwise convolution of `taps` tokens, `activation(sum_k w_k x_{t-taps+1+k} + bias)`.

    A mixer calls it on its projections, with the documents of `info`, and keeps `memory` in its
    own state. Taps and bias start uniform within 1 / sqrt(taps), as those of Mamba do.

    Args:
      ctx: the model's context.
      shape: of the channels, such as (C,) or (heads, head_dim).
      axes: names of these dimensions.
      taps: tokens that an output sees, itself included.
      bias: whether there is a bias.
      activation: what the sum goes through, None for nothing.
      implementation: of the convolution; None picks the best that can run.

    Raises:
      ConfigError: less than one tap.
    """

    def __init__(
        self,
        ctx: Context,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        *,
        taps: int = 4,
        bias: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if taps < 1:
            raise ConfigError(f'a short convolution has at least one tap, not {taps}.')
        self.shape, self.taps = tuple(shape), taps
        self.activation, self.implementation = activation, implementation
        self.policy = ctx.policy

        def draw(shape: tuple[int, ...]) -> jax.Array:
            most = taps**-0.5
            return jax.random.uniform(rngs.params(), shape, ctx.policy.param_dtype, -most, most)

        self.kernel = param(draw((taps, *self.shape)), ('conv', *axes))
        self.bias = param(draw(self.shape), tuple(axes), no_decay=True) if bias else None

    @property
    def params(self) -> int:
        """Number of parameters."""
        channels = 1
        for n in self.shape:
            channels *= n
        return channels * (self.taps + (self.bias is not None))

    def memory(self, batch: int, dtype: Any) -> jax.Array:
        """Returns the inputs before the first token, zeros [B, taps - 1, ...]."""
        return jnp.zeros((batch, self.taps - 1, *self.shape), dtype)

    def __call__(
        self,
        x: jax.Array,
        segment_ids: jax.Array | None = None,
        memory: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Convolves a stretch of tokens.

        Args:
          x: [B, T, ...] in the compute dtype.
          segment_ids: int32 [B, T], 0 is padding; None: every token is of the memory's document.
          memory: the inputs before, [B, taps - 1, ...], of the document of the row's first real
            token (0 where that is another); None is 0.

        Returns:
          (y like x, the memory after the last document's last token). Outputs at padding are
          those of an input of 0: nothing may read them.
        """
        y, memory = short_conv(
            x,
            self.policy.cast(self.kernel[...]),
            state=memory,
            segment_ids=segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        if self.bias is not None:
            y = y + self.policy.cast(self.bias[...])
        return y if self.activation is None else self.activation(y), memory
