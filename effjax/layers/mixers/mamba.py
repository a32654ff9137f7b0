"""Mamba: a diagonal state space whose step, input and output maps each token chooses."""

import functools
import math
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
from effjax.kernels import selective_scan
from effjax.kernels.selective_scan.cost import CHUNK, model_flops
from effjax.layers.gates import gated_product
from effjax.layers.linear import Initializer, Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.short_conv import ShortConv
from effjax.layers.mixers.steps import step_bias
from effjax.layers.norms import rms_norm


class Mamba(Recurrent):
    """`out(silu(z) * scan(u))` with `u = silu(conv(in x))`, a state of N numbers a channel.

    Gu and Dao, arXiv 2312.00752: the step of each channel, `dt = softplus(W_up W_down u + b)`, and
    the maps B and C into and out of the states depend on the token. It takes the place of
    attention and feed-forward part together: `ffn=dict(kind='none')` beside it, or not.

    Args:
      ctx: the model's context.
      expand: channels inside, as a multiple of the model's width.
      state: numbers N a channel.
      conv: taps of the short convolution.
      dt_rank: rank of the map to the steps; None means width / 16, rounded up.
      norms: divide the low-rank step, B and C of a token by their root mean square, as
        FalconMamba does (arXiv 2410.05355).
      chunk: tokens whose states exist at a time.
      implementation: of the scan; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes below 1.
    """

    name = 'mamba'

    def __init__(
        self,
        ctx: Context,
        *,
        expand: int = 2,
        state: int = 16,
        conv: int = 4,
        dt_rank: int | None = None,
        norms: bool = False,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        self.rank = math.ceil(ctx.width / 16) if dt_rank is None else dt_rank
        sizes = {'expand': expand, 'state': state, 'conv': conv, 'dt_rank': self.rank}
        for what, size in {**sizes, 'chunk': chunk}.items():
            if size < 1:
                raise ConfigError(f'mamba: {what} must be at least 1, got {size}.')
        self.width, self.inner, self.states = ctx.width, expand * ctx.width, state
        self.policy, self.norms = ctx.policy, norms
        self.chunk, self.implementation = chunk, implementation
        self._make_projections(ctx, rngs)
        self.conv = ShortConv(
            ctx, (self.inner,), ('mlp',), taps=conv, bias=True, activation=jax.nn.silu,
            rngs=branch(rngs, 'conv'),
        )  # fmt: skip
        dtype = ctx.policy.param_dtype
        fixed: Any = {'no_decay': True, 'keep_fp32': True}
        self.step_bias = param(
            step_bias(branch(rngs, 'step_bias'), self.inner, dtype), ('mlp',), **fixed
        )
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1.0, state + 1)), (self.inner, state))
        self.log_rate = param(rates.astype(dtype), ('mlp', 'state'), **fixed)
        self.skip = param(jnp.ones(self.inner, dtype), ('mlp',), **fixed)

    def _make_projections(self, ctx: Context, rngs: nnx.Rngs) -> None:
        def make(name: str, axes: tuple[str | None, str | None], shape, init: Initializer):
            return Projection(
                ctx, '...i,ij->...j', shape, axes, bias=False, init=init, rngs=branch(rngs, name)
            )

        inner, rank, init = self.inner, self.rank, functools.partial(initializer, ctx)
        self.value = make('value', ('embed', 'mlp'), (ctx.width, inner), init(ctx.width))
        self.gate = make('gate', ('embed', 'mlp'), (ctx.width, inner), init(ctx.width))
        self.step_down = make('step_down', ('mlp', None), (inner, rank), init(inner))
        self.write = make('write', ('mlp', 'state'), (inner, self.states), init(inner))
        self.read = make('read', ('mlp', 'state'), (inner, self.states), init(inner))
        most = rank**-0.5
        self.step_up = make(
            'step_up', (None, 'mlp'), (rank, inner),
            lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -most, most),
        )  # fmt: skip
        self.out = make('out', ('mlp', 'embed'), (inner, ctx.width), init(inner, residual=True))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the convolution's last inputs, and N numbers a channel in float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return {
            'conv': self.conv.memory(batch, dtype),
            'scan': jnp.zeros((batch, self.inner, self.states), wide),
        }

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The selective scan over a stretch of tokens; see `Recurrent.mix`."""
        before = (None, None) if memory is None else (memory['conv'], memory['scan'])
        u, conv = self.conv(self.value(x_BTD), info.segment_ids, before[0])
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        low, b, c = (self._normed(p(u)) for p in (self.step_down, self.write, self.read))
        dt = self.step_up(low).astype(wide) + self.step_bias[...].astype(wide)
        y, scan = selective_scan(
            u,
            jax.nn.softplus(dt),
            -jnp.exp(self.log_rate[...].astype(wide)),
            b,
            c,
            self.skip[...],
            initial_state=before[1],
            segment_ids=info.segment_ids,
            return_state=True,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        y = self.out(gated_product(jax.nn.silu, self.gate(x_BTD), y))
        return y, {'conv': conv, 'scan': scan} if return_memory else None

    def _normed(self, x: jax.Array) -> jax.Array:
        if not self.norms:
            return x
        return rms_norm(1e-6, x, jnp.ones(x.shape[-1], self.policy.param_dtype))

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the products, and the scan by its recurrence."""
        tokens, item = batch * seq_len, self.policy.compute_dtype.itemsize
        inner, by_token = self.inner, 2 * self.rank + 2 * self.states
        products = inner * (3 * self.width + by_token)
        params = products + self.conv.params + inner * (self.states + 2)
        return Cost(
            matmul=matmul_flops(tokens, 1, products),
            scan=model_flops(batch, seq_len, inner, self.states),
            params=params,
            params_used=params,
            # The input, values before and after the convolution and its activation, the gate,
            # the scan's output before and after gating, what the token chooses; the step in
            # float32 before and after softplus; a state a chunk.
            activation_bytes=tokens * (self.width + 6 * inner + by_token) * item
            + 8.0 * tokens * inner
            + 4.0 * batch * -(-seq_len // self.chunk) * inner * self.states,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
