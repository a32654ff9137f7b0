"""S4: a state space a channel whose matrix is a diagonal minus a product of one vector."""

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
from effjax.kernels import fft_conv
from effjax.kernels.documents import begins
from effjax.kernels.fft_conv.cost import model_flops
from effjax.layers.mixers.recurrent import Recurrent, State, need_causal
from effjax.layers.mixers.state_space import LR_SCALE, GatedOut, by_chunks, hippo_dplr, log_steps


class S4(Recurrent):
    """`x' = A x + B u`, `y = C x + D u` a channel, A starting as HiPPO-LegS, then gelu and a gate.

    Gu et al., arXiv 2111.00396. `A = diag(L) - P P*` in its eigenvectors (the product of one
    vector with itself, so that A stays stable: arXiv 2202.09729), discretised by the bilinear
    rule. A stretch without a state before or after it is one convolution by Fourier transform.
    With one, tokens go one after another, each in N operations a channel by Woodbury's identity.
    The convolution's taps are products of the discrete matrix's powers, which cost N^3 log T a
    channel and nothing a row: S4D and S5 need none. A, B and steps learn at a tenth of the
    learning rate and without weight decay, as the authors train them.

    Args:
      ctx: the model's context.
      state: real numbers N of a channel's state, even.
      chunk: tokens between the states that the backward pass of the token loop keeps.
      implementation: of the convolution; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions, or sizes that cannot be.
    """

    name = 's4'
    growth_spec = GrowthSpec(outputs=('out/value',))

    def __init__(
        self,
        ctx: Context,
        *,
        state: int = 64,
        chunk: int = 64,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if state < 2 or state % 2 or chunk < 1:
            raise ConfigError(
                f's4: state must be even and chunk at least 1, got {state} and {chunk}.'
            )
        self.width, self.states, self.bias = ctx.width, state // 2, ctx.bias
        self.policy, self.chunk, self.implementation = ctx.policy, chunk, implementation
        shape, dtype = (ctx.width, self.states), ctx.policy.param_dtype

        def make(value, axes=('embed', 'state'), lr_scale=LR_SCALE):
            value = jnp.broadcast_to(value, shape[: len(axes)]).astype(dtype)
            return param(value, axes, no_decay=True, keep_fp32=True, lr_scale=lr_scale)

        eigenvalues, p, b, _ = hippo_dplr(state)
        self.log_step = make(log_steps(branch(rngs, 'log_step'), ctx.width), ('embed',))
        self.log_rate = make(np.log(-eigenvalues.real))
        self.angle = make(eigenvalues.imag)
        self.low_real, self.low_imag = make(p.real), make(p.imag)
        self.write_real, self.write_imag = make(b.real), make(b.imag)
        c = jax.random.normal(branch(rngs, 'read').params(), (2, *shape), jnp.float32) * 0.5**0.5
        self.read_real, self.read_imag = make(c[0], lr_scale=1.0), make(c[1], lr_scale=1.0)
        skip = jax.random.normal(branch(rngs, 'skip').params(), shape[:1], jnp.float32)
        self.skip = make(skip, ('embed',), 1.0)
        self.out = GatedOut(ctx, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns N / 2 complex numbers a channel as their two parts, float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return {'state': jnp.zeros((batch, self.width, 2, self.states), wide)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The state space over a stretch of tokens; see `Recurrent.mix`."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        system = self.discrete(wide)
        u, new = x_BTD.astype(wide), None
        if memory is None and not return_memory:
            # Rematerialised: powers of the matrix are dear to keep and cheap to make.
            make = jax.checkpoint(kernel, static_argnums=1)
            y = fft_conv(
                u, make(system, x_BTD.shape[1]), segment_ids=info.segment_ids,
                implementation=self.implementation,
            )  # fmt: skip
        else:
            before = (memory or self.memory(x_BTD.shape[0], x_BTD.dtype))['state']
            y, last = by_chunks(
                lambda h, u, ids: _token_loop(system, h, u, ids),
                before, u, info.segment_ids, self.chunk,
            )  # fmt: skip
            new = {'state': last}
        y = y + self.skip[...].astype(wide) * u
        return self.out(self.policy.cast(y)), new if return_memory else None

    def discrete(self, dtype: Any) -> dict[str, jax.Array]:
        """Returns what a step needs, real parts and imaginary parts apart, [D, 2, N / 2]."""
        half = 0.5 * jnp.exp(self.log_step[...].astype(dtype))[:, None]

        def number(real: nnx.Param, imag: nnx.Param) -> jax.Array:
            return jax.lax.complex(real[...].astype(dtype), imag[...].astype(dtype))

        a = half * jax.lax.complex(
            -jnp.exp(self.log_rate[...].astype(dtype)), self.angle[...].astype(dtype)
        )
        p = number(self.low_real, self.low_imag)
        inverse = 1 / (1 - a)
        weight = half / (1 + half * 2 * jnp.sum((p.conj() * inverse * p).real, -1, keepdims=True))
        out = {
            'forward': 1 + a,
            'inverse': inverse,
            'low': p,
            'correct': weight * inverse * p,
            'write': 2 * half * number(self.write_real, self.write_imag),
            'read': 2 * number(self.read_real, self.read_imag).conj(),
        }
        return {'half': half, **{name: _parts(x) for name, x in out.items()}}

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the convolution by Fourier transform, and the gate.

        The taps are made once for all rows and do not count, as the filter's transform.
        """
        tokens, width = batch * seq_len, self.width
        params = width * (8 * self.states + 2) + GatedOut.params(self.bias, width)
        return Cost(
            matmul=GatedOut.flops(width, tokens),
            fft=model_flops(batch, seq_len, width),
            params=params,
            params_used=params,
            # As S4D's.
            activation_bytes=5.0 * tokens * width * self.policy.compute_dtype.itemsize
            + 4.0 * (3 * tokens + 2 * seq_len) * width,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def advance(system: dict[str, jax.Array], h: jax.Array) -> jax.Array:
    """One step without input: `(1 - s A / 2)^-1 (1 + s A / 2) h`, h [..., D, 2, N / 2].

    h stands for conjugate pairs, so that `P* h` is twice a real part.
    """
    h_low = 2 * jnp.sum(system['low'] * h, axis=(-2, -1), keepdims=True)
    right = _product(system['forward'], h) - system['half'][:, None] * h_low * system['low']
    return _solve(system, right)


def _solve(system: dict[str, jax.Array], right: jax.Array) -> jax.Array:
    """`(1 - s A / 2)^-1` times a vector, by Woodbury's identity."""
    y = _product(system['inverse'], right)
    y_low = 2 * jnp.sum(system['low'] * y, axis=(-2, -1), keepdims=True)
    return y - system['correct'] * y_low


def kernel(system: dict[str, jax.Array], length: int) -> jax.Array:
    """Returns taps [T, D], `K_l = C A^l B` of the discrete system.

    Rows C A^(m i) and columns A^j B, of which each A^l is one product, are made by doubling: a
    power of A brings as many more of them as there are.
    """
    width, _, half = system['read'].shape
    basis = jnp.eye(2 * half, dtype=system['half'].dtype).reshape(2 * half, 1, 2, half)
    basis = jnp.broadcast_to(basis, (2 * half, width, 2, half))
    matrix = advance(system, basis).reshape(2 * half, width, 2 * half)
    matrix = jnp.transpose(matrix, (1, 2, 0))  # [D, N, N], of real and imaginary parts
    columns = _solve(system, system['write']).reshape(width, 2 * half, 1)
    rows = system['read'].reshape(width, 1, 2 * half)

    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum('dij,djk->dik', a, b, precision='highest')

    while columns.shape[2] ** 2 < length:
        columns = jnp.concatenate([columns, times(matrix, columns)], axis=2)
        matrix = times(matrix, matrix)
    while rows.shape[1] * columns.shape[2] < length:
        rows = jnp.concatenate([rows, times(rows, matrix)], axis=1)
        matrix = times(matrix, matrix)
    return times(rows, columns).reshape(width, -1).T[:length]


def _token_loop(
    system: dict[str, jax.Array], state: jax.Array, u: jax.Array, ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(y [B, C, D], the state after) of a chunk, by the kernels' rules of documents."""
    ids = jnp.ones(u.shape[:2], jnp.int32) if ids is None else ids
    write = _solve(system, system['write'])

    def rows(flag: jax.Array) -> jax.Array:
        return flag[:, None, None, None]

    def token(h: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        u, fresh, real = at
        new = advance(system, jnp.where(rows(fresh), 0, h)) + write * u[..., None, None]
        h = jnp.where(rows(real), new, h)
        return h, jnp.sum(h * system['read'], axis=(-2, -1))

    state, y = jax.lax.scan(token, state, (u.swapaxes(0, 1), begins(ids).T, (ids != 0).T))
    return y.swapaxes(0, 1), state


def _parts(x: jax.Array) -> jax.Array:
    """[D, M] complex to [D, 2, M]."""
    return jnp.stack([x.real, x.imag], axis=-2)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """The complex product of numbers [..., 2, M]."""
    (ar, ai), (br, bi) = (jnp.moveaxis(x, -2, 0) for x in (a, b))
    return jnp.stack([ar * br - ai * bi, ar * bi + ai * br], axis=-2)
