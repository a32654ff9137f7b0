"""RWKV-6: linear attention whose decays and mixtures with the token before depend on the token."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import linear_recurrence
from effjax.kernels.linear_recurrence.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import (
    Recurrent,
    State,
    ToHeads,
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.mixers.token_shift import shifted
from effjax.layers.norms import layer_norm

_MIXED = ('decay', 'key', 'value', 'receptance', 'gate')


class RWKV6(Recurrent):
    """`out(norm(o) silu(gate))`, o_t = r_t (S_{t-1} + diag(u) k_t v_t^T), S_t decays by row.

    The time mixing of RWKV-6, "Finch" (Peng et al., arXiv 2404.05892). Each of its five inputs is
    a mixture of the token and the one before it, by rates that a product of low rank gives; the
    decay exp(-exp(d)) of each row of a head's matrix is another such product; a head's output is
    normalised by mean and variance. Its channel mixing is a feed-forward part of its own, which
    any of `ffn` takes the place of.

    Args:
      ctx: the model's context.
      heads: heads H; width / heads dimensions each.
      rank: inner dimensions of each product that mixtures come from.
      decay_rank: inner dimensions of the product that decays come from.
      eps: added to the variance of a head's output.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or ranks that cannot be.
    """

    name = 'rwkv6'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        rank: int = 32,
        decay_rank: int = 64,
        eps: float = 64e-5,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if heads < 1 or ctx.width % heads:
            raise ConfigError(f'rwkv6: heads {heads} do not divide width {ctx.width}.')
        if min(rank, decay_rank) < 1:
            raise ConfigError(
                f'rwkv6: rank and decay_rank are at least 1, not {rank} and {decay_rank}.'
            )
        self.width, self.heads, self.head_dim = ctx.width, heads, ctx.width // heads
        self.rank, self.decay_rank, self.policy = rank, decay_rank, ctx.policy
        self.eps, self.implementation = float(eps), implementation
        inward = functools.partial(ToHeads, ctx, heads, self.head_dim)
        self.receptance = inward(rngs=branch(rngs, 'receptance'))
        self.key = inward(rngs=branch(rngs, 'key'))
        self.value = inward(rngs=branch(rngs, 'value'))
        self.gate = inward(rngs=branch(rngs, 'gate'))
        self.out = from_heads(ctx, heads, self.head_dim, rngs=branch(rngs, 'out'))
        self._make_mixtures(ctx, rngs)
        self._make_decays(ctx, rngs)

    def _make_mixtures(self, ctx: Context, rngs: nnx.Rngs) -> None:
        dtype, width = ctx.policy.param_dtype, ctx.width
        # Channels differ in how much of the token before they take, from all of it to none.
        share = 1 - jnp.arange(width, dtype=jnp.float32) / width
        self.first_share = param(share.astype(dtype), ('embed',), no_decay=True)
        for name in _MIXED:
            vector = param(share.astype(dtype), ('embed',), no_decay=True)
            setattr(self, f'{name}_share', vector)
            down = Projection(
                ctx, '...d,dr->...r', (width, self.rank), ('embed', 'rank'), bias=False,
                init=initializer(ctx, width), rngs=branch(rngs, f'{name}_down'),
            )  # fmt: skip
            up = Projection(
                ctx, '...r,rd->...d', (self.rank, width), ('rank', 'embed'), bias=False,
                init=initializer(ctx, self.rank), rngs=branch(rngs, f'{name}_up'),
            )  # fmt: skip
            setattr(self, f'{name}_down', down)
            setattr(self, f'{name}_up', up)

    def _make_decays(self, ctx: Context, rngs: nnx.Rngs) -> None:
        dtype, shape = ctx.policy.param_dtype, (self.heads, self.head_dim)
        self.rate_down = Projection(
            ctx, '...d,dr->...r', (ctx.width, self.decay_rank), ('embed', 'rank'), bias=False,
            init=initializer(ctx, ctx.width), rngs=branch(rngs, 'rate_down'),
        )  # fmt: skip
        self.rate_up = Projection(
            ctx, '...r,rhk->...hk', (self.decay_rank, *shape), ('rank', 'heads', 'head_dim'),
            bias=False, init=initializer(ctx, self.decay_rank), rngs=branch(rngs, 'rate_up'),
        )  # fmt: skip
        fixed = functools.partial(param, axes=('heads', 'head_dim'), no_decay=True)
        # exp(-exp(rate)) from almost 1 (-6) to almost forgetting at once (-1 and above).
        place = jnp.linspace(0.0, 1.0, ctx.width).reshape(shape)
        self.rate_bias = fixed((-6 + 5 * place**0.9).astype(dtype), keep_fp32=True)
        self.bonus = fixed((0.5 * (1 - place)).astype(dtype), keep_fp32=True)
        self.scale = fixed(jnp.ones(shape, dtype))
        self.shift = fixed(jnp.zeros(shape, dtype))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns a matrix [K, K] a head, float32, and the last token's input."""
        shape = (self.heads, self.head_dim, self.head_dim)
        return {
            'recurrence': matrix_memory(batch, *shape, dtype),
            'token': jnp.zeros((batch, self.width), dtype),
        }

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Time mixing over a stretch of tokens; see `Recurrent.mix`."""
        before = (None, None) if memory is None else (memory['token'], memory['recurrence'])
        previous, token = shifted(x_BTD, info, before[0])
        mixed = self._mixtures(x_BTD, previous - x_BTD)
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        rate = self.rate_up(jnp.tanh(self.rate_down(mixed['decay']))).astype(wide)
        o, recurrence = linear_recurrence(
            self.receptance.linear(mixed['receptance']),
            self.key.linear(mixed['key']),
            self.value.linear(mixed['value']),
            -jnp.exp(rate + self.rate_bias[...].astype(wide)),
            bonus=self.bonus[...],
            initial_state=before[1],
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        y = head_norm(self.eps, o, self.scale[...], self.shift[...])
        y = self.out(y * jax.nn.silu(self.gate.linear(mixed['gate'])))
        return y, {'recurrence': recurrence, 'token': token} if return_memory else None

    def _mixtures(self, x: jax.Array, difference: jax.Array) -> dict[str, jax.Array]:
        """What the five products read: the token, and by each a share of the one before."""
        first = x + difference * self.policy.cast(self.first_share[...])
        out = {}
        for name in _MIXED:
            down, up = getattr(self, f'{name}_down'), getattr(self, f'{name}_up')
            share = self.policy.cast(getattr(self, f'{name}_share')[...])
            out[name] = x + difference * (share + up(jnp.tanh(down(first))))
        return out

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: five products of full rank, six of low, the recurrence."""
        tokens, width = batch * seq_len, self.width
        low = 2 * (len(_MIXED) * self.rank + self.decay_rank)
        params = width * (5 * width + low) + 10 * width
        return Cost(
            matmul=matmul_flops(tokens, width, 5 * width + low),
            scan=model_flops(
                batch, seq_len, self.heads, self.head_dim, self.head_dim, decay=True, bonus=True
            ),
            params=params,
            params_used=params,
            # The input, its difference and six mixtures, their rates, four projections, the
            # recurrence's output before and after the norm and gated; inner dimensions; decays.
            activation_bytes=tokens * (21 * width + low) * self.policy.compute_dtype.itemsize
            + 4.0 * tokens * width,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def head_norm(eps: float, x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns [B, T, H, K] with mean 0 and variance 1 in each head, times scale, plus shift."""
    unit = layer_norm(eps, x, jnp.ones(x.shape[-1], scale.dtype))
    return unit * scale.astype(x.dtype) + shift.astype(x.dtype)
