"""What state spaces share: the HiPPO matrix, taps, the gate behind them, states by chunks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import matmul_flops
from effjax.core.keys import branch
from effjax.kernels.documents import last_real
from effjax.layers.linear import Projection, initializer

LR_SCALE = 0.1  # learning rate of decays, steps and input maps, as a share of the others'
STEPS = (1e-3, 0.1)  # steps are drawn log-uniform between these


class GatedOut(nnx.Module):
    """`(W y) * sigmoid(V y)` of `y = gelu(x)`: how the authors' layers mix channels.

    Args:
      ctx: the model's context.
      rngs: streams of the part.
    """

    def __init__(self, ctx: Context, *, rngs: nnx.Rngs):
        def make(name: str, residual: bool) -> Projection:
            return Projection(
                ctx, '...d,de->...e', (ctx.width, ctx.width), (None, 'embed'), bias=ctx.bias,
                init=initializer(ctx, ctx.width, residual=residual), rngs=branch(rngs, name),
            )  # fmt: skip

        self.value = make('value', True)
        self.gate = make('gate', False)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the gated product of x [..., D] in the compute dtype."""
        y = jax.nn.gelu(x)
        return self.value(y) * jax.nn.sigmoid(self.gate(y))

    @staticmethod
    def flops(width: int, tokens: int) -> float:
        """FLOPs of the two products."""
        return matmul_flops(tokens, width, 2 * width)

    @staticmethod
    def params(ctx_bias: bool, width: int) -> int:
        """Number of parameters."""
        return 2 * width * (width + ctx_bias)


def hippo(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns HiPPO-LegS, (A [N, N], B [N]) of x' = A x + B u (arXiv 2008.07669), float64."""
    n = np.arange(size)
    root = np.sqrt(2 * n + 1.0)
    a = -np.tril(np.outer(root, root), -1) - np.diag(n + 1.0)
    return a, root


def hippo_dplr(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns HiPPO-LegS as a diagonal minus a product, in its eigenvectors (arXiv 2111.00396).

    A = V (diag(eigenvalues) - P P*) V*. Eigenvalues come in conjugate pairs.

    Args:
      size: N, even.

    Returns:
      (eigenvalues [N / 2], P [N / 2], B [N / 2], V [N, N / 2]), complex128: of each pair the half
      with a positive imaginary part, the smallest first.
    """
    a, b = hippo(size)
    p = np.sqrt(np.arange(size) + 0.5)
    normal = a + np.outer(p, p)  # skew-symmetric minus a half
    angles, vectors = np.linalg.eigh(-1j * (normal + 0.5 * np.eye(size)))
    half = angles > 0
    vectors = vectors[:, half]
    return -0.5 + 1j * angles[half], vectors.conj().T @ p, vectors.conj().T @ b, vectors


def log_steps(rngs: nnx.Rngs, size: int) -> jax.Array:
    """Returns logarithms of steps [size], float32."""
    low, high = np.log(STEPS)
    return jax.random.uniform(rngs.params(), (size,), jnp.float32, low, high)


def power_sums(log_decay: jax.Array, read: jax.Array, length: int) -> jax.Array:
    """Returns the taps of diagonal systems, `K_l = Re sum_n read_n exp(l log_decay_n)`.

    As a product of two tables of about sqrt(T) rows, so that [T, D, N] is never made.

    Args:
      log_decay: [D, N], real or complex.
      read: [D, N], of the same dtype.
      length: taps T.

    Returns:
      [T, D], real.
    """
    size = max(1, int(np.ceil(np.sqrt(length))))
    dtype = log_decay.real.dtype

    def table(step: int) -> jax.Array:
        power = (step * jnp.arange(size)).astype(dtype)
        return jnp.exp(power[:, None, None] * log_decay)

    left, right = read * table(size), table(1)
    if jnp.issubdtype(left.dtype, jnp.complexfloating):
        left = jnp.concatenate([left.real, -left.imag], axis=-1)
        right = jnp.concatenate([right.real, right.imag], axis=-1)
    taps = jnp.einsum('idn,jdn->ijd', left, right, precision='highest')
    return taps.reshape(-1, taps.shape[-1])[:length]


def by_chunks(
    one: Callable[[jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array]],
    state: jax.Array,
    u: jax.Array,
    segment_ids: jax.Array | None,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Runs a recurrence chunk by chunk; the backward pass keeps one state a chunk.

    Args:
      one: (state [B, ...], u [B, C, D], ids [B, C] or None) -> (y [B, C, D], state), by the
        kernels' rules of documents and padding.
      state: [B, ...], of the document of the row's first real token.
      u: [B, T, D].
      segment_ids: int32 [B, T] or None.
      chunk: tokens C of a chunk.

    Returns:
      (y [B, T, D], the state of the last document).
    """
    length = u.shape[1]
    size = min(chunk, length)
    more = -length % size
    ids = segment_ids
    if ids is None and more:
        ids = jnp.ones(u.shape[:2], jnp.int32)
    body = jax.checkpoint(one, prevent_cse=False)
    if length == size:
        return body(state, u, ids)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [N, B, C, ...]
        x = jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    if ids is None:

        def plain(state, u):
            y, state = body(state, u, None)
            return state, y

        state, y = jax.lax.scan(plain, state, split(u))
    else:
        current = _id_of_first(ids)

        def step(carry, at):
            (state, current), (u, ids) = carry, at
            some, last = last_real(ids)
            goes_on = ~some | (_id_of_first(ids) == current)
            kept = jnp.where(goes_on.reshape(-1, *[1] * (state.ndim - 1)), state, 0)
            y, state = body(kept, u, ids)
            newest = jnp.take_along_axis(ids, last[:, None], axis=1)[:, 0]
            return (state, jnp.where(some, newest, current)), y

        (state, _), y = jax.lax.scan(step, (state, current), (split(u), split(ids)))
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length], state


def _id_of_first(ids: jax.Array) -> jax.Array:
    """The document of each row's first real token, 0 without one."""
    first = jnp.argmax(ids != 0, axis=1)
    return jnp.take_along_axis(ids, first[:, None], axis=1)[:, 0]
