"""S4D: a diagonal state space a channel, as one long convolution or step by step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import GrowthSpec, param
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import diagonal_scan, fft_conv
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.state_space import (
    LR_SCALE,
    GatedOut,
    by_chunks,
    hippo_dplr,
    log_steps,
    power_sums,
)


class S4D(Recurrent):
    """`x' = A x + u`, `y = Re(C x) + D u` a channel, A diagonal and complex, then gelu and a gate.

    Gu et al., arXiv 2206.11893. A stretch without a state before or after it is one convolution
    with `K_l = 2 Re sum_n C_n B_n exp(l dt A_n)` by Fourier transform; with one, a scan over
    chunks. Discretised by zero-order hold; B is part of C. Decays and steps learn at a tenth of
    the learning rate and without weight decay, as the authors train them.

    Args:
      ctx: the model's context.
      state: real numbers N of a channel's state, even: N / 2 complex ones stand for their
        conjugates too.
      start: initial A: 'lin' (`-1/2 + i pi n`) or 'legs' (the eigenvalues of HiPPO-LegS).
      chunk: tokens whose states exist at a time in the scan.
      implementation: of convolution and scan; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; sizes or a start that cannot be.
    """

    name = 's4d'
    growth_spec = GrowthSpec(outputs=('out/value',))

    def __init__(
        self,
        ctx: Context,
        *,
        state: int = 64,
        start: str = 'lin',
        chunk: int = 64,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if state < 2 or state % 2 or chunk < 1:
            raise ConfigError(
                f's4d: state must be even and chunk at least 1, got {state} and {chunk}.'
            )
        if start not in ('lin', 'legs'):
            raise ConfigError(f"s4d: start is 'lin' or 'legs', not {start!r}.")
        self.width, self.states, self.bias = ctx.width, state // 2, ctx.bias
        self.policy, self.chunk, self.implementation = ctx.policy, chunk, implementation
        shape, dtype = (ctx.width, self.states), ctx.policy.param_dtype
        if start == 'lin':
            eigenvalues = -0.5 + 1j * np.pi * np.arange(self.states)
            b = np.ones(self.states, np.complex128)
        else:
            eigenvalues, _, b, _ = hippo_dplr(state)

        def make(value, axes=('embed', 'state'), lr_scale=LR_SCALE):
            value = jnp.broadcast_to(value, shape[: len(axes)]).astype(dtype)
            return param(value, axes, no_decay=True, keep_fp32=True, lr_scale=lr_scale)

        self.log_step = make(log_steps(branch(rngs, 'log_step'), ctx.width), ('embed',))
        self.log_rate = make(np.log(-eigenvalues.real))
        self.angle = make(eigenvalues.imag)
        c = jax.random.normal(branch(rngs, 'read').params(), (2, *shape), jnp.float32) * 0.5**0.5
        self.read_real = make(c[0] * b.real - c[1] * b.imag, lr_scale=1.0)
        self.read_imag = make(c[0] * b.imag + c[1] * b.real, lr_scale=1.0)
        skip = jax.random.normal(branch(rngs, 'skip').params(), shape[:1], jnp.float32)
        self.skip = make(skip, ('embed',), 1.0)
        self.out = GatedOut(ctx, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns N / 2 complex numbers a channel as their two parts, float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return {'state': jnp.zeros((batch, 2, self.width, self.states), wide)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The state space over a stretch of tokens; see `Recurrent.mix`."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        log_decay, read = self.discrete(wide)
        u, new = x_BTD.astype(wide), None
        if memory is None and not return_memory:
            taps = power_sums(log_decay, read, x_BTD.shape[1])
            y = fft_conv(u, taps, segment_ids=info.segment_ids, implementation=self.implementation)
        else:
            parts = memory or self.memory(x_BTD.shape[0], x_BTD.dtype)
            before = jax.lax.complex(parts['state'][:, 0], parts['state'][:, 1])
            y, last = by_chunks(
                lambda h, u, ids: self._scan(log_decay, read, h, u, ids),
                before, u, info.segment_ids, self.chunk,
            )  # fmt: skip
            new = {'state': jnp.stack([last.real, last.imag], axis=1)}
        y = y + self.skip[...].astype(wide) * u
        return self.out(self.policy.cast(y)), new if return_memory else None

    def discrete(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (log of the decays, C B by zero-order hold, twice), complex [D, N / 2]."""
        step = jnp.exp(self.log_step[...].astype(dtype))[:, None]
        a = jax.lax.complex(
            -jnp.exp(self.log_rate[...].astype(dtype)), self.angle[...].astype(dtype)
        )
        c = jax.lax.complex(self.read_real[...].astype(dtype), self.read_imag[...].astype(dtype))
        return a * step, 2 * c * jnp.expm1(a * step) / a

    def _scan(
        self,
        log_decay: jax.Array,
        read: jax.Array,
        state: jax.Array,
        u: jax.Array,
        ids: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        """(y [B, C, D], the state after) of a chunk."""
        x = jnp.broadcast_to(u[..., None], (*u.shape, self.states))
        h, state = diagonal_scan(
            x, log_decay, initial_state=state, segment_ids=ids, return_state=True, chunk=8,
            implementation=self.implementation,
        )  # fmt: skip
        return jnp.sum(h.real * read.real - h.imag * read.imag, axis=-1), state

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the convolution by Fourier transform, and the gate.

        The taps are made once for all rows and do not count, as the filter's transform.
        """
        tokens, width = batch * seq_len, self.width
        params = width * (4 * self.states + 2) + GatedOut.params(self.bias, width)
        return Cost(
            matmul=GatedOut.flops(width, tokens),
            fft=model_flops(batch, seq_len, width),
            params=params,
            params_used=params,
            # The input, y, gelu of it, the two products; in float32 the input's and the taps'
            # transforms (2 T complex points, half of them kept) and the output.
            activation_bytes=5.0 * tokens * width * self.policy.compute_dtype.itemsize
            + 4.0 * (3 * tokens + 2 * seq_len) * width,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
