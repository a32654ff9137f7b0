"""RWKV-7: a delta rule whose decays, rates and keys are chosen dimension by dimension."""

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
from effjax.kernels import dplr
from effjax.kernels.dplr.cost import CHUNK, model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import (
    Recurrent,
    State,
    ToHeads,
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.mixers.rwkv6 import head_norm
from effjax.layers.mixers.token_shift import shifted

_MIXED = ('receptance', 'decay', 'key', 'value', 'rate', 'gate')
_LOW = ('decay', 'rate', 'gate')


class RWKV7(Recurrent):
    """`out((norm(o) + b) g)`, o_t = r_t S_t, S_t = (diag(w) - (a e) e^T) S_{t-1} + k v^T.

    The time mixing of RWKV-7, "Goose" (Peng et al., arXiv 2503.14456). e is the token's removal
    key, of norm 1: what the state holds for it is taken out at rates a in (0, 1), one for each
    dimension, as are decays w = exp(-e^(-1/2) sigmoid(d)). d, a and the gate g are products of
    low rank; each of the six inputs is a fixed mixture of the token and the one before it. b is
    the token's own value, weighted by (r u) . k. Left out: the mixture of values with those of
    the first layer, which a mixer does not see, and the channel mixing, a feed-forward part of
    its own, which any of `ffn` takes the place of.

    Args:
      ctx: the model's context.
      heads: heads H; width / heads dimensions each.
      rank: inner dimensions of the products that decays and rates come from.
      gate_rank: inner dimensions of the product that gates come from.
      eps: added to the variance of a head's output.
      chunk: tokens of a chunk of the parallel form.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or ranks that cannot be.
    """

    name = 'rwkv7'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        rank: int = 64,
        gate_rank: int = 128,
        eps: float = 64e-5,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if heads < 1 or ctx.width % heads:
            raise ConfigError(f'rwkv7: heads {heads} do not divide width {ctx.width}.')
        if min(rank, gate_rank, chunk) < 1:
            raise ConfigError(
                f'rwkv7: rank, gate_rank and chunk are at least 1, not {rank}, {gate_rank} and '
                f'{chunk}.'
            )
        self.width, self.heads, self.head_dim = ctx.width, heads, ctx.width // heads
        self.ranks = {'decay': rank, 'rate': rank, 'gate': gate_rank}
        self.policy, self.eps = ctx.policy, float(eps)
        self.chunk, self.implementation = chunk, implementation
        inward = functools.partial(ToHeads, ctx, heads, self.head_dim)
        self.receptance = inward(rngs=branch(rngs, 'receptance'))
        self.key = inward(rngs=branch(rngs, 'key'))
        self.value = inward(rngs=branch(rngs, 'value'))
        self.out = from_heads(ctx, heads, self.head_dim, rngs=branch(rngs, 'out'))
        self._make_low_rank(ctx, rngs)
        self._make_vectors(ctx)

    def _make_low_rank(self, ctx: Context, rngs: nnx.Rngs) -> None:
        for name in _LOW:
            rank = self.ranks[name]
            down = Projection(
                ctx, '...d,dr->...r', (ctx.width, rank), ('embed', 'rank'), bias=False,
                init=initializer(ctx, ctx.width), rngs=branch(rngs, f'{name}_down'),
            )  # fmt: skip
            up = Projection(
                ctx, '...r,rhk->...hk', (rank, self.heads, self.head_dim),
                ('rank', 'heads', 'head_dim'), bias=False, init=initializer(ctx, rank),
                rngs=branch(rngs, f'{name}_up'),
            )  # fmt: skip
            setattr(self, f'{name}_down', down)
            setattr(self, f'{name}_up', up)

    def _make_vectors(self, ctx: Context) -> None:
        dtype, shape = ctx.policy.param_dtype, (self.heads, self.head_dim)
        # Channels differ in how much of the token before they take, from all of it to none.
        share = 1 - jnp.arange(ctx.width, dtype=jnp.float32) / ctx.width
        for name in _MIXED:
            vector = param(share.astype(dtype), ('embed',), no_decay=True)
            setattr(self, f'{name}_share', vector)
        place = jnp.linspace(0.0, 1.0, ctx.width).reshape(shape)

        def fixed(value, **kw):
            value = jnp.broadcast_to(jnp.asarray(value, dtype), shape)
            return param(value, ('heads', 'head_dim'), no_decay=True, **kw)

        # Decays from 0.998 to 0.64 a token.
        self.decay_bias = fixed(-5.5 + 6.5 * place, keep_fp32=True)
        self.rate_bias = fixed(0.0, keep_fp32=True)
        self.removal = fixed(0.85)
        self.renewal = fixed(1.0)
        self.bonus = fixed(0.0)
        self.scale = fixed(1.0)
        self.shift = fixed(0.0)

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
        mixed = {
            name: x_BTD + (previous - x_BTD) * self._vector(f'{name}_share') for name in _MIXED
        }
        r = self.receptance.linear(mixed['receptance'])
        k, v = self.key.linear(mixed['key']), self.value.linear(mixed['value'])
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        decay = self._low('decay', jnp.tanh, mixed).astype(wide) + self.decay_bias[...]
        rate = self._low('rate', None, mixed).astype(wide) + self.rate_bias[...]
        rate = jax.nn.sigmoid(rate)
        removed = _unit((k * self._vector('removal')).astype(wide))
        k = k * (1 + (rate.astype(k.dtype) - 1) * self._vector('renewal'))
        o, recurrence = dplr(
            r,
            k,
            v,
            removed,
            -removed * rate,
            -(jnp.exp(jnp.asarray(-0.5, wide)) * jax.nn.sigmoid(decay)),
            initial_state=before[1],
            segment_ids=info.segment_ids,
            return_state=True,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        y = head_norm(self.eps, o, self.scale[...], self.shift[...])
        y = y + jnp.sum(r * self._vector('bonus') * k, axis=-1, keepdims=True) * v
        y = self.out(y * self._low('gate', jax.nn.sigmoid, mixed))
        return y, {'recurrence': recurrence, 'token': token} if return_memory else None

    def _vector(self, name: str) -> jax.Array:
        return self.policy.cast(getattr(self, name)[...])

    def _low(self, name: str, inside: Any, mixed: dict[str, jax.Array]) -> jax.Array:
        """A product of low rank of an input, [B, T, H, K], with a function between its halves."""
        low = getattr(self, f'{name}_down')(mixed[name])
        return getattr(self, f'{name}_up')(low if inside is None else inside(low))

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: four products of full rank, three of low, the recurrence."""
        tokens, width = batch * seq_len, self.width
        low = 2 * sum(self.ranks.values())
        params = width * (4 * width + low) + (len(_MIXED) + 7) * width
        return Cost(
            matmul=matmul_flops(tokens, width, 4 * width + low),
            scan=model_flops(batch, seq_len, self.heads, self.head_dim, self.head_dim),
            params=params,
            params_used=params,
            # The input, its difference and six mixtures, three projections, gates, keys twice, the
            # recurrence's output before and after the norm and gated; inner dimensions; in float32
            # the six inputs of the recurrence, decays and rates before their sigmoids.
            activation_bytes=tokens * (17 * width + low) * self.policy.compute_dtype.itemsize
            + 4.0 * tokens * 8 * width,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last dimension; 0 stays 0."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
