"""BaseConv: a convolution, short or as long as the row, gated by a projection."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.mixers.hyena import Hyena, ImplicitFilter, remember
from effjax.layers.mixers.recurrent import State, need_causal
from effjax.layers.mixers.short_conv import ShortConv


class BaseConv(Hyena):
    """`y = conv(x) * (project x) + x`: the gated convolution at its simplest.

    Arora et al., Zoology, arXiv 2312.04927, section 4.2. With `conv` taps the convolution is
    short and decoding keeps that many inputs; with `conv=0` its filter is implicit, as long as the
    sequence, with a skip of weight 1, and decoding keeps the inputs of the whole document, as
    Hyena does.

    Args:
      ctx: the model's context.
      conv: taps of a short convolution; 0 makes it long.
      filter_width: hidden width of the long filters' network.
      filter_layers: its hidden layers after the first.
      filter_std: standard deviation of its first weights, biases 0; None: uniform, see `Hyena`.
      bias: whether the projection and the short convolution carry a bias; None asks the model.
      implementation: of the long convolution; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes that cannot be.
    """

    name = 'base_conv'
    growth_spec = GrowthSpec()  # it passes its input on whatever its products are

    def __init__(
        self,
        ctx: Context,
        *,
        conv: int = 3,
        filter_width: int = 16,
        filter_layers: int = 2,
        filter_std: float | None = None,
        bias: bool | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if conv < 0:
            raise ConfigError(f'base_conv: conv must be at least 0, got {conv}.')
        self.width, self.order, self.max_len = ctx.width, 2, ctx.max_len
        self.policy, self.implementation = ctx.policy, implementation
        self.with_bias = ctx.bias if bias is None else bias
        self.taps, self.inputs = conv, ()
        self.project = self._projection(ctx, 'mlp', branch(rngs, 'project'))
        if conv:
            self.short: Any = ShortConv(
                ctx, (ctx.width,), ('mlp',), taps=conv, bias=self.with_bias,
                rngs=branch(rngs, 'short'),
            )  # fmt: skip
        else:
            self.filter = ImplicitFilter(
                ctx, 1, width=filter_width, layers=filter_layers, bands=1, frequency=1.0,
                fast=0.3, slow=1.5, std=filter_std, rngs=branch(rngs, 'filter'),
            )  # fmt: skip

    def _memory(self, batch: int, slots: int, dtype: Any) -> State:
        if self.taps:
            return {'tail': self.short.memory(batch, dtype)}
        return super()._memory(batch, slots, dtype)

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Convolves and gates a stretch of tokens; see `Recurrent.mix`."""
        if self.taps:
            before = None if memory is None else memory['tail']
            convolved, tail = self.short(x_BTD, info.segment_ids, before)
            return convolved * self.project(x_BTD) + x_BTD, {'tail': tail}
        self._check_length(x_BTD.shape[1])
        old = memory or (self.memory(len(x_BTD), x_BTD.dtype) if return_memory else None)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        taps = self.filter(x_BTD.shape[1] if old is None else self.max_len, wide)
        past = None if memory is None else memory['history'][:, :, 0]
        convolved = self._long(x_BTD, taps[:, 0], info, past) + x_BTD
        y = convolved * self.project(x_BTD) + x_BTD
        if old is None or not return_memory:
            return y, None
        return y, {'history': remember(old['history'], x_BTD[:, :, None], info)}

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; long filters are written once for all rows and do not count."""
        tokens, item = batch * seq_len, self.policy.compute_dtype.itemsize
        params = self.width**2 + (self.width if self.with_bias else 0)
        params += self.short.params if self.taps else self.filter.params
        return Cost(
            matmul=matmul_flops(tokens, self.width, self.width),
            fft=0.0 if self.taps else model_flops(batch, seq_len, self.width),
            params=params,
            params_used=params,
            # The input, its convolution and its projection; a long one's transform in float32.
            activation_bytes=tokens * self.width * (3 * item + (0 if self.taps else 8)),
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
