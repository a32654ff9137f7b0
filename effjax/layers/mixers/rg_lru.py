"""Griffin's recurrent block: a gated branch beside a real-gated linear recurrent unit (RG-LRU)."""

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
from effjax.kernels import diagonal_scan
from effjax.kernels.diagonal_scan.cost import CHUNK, model_flops
from effjax.layers.linear import Initializer, Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.short_conv import ShortConv

SHARPNESS = 8.0  # the paper's c: the decay is a^(c r)
STEEPEST = 1000.0  # largest slope of the square root that scales the input


class RGLRU(Recurrent):
    """`out(gelu(gate x) * h)`, `h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t`, `u = conv(in x)`.

    De et al., arXiv 2402.19427. Each channel decays by `a_t = exp(-8 softplus(L) r_t)`; the gates
    `r_t` and `i_t` are sigmoids of products within blocks of channels. A document's first token
    enters unscaled. A block alone is a sequence mixer; Griffin alternates two of them with one
    layer of local attention (`configs/lm_griffin.py`).

    Args:
      ctx: the model's context.
      heads: blocks of channels, each with its own two square gate matrices.
      inner: channels; None means the model's width.
      conv: taps of the short convolution.
      chunk: tokens of a chunk of the scan.
      implementation: of the scan; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or sizes that cannot be.
    """

    name = 'rg_lru'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        inner: int | None = None,
        conv: int = 4,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        inner = ctx.width if inner is None else inner
        if heads < 1 or inner < 1 or inner % heads:
            raise ConfigError(
                f'rg_lru: heads {heads} do not divide its {inner} channels; change heads or inner.'
            )
        for what, size in (('conv', conv), ('chunk', chunk)):
            if size < 1:
                raise ConfigError(f'rg_lru: {what} must be at least 1, got {size}.')
        self.width, self.heads, self.size = ctx.width, heads, inner // heads
        self.policy, self.bias = ctx.policy, ctx.bias
        self.chunk, self.implementation = chunk, implementation
        self._make_projections(ctx, rngs)
        self.conv = ShortConv(
            ctx, (heads, self.size), ('heads', 'head_dim'), taps=conv, bias=True,
            rngs=branch(rngs, 'conv'),
        )  # fmt: skip
        raw = _decay_at_first(branch(rngs, 'decay'), (heads, self.size))
        self.decay = param(
            raw.astype(ctx.policy.param_dtype), ('heads', 'head_dim'), no_decay=True, keep_fp32=True
        )

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        heads, size, init = self.heads, self.size, functools.partial(initializer, ctx)

        def make(name: str, equation: str, shape, axes, init: Initializer, bias: bool):
            return Projection(
                ctx, equation, shape, axes, bias=bias, init=init, rngs=branch(rngs, name)
            )

        into = ('...d,dhk->...hk', (ctx.width, heads, size), ('embed', 'heads', 'head_dim'))
        within = ('...hk,hkj->...hj', (heads, size, size), ('heads', None, 'head_dim'))
        self.value = make('value', *into, init(ctx.width), ctx.bias)
        self.gate = make('gate', *into, init(ctx.width), ctx.bias)
        self.enter = make('enter', *within, init(size), True)
        self.forget = make('forget', *within, init(size), True)
        self.out = make(
            'out', '...hk,hkd->...d', (heads, size, ctx.width), ('heads', 'head_dim', 'embed'),
            init(heads * size, residual=True), ctx.bias,
        )  # fmt: skip

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the convolution's last inputs, and a number a channel in float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return {
            'conv': self.conv.memory(batch, dtype),
            'scan': jnp.zeros((batch, self.heads, self.size), wide),
        }

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The recurrence over a stretch of tokens; see `Recurrent.mix`."""
        before = (None, None) if memory is None else (memory['conv'], memory['scan'])
        u, conv = self.conv(self.value(x_BTD), info.segment_ids, before[0])
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        forget = jax.nn.sigmoid(self.forget(u).astype(wide))
        log_decay = -SHARPNESS * forget * jax.nn.softplus(self.decay[...].astype(wide))
        # What the state forgets makes room for the input, so that its size stays the same.
        scale = _sqrt(-jnp.expm1(2 * log_decay))
        scale = jnp.where((info.positions == 0)[..., None, None], 1, scale)
        entering = scale * jax.nn.sigmoid(self.enter(u).astype(wide)) * u.astype(wide)
        h, scan = diagonal_scan(
            entering,
            log_decay,
            initial_state=before[1],
            segment_ids=info.segment_ids,
            return_state=True,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        y = self.out(self.policy.cast(h) * jax.nn.gelu(self.gate(x_BTD)))
        return y, {'conv': conv, 'scan': scan} if return_memory else None

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: five products, and the recurrence."""
        tokens, item = batch * seq_len, self.policy.compute_dtype.itemsize
        inner = self.heads * self.size
        products = inner * (3 * self.width + 2 * self.size)
        params = products + self.conv.params + 3 * inner
        params += (2 * inner + self.width) * self.bias
        return Cost(
            matmul=matmul_flops(tokens, 1, products),
            scan=model_flops(batch, seq_len, inner),
            params=params,
            params_used=params,
            # The input, the two branches, the convolution's output, the gates before their
            # sigmoids, h and the gated output; in float32 gates, decays, scale, what enters, h.
            activation_bytes=tokens * (self.width + 7 * inner) * item + 28.0 * tokens * inner,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def _decay_at_first(rngs: nnx.Rngs, shape: tuple[int, ...]) -> jax.Array:
    """Numbers whose softplus is -log a, a^2 being uniform between 0.9^2 and 0.999^2."""
    square = jax.random.uniform(rngs.params(), shape, jnp.float32, 0.9**2, 0.999**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square)))


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, its slope at most `STEEPEST`: it has none at 0, where nothing decays."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_slope(primals, tangents):
    y = jnp.sqrt(primals[0])
    return y, tangents[0] / jnp.maximum(2 * y, 1 / STEEPEST)
