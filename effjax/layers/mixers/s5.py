"""S5: one diagonal state space for all channels, run as a scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import GrowthSpec, param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import diagonal_scan
from effjax.kernels.diagonal_scan.cost import CHUNK, model_flops
from effjax.layers.mixers.recurrent import Recurrent, State
from effjax.layers.mixers.state_space import LR_SCALE, GatedOut, hippo_dplr, log_steps


class S5(Recurrent):
    """`x' = A x + B u`, `y = 2 Re(C x) + D u` with all channels in one state, then gelu and a gate.

    Smith et al., arXiv 2208.04933: A is diagonal and complex, starts as the normal part of
    HiPPO-LegS in `blocks` blocks, and is discretised by zero-order hold; B and C start in its
    eigenvectors. Decays, steps and B learn at a tenth of the learning rate and without weight
    decay, as the authors train them. In a model that looks both ways a second scan runs from the
    last token to the first, with a C of its own.

    Args:
      ctx: the model's context.
      state: real size P of the state; P / 2 complex numbers stand for their conjugates too. None
        means the model's width.
      blocks: blocks of the initial A; they divide P into even parts.
      chunk: tokens of a chunk of the scan.
      implementation: of the scan; None picks the best that can run.

    Raises:
      ConfigError: sizes that cannot be.
    """

    name = 's5'
    growth_spec = GrowthSpec(outputs=('out/value',))
    supports = frozenset({'packing', 'stepping', 'bidirectional'})
    directed = True

    def __init__(
        self,
        ctx: Context,
        *,
        state: int | None = None,
        blocks: int = 1,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        state = ctx.width if state is None else state
        if state < 2 or blocks < 1 or state % (2 * blocks) or chunk < 1:
            raise ConfigError(
                f's5: blocks {blocks} must divide the state of {state} into even parts, and chunk '
                f'{chunk} be at least 1; change state or blocks.'
            )
        self.width, self.states, self.bias = ctx.width, state // 2, ctx.bias
        self.causal = ctx.causal
        self.policy, self.chunk, self.implementation = ctx.policy, chunk, implementation
        dtype = ctx.policy.param_dtype

        def make(value, axes, lr_scale=LR_SCALE, no_decay=True):
            value = jnp.asarray(value).astype(dtype)
            return param(value, axes, no_decay=no_decay, keep_fp32=True, lr_scale=lr_scale)

        eigenvalues, b, c = _start(ctx.width, state, blocks, rngs)
        self.log_step = make(log_steps(branch(rngs, 'log_step'), self.states), ('state',))
        self.log_rate = make(np.log(-eigenvalues.real), ('state',))
        self.angle = make(eigenvalues.imag, ('state',))
        self.write_real = make(b.real, ('embed', 'state'))
        self.write_imag = make(b.imag, ('embed', 'state'))
        self.read_real = make(c[0].real, ('state', 'embed'), 1.0, False)
        self.read_imag = make(c[0].imag, ('state', 'embed'), 1.0, False)
        if not self.causal:
            self.back_real = make(c[1].real, ('state', 'embed'), 1.0, False)
            self.back_imag = make(c[1].imag, ('state', 'embed'), 1.0, False)
        skip = jax.random.normal(branch(rngs, 'skip').params(), (ctx.width,), jnp.float32)
        self.skip = make(skip, ('embed',), 1.0)
        self.out = GatedOut(ctx, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns P / 2 complex numbers as their two parts, float32."""
        self._need_causal('decoding state')
        wide = jnp.promote_types(dtype, jnp.float32)
        return {'state': jnp.zeros((batch, 2, self.states), wide)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The scan over a stretch of tokens; see `Recurrent.mix`."""
        if return_memory:
            self._need_causal('decoding state')
        wide, cast = jnp.promote_types(x_BTD.dtype, jnp.float32), self.policy.cast
        log_decay, write = self.discrete(wide)
        before = None
        if memory is not None:
            before = jax.lax.complex(memory['state'][:, 0], memory['state'][:, 1])

        def product(x: jax.Array, w: jax.Array) -> jax.Array:
            return jnp.einsum('...i,ij->...j', cast(x), cast(w), preferred_element_type=wide)

        entering = jax.lax.complex(product(x_BTD, write.real), product(x_BTD, write.imag))
        scan = functools.partial(
            diagonal_scan, entering, log_decay, segment_ids=info.segment_ids, chunk=self.chunk,
            implementation=self.implementation,
        )  # fmt: skip
        h, last = scan(initial_state=before, return_state=True)
        y = product(h.real, self.read_real[...]) - product(h.imag, self.read_imag[...])
        if not self.causal:
            h = scan(reverse=True)
            y += product(h.real, self.back_real[...]) - product(h.imag, self.back_imag[...])
        y = 2 * y + self.skip[...].astype(wide) * x_BTD.astype(wide)
        new = {'state': jnp.stack([last.real, last.imag], axis=1)} if return_memory else None
        return self.out(cast(y)), new

    def _need_causal(self, what: str) -> None:
        if not self.causal:
            raise ConfigError(
                f's5 over both directions has no {what}: it needs the whole sequence at once; use '
                'a causal model to decode.'
            )

    def discrete(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns (log of the decays [P / 2], B by zero-order hold [D, P / 2]), complex."""
        step = jnp.exp(self.log_step[...].astype(dtype))
        a = jax.lax.complex(
            -jnp.exp(self.log_rate[...].astype(dtype)), self.angle[...].astype(dtype)
        )
        b = jax.lax.complex(self.write_real[...].astype(dtype), self.write_imag[...].astype(dtype))
        return a * step, b * (jnp.expm1(a * step) / a)

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state, none where it looks both ways."""
        return super().state_bytes(batch, max_len, dtype) if self.causal else 0

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the real products, the complex recurrence, and the gate."""
        tokens, width, states = batch * seq_len, self.width, self.states
        ways = 1 if self.causal else 2
        products = width * states * 2 * (1 + ways)
        params = 3 * states + products + width + GatedOut.params(self.bias, width)
        return Cost(
            matmul=matmul_flops(tokens, 1, products) + GatedOut.flops(width, tokens),
            scan=ways * model_flops(batch, seq_len, states, is_complex=True),
            params=params,
            params_used=params,
            # The input, y, gelu of it, the two products, h twice; complex64 decays and h.
            activation_bytes=tokens
            * (5 * width + 2 * ways * states)
            * self.policy.compute_dtype.itemsize
            + 16.0 * ways * tokens * states,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def _start(
    width: int, state: int, blocks: int, rngs: nnx.Rngs
) -> tuple[np.ndarray, jax.Array, list[jax.Array]]:
    """(Eigenvalues [P / 2], B [D, P / 2], C [P / 2, D] twice) in each block's eigenvectors."""
    eigenvalues, _, _, vectors = hippo_dplr(state // blocks)
    turn = np.kron(np.eye(blocks), vectors).astype(np.complex64)  # [P, P / 2]
    b = jax.random.normal(branch(rngs, 'write').params(), (width, state), jnp.float32)
    write = jnp.einsum('dp,pm->dm', b * width**-0.5, turn.conj(), precision='highest')
    read = []
    for name in ('read', 'back'):
        c = jax.random.normal(branch(rngs, name).params(), (2, state, width), jnp.float32)
        c = jax.lax.complex(c[0], c[1]) * (2 * state) ** -0.5
        read.append(jnp.einsum('pm,pd->md', turn, c, precision='highest'))
    return np.tile(eigenvalues, blocks), write, read
