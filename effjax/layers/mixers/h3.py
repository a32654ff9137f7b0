"""H3: attention's product of query, key and value, with two state spaces for the softmax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import diagonal_scan, fft_conv
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.short_conv import ShortConv
from effjax.layers.mixers.state_space import LR_SCALE, by_chunks, log_steps, power_sums

LONG = 32  # taps of a shift from which a Fourier transform is less work than their sum


class H3(Recurrent):
    """`out(q * diagonal(shift(k) v^T))`, a state space each for shift and diagonal.

    Fu et al., arXiv 2212.14052. The shift remembers the last tokens' keys: with its input map
    fixed to the first state, as the paper has it, it is a convolution of `shift` taps. The
    diagonal one is S4D's (arXiv 2206.11893, zero-order hold, `A = -1/2 + i pi n` at first), over
    the product of a head's keys and values, key_dim x value_dim numbers. Both pass their input on
    with a trained factor. A stretch without a state before or after it is one convolution by
    Fourier transform, and so is a shift of `LONG` taps or more; with one, a scan over chunks.

    Args:
      ctx: the model's context.
      head_dim: dimensions of a head; the paper's 1 multiplies elementwise, more is its
        outer product, of head_dim^2 state spaces a head.
      state: real numbers of a diagonal state, even: state / 2 complex ones stand for their
        conjugates too.
      shift: taps of the shift; None means `state`, as the authors have it.
      bias: whether projections carry a bias; None asks the model.
      chunk: tokens whose states exist at a time in the scan.
      implementation: of convolution and scan; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes that cannot be.
    """

    name = 'h3'

    def __init__(
        self,
        ctx: Context,
        *,
        head_dim: int = 1,
        state: int = 64,
        shift: int | None = None,
        bias: bool | None = None,
        chunk: int = 64,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if head_dim < 1 or ctx.width % head_dim:
            raise ConfigError(f'h3: head_dim {head_dim} does not divide width {ctx.width}.')
        if state < 2 or state % 2 or chunk < 1:
            raise ConfigError(
                f'h3: state must be even and chunk at least 1, got {state} and {chunk}.'
            )
        self.width, self.head_dim, self.heads = ctx.width, head_dim, ctx.width // head_dim
        self.states, self.taps = state // 2, state if shift is None else shift
        self.policy, self.chunk, self.implementation = ctx.policy, chunk, implementation
        self.with_bias = ctx.bias if bias is None else bias
        self.query = self._inward(ctx, branch(rngs, 'query'))
        self.key = self._inward(ctx, branch(rngs, 'key'))
        self.value = self._inward(ctx, branch(rngs, 'value'))
        self.shift = ShortConv(
            ctx, (self.heads, head_dim), ('heads', 'head_dim'), taps=self.taps,
            rngs=branch(rngs, 'shift'),
        )  # fmt: skip
        self._make_spaces(ctx, rngs)
        self.out = Projection(
            ctx,
            '...hk,hkd->...d',
            (self.heads, head_dim, ctx.width),
            ('heads', 'head_dim', 'embed'),
            bias=self.with_bias,
            init=initializer(ctx, ctx.width, residual=True),
            rngs=branch(rngs, 'out'),
        )

    def _inward(self, ctx: Context, rngs: nnx.Rngs) -> Projection:
        return Projection(
            ctx,
            '...d,dhk->...hk',
            (ctx.width, self.heads, self.head_dim),
            ('embed', 'heads', 'head_dim'),
            bias=self.with_bias,
            init=initializer(ctx, ctx.width),
            rngs=rngs,
        )

    def _make_spaces(self, ctx: Context, rngs: nnx.Rngs) -> None:
        dtype, heads, states = ctx.policy.param_dtype, self.heads, self.states

        def make(value: Any, axes: tuple[str, ...], lr_scale: float = LR_SCALE) -> nnx.Param:
            value = jnp.asarray(value).astype(dtype)
            return param(value, axes, no_decay=True, keep_fp32=True, lr_scale=lr_scale)

        def normal(name: str, *shape: int) -> jax.Array:
            return jax.random.normal(branch(rngs, name).params(), shape, jnp.float32)

        both = ('heads', 'state')
        self.log_step = make(log_steps(branch(rngs, 'log_step'), heads), ('heads',))
        self.log_rate = make(jnp.full((heads, states), np.log(0.5)), both)
        self.angle = make(jnp.broadcast_to(np.pi * np.arange(states), (heads, states)), both)
        read = normal('read', 2, heads, states) * 0.5**0.5
        self.read_real, self.read_imag = (make(part, both, 1.0) for part in read)
        self.skip = make(normal('skip', heads), ('heads',), 1.0)
        by_dim = ('heads', 'head_dim')
        self.key_skip = make(normal('key_skip', heads, self.head_dim), by_dim, 1.0)

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns the shift's last keys, and N / 2 complex numbers a space as two float32."""
        wide, spaces = jnp.promote_types(dtype, jnp.float32), self.heads * self.head_dim**2
        return {
            'shift': self.shift.memory(batch, dtype),
            'state': jnp.zeros((batch, 2, spaces, self.states), wide),
        }

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Both state spaces over a stretch of tokens; see `Recurrent.mix`."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        k = self.key(x_BTD)
        shift: Any = None  # what it remembers
        if memory is None and not return_memory and self.taps >= LONG:
            shifted = self._long(k, self.shift.kernel[...][::-1], info)
        else:
            before = None if memory is None else memory['shift']
            shifted, shift = self.shift(k, info.segment_ids, before)
        k = shifted + k * self.policy.cast(self.key_skip[...])
        v = self.value(x_BTD)
        kv = (k[..., :, None] * v[..., None, :]).astype(wide)  # [B, T, H, K, V]
        if memory is None and return_memory:
            memory = self.memory(x_BTD.shape[0], x_BTD.dtype)
        y, state = self._diagonal(kv, info, None if memory is None else memory['state'])
        y = y + kv * self.skip[...].astype(wide)[:, None, None]
        q = self.query(x_BTD)
        y = self.policy.cast(y)
        y = q * y[..., 0] if self.head_dim == 1 else jnp.einsum('bthk,bthkv->bthv', q, y)
        new = None if state is None else {'shift': shift, 'state': state}
        return self.out(y), new if return_memory else None

    def _long(self, x: jax.Array, taps: jax.Array, info: SeqInfo) -> jax.Array:
        ids = info.segment_ids
        return fft_conv(x, taps, segment_ids=ids, implementation=self.implementation)

    def discrete(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (log of the decays, C by zero-order hold, twice), complex [H, N / 2]."""
        step = jnp.exp(self.log_step[...].astype(dtype))[:, None]
        rate, angle = jnp.exp(self.log_rate[...].astype(dtype)), self.angle[...].astype(dtype)
        a = jax.lax.complex(-rate, angle)
        c = jax.lax.complex(self.read_real[...].astype(dtype), self.read_imag[...].astype(dtype))
        return a * step, 2 * c * jnp.expm1(a * step) / a

    def _diagonal(
        self, kv: jax.Array, info: SeqInfo, state: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """(y like kv [B, T, H, K, V], the state after; None without one before)."""
        log_decay, read = self.discrete(kv.dtype)
        each = self.head_dim**2
        if state is None:
            taps = power_sums(log_decay, read, kv.shape[1])[:, :, None, None]
            taps = jnp.broadcast_to(taps, (taps.shape[0], *kv.shape[2:]))
            return self._long(kv, taps, info), None
        log_decay, read = (jnp.repeat(a, each, axis=0) for a in (log_decay, read))

        def one(h: jax.Array, u: jax.Array, ids: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            x = jnp.broadcast_to(u[..., None], (*u.shape, self.states))
            h, last = diagonal_scan(
                x, log_decay, initial_state=h, segment_ids=ids, return_state=True, chunk=8,
                implementation=self.implementation,
            )  # fmt: skip
            return jnp.sum(h.real * read.real - h.imag * read.imag, axis=-1), last

        flat = kv.reshape(*kv.shape[:2], -1)
        before = jax.lax.complex(state[:, 0], state[:, 1])
        y, last = by_chunks(one, before, flat, info.segment_ids, self.chunk)
        return y.reshape(kv.shape), jnp.stack([last.real, last.imag], axis=1)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the convolutions by Fourier transform, a long shift's too.

        Taps are made once for all rows and do not count.
        """
        tokens, width, spaces = batch * seq_len, self.width, self.heads * self.head_dim**2
        item = self.policy.compute_dtype.itemsize
        params = 4 * width * (width + self.with_bias) + width * (self.taps + 1)
        params += self.heads * (4 * self.states + 2)
        products = matmul_flops(tokens, width, 4 * width)
        if self.head_dim > 1:
            products += matmul_flops(tokens, self.head_dim, width)
        return Cost(
            matmul=products,
            fft=model_flops(batch, seq_len, spaces + width * (self.taps >= LONG)),
            params=params,
            params_used=params,
            # The input, q, k, v, the shifted key, the output before its projection; in float32
            # the product, its transform and its output.
            activation_bytes=tokens * (6.0 * width * item + 16.0 * spaces),
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
