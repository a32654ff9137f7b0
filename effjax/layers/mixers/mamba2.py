"""Mamba-2: the state space with one decay a head and token, as a linear recurrence of matrices."""

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
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.mixers.short_conv import ShortConv
from effjax.layers.mixers.steps import step_bias
from effjax.layers.norms import rms_norm

_INPUTS = ('value', 'write', 'read')


class Mamba2(Recurrent):
    """`out(norm(y silu(z)))`, S_t = a_t S_{t-1} + dt_t B_t x_t^T, y_t = C_t S_t + D x_t.

    State space duality (Dao and Gu, arXiv 2405.21060): x, B and C pass a short convolution and
    `silu`; the step dt = softplus(W u + b) of a head sets its decay a = exp(-exp(A) dt) too;
    heads of a group share B and C. It takes the place of attention and feed-forward part
    together: `ffn=None` beside it, or not.

    Args:
      ctx: the model's context.
      expand: channels inside, as a multiple of the model's width.
      head_dim: channels P of a head.
      state: rows N of a head's state.
      groups: pairs of B and C, and groups of channels that the norm sees; divides the heads.
      conv: tokens that the short convolution sees.
      eps: added to the mean square of a group of channels.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes that cannot be.
    """

    name = 'mamba2'

    def __init__(
        self,
        ctx: Context,
        *,
        expand: int = 2,
        head_dim: int = 64,
        state: int = 128,
        groups: int = 1,
        conv: int = 4,
        eps: float = 1e-5,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        sizes = {'expand': expand, 'head_dim': head_dim, 'state': state, 'groups': groups}
        for what, size in {**sizes, 'conv': conv}.items():
            if size < 1:
                raise ConfigError(f'mamba2: {what} must be at least 1, got {size}.')
        self.width, self.inner = ctx.width, expand * ctx.width
        self.heads = self.inner // head_dim
        if self.inner % head_dim or self.heads % groups:
            raise ConfigError(
                f'mamba2: {groups} groups of heads of {head_dim} do not divide {expand} x width '
                f'{ctx.width}; change head_dim, groups or expand.'
            )
        self.head_dim, self.states, self.groups = head_dim, state, groups
        self.policy, self.eps, self.implementation = ctx.policy, float(eps), implementation
        self._make_projections(ctx, conv, rngs)
        dtype = ctx.policy.param_dtype
        fixed: Any = {'no_decay': True, 'keep_fp32': True}
        self.step_bias = param(
            step_bias(branch(rngs, 'step_bias'), self.heads, dtype), ('heads',), **fixed
        )
        key = branch(rngs, 'log_rate').params()
        rates = jax.random.uniform(key, (self.heads,), jnp.float32, 1.0, 16.0)
        self.log_rate = param(jnp.log(rates).astype(dtype), ('heads',), **fixed)
        self.skip = param(jnp.ones(self.heads, dtype), ('heads',), **fixed)
        ones = jnp.ones((self.heads, head_dim), dtype)
        self.scale = param(ones, ('heads', 'head_dim'), no_decay=True)

    def _make_projections(self, ctx: Context, conv: int, rngs: nnx.Rngs) -> None:
        inner = (self.heads, self.head_dim), ('heads', 'head_dim')
        shared = (self.groups, self.states), ('kv_heads', 'state')
        self.gate = _inward(ctx, *inner, branch(rngs, 'gate'))
        for name in _INPUTS:
            shape, axes = inner if name == 'value' else shared
            setattr(self, name, _inward(ctx, shape, axes, branch(rngs, name)))
            short = ShortConv(
                ctx, shape, axes, taps=conv, bias=True, activation=jax.nn.silu,
                rngs=branch(rngs, f'{name}_conv'),
            )  # fmt: skip
            setattr(self, f'{name}_conv', short)
        self.pace = Projection(
            ctx, '...d,dh->...h', (ctx.width, self.heads), ('embed', 'heads'), bias=False,
            init=initializer(ctx, ctx.width), rngs=branch(rngs, 'pace'),
        )  # fmt: skip
        self.out = from_heads(ctx, self.heads, self.head_dim, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the convolutions' last inputs, and a matrix [N, P] a head in float32."""
        convs = {name: getattr(self, f'{name}_conv').memory(batch, dtype) for name in _INPUTS}
        shape = (self.heads, self.states, self.head_dim)
        return {'recurrence': matrix_memory(batch, *shape, dtype), **convs}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The state space over a stretch of tokens; see `Recurrent.mix`."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        new, inputs = {}, {}
        for name in _INPUTS:
            before = None if memory is None else memory[name]
            conv = getattr(self, f'{name}_conv')
            inputs[name], new[name] = conv(getattr(self, name)(x_BTD), info.segment_ids, before)
        x = inputs['value']
        dt = jax.nn.softplus(self.pace(x_BTD).astype(wide) + self.step_bias[...].astype(wide))
        y, new['recurrence'] = linear_recurrence(
            inputs['read'],
            inputs['write'],
            (x * dt[..., None]).astype(x.dtype),
            -jnp.exp(self.log_rate[...].astype(wide)) * dt,
            initial_state=None if memory is None else memory['recurrence'],
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        y = y + x * self.policy.cast(self.skip[...])[:, None]
        y = self.out(self._norm(y * jax.nn.silu(self.gate(x_BTD))))
        return y, new if return_memory else None

    def _norm(self, y: jax.Array) -> jax.Array:
        """[B, T, H, P] divided by the root mean square of its group of heads, and scaled."""
        by_group = y.reshape(*y.shape[:2], self.groups, -1)
        by_group = rms_norm(
            self.eps, by_group, jnp.ones(by_group.shape[-1], self.policy.param_dtype)
        )
        return by_group.reshape(y.shape) * self.policy.cast(self.scale[...])

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the products, and the recurrence."""
        tokens = batch * seq_len
        shared = 2 * self.groups * self.states
        columns = 2 * self.inner + shared + self.heads
        convs = sum(getattr(self, f'{name}_conv').params for name in _INPUTS)
        params = self.width * (columns + self.inner) + convs + 3 * self.heads + self.inner
        return Cost(
            matmul=matmul_flops(tokens, self.width, columns + self.inner),
            scan=model_flops(batch, seq_len, self.heads, self.states, self.head_dim, decay=True),
            params=params,
            params_used=params,
            # The input; values, B and C before and after the convolution and its activation; the
            # scaled values, the gate, the output before and after gating and norm; steps.
            activation_bytes=tokens
            * (self.width + 3 * (self.inner + shared) + 5 * self.inner)
            * self.policy.compute_dtype.itemsize
            + 8.0 * tokens * self.heads,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def _inward(
    ctx: Context, shape: tuple[int, int], axes: tuple[str, str], rngs: nnx.Rngs
) -> Projection:
    return Projection(
        ctx, '...d,dhk->...hk', (ctx.width, *shape), ('embed', *axes), bias=False,
        init=initializer(ctx, ctx.width), rngs=rngs,
    )  # fmt: skip
