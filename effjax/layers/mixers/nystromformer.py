"""Nyströmformer: softmax attention approximated from a few landmarks of the row."""

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import short_conv
from effjax.kernels.attention.cost import attention_flops
from effjax.layers.mixers.whole import WholeRow


class Nystromformer(WholeRow):
    """`softmax(q kl^T) pinv(softmax(ql kl^T)) softmax(ql k^T) v` (Xiong et al., arXiv 2102.03902).

    The landmarks ql and kl are means of queries and keys over M pieces of the row. The
    pseudo-inverse takes a fixed number of Newton-Schulz steps of third order, in float32 whatever
    the compute dtype. A row of at most M tokens has exact softmax attention.

    Args:
      ctx: the model's context, which must not be causal.
      heads: heads H.
      landmarks: M; where it does not divide the row, the last piece is shorter, and there may be
        fewer pieces.
      iterations: steps of the pseudo-inverse.
      conv: taps of a convolution over the values, one filter a head, which is added to the output;
        odd, or 0 for none.
      head_dim: dimensions of a head; None means width / heads.
      bias: whether projections carry a bias; None asks the model.

    Raises:
      ConfigError: a causal model, or sizes that cannot be.
    """

    name = 'nystromformer'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        landmarks: int = 64,
        iterations: int = 6,
        conv: int = 0,
        head_dim: int | None = None,
        bias: bool | None = None,
        rngs: nnx.Rngs,
    ):
        self._check_context(ctx)
        for key, value in (('landmarks', landmarks), ('iterations', iterations)):
            if value < 1:
                raise ConfigError(f'nystromformer: {key} must be at least 1, got {value}.')
        if conv < 0 or (conv and conv % 2 == 0):
            raise ConfigError(f'nystromformer: conv must be odd, or 0 for none, got {conv}.')
        super().__init__(ctx, heads=heads, head_dim=head_dim, bias=bias, rngs=rngs)
        self.landmarks, self.iterations, self.taps = landmarks, iterations, conv
        self.conv = self._filters(ctx, branch(rngs, 'conv')) if conv else None

    def _filters(self, ctx: Context, rngs: nnx.Rngs) -> nnx.Param:
        draw = jax.random.normal(rngs.params(), (self.taps, self.heads), ctx.policy.param_dtype)
        return param(self.taps**-0.5 * draw, ('conv', 'heads'))

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass, the pseudo-inverse's steps included."""
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        params = 4 * self.width * inner + self.taps * self.heads
        if self.with_bias:
            params += 3 * inner + self.width
        count, item = self._pieces(seq_len)[1], self.policy.compute_dtype.itemsize
        exact = seq_len <= self.landmarks
        # Scores of queries and of keys with landmarks, and the two products with values.
        scored = seq_len**2 if exact else 2 * seq_len * count + count**2
        steps = 0 if exact else self.iterations * 4 * count**3
        saved = 0 if exact else 2 * tokens * count + self.iterations * 4 * batch * count**2
        return Cost(
            matmul=matmul_flops(tokens, self.width, 4 * inner)
            + attention_flops(batch, self.heads, self.head_dim, scored)
            + 2.0 * batch * self.heads * steps,
            params=params,
            params_used=params,
            # The input, queries, keys, values and the output; three matrices and the steps.
            activation_bytes=tokens * (self.width + 4 * inner) * item + 4 * self.heads * saved,
        )

    def _parallel(self, q: jax.Array, k: jax.Array, v: jax.Array, info: SeqInfo) -> jax.Array:
        if q.shape[1] <= self.landmarks:
            out = super()._parallel(q, k, v, info)
        else:
            out = self._approximate(q * self.head_dim**-0.5, k, v)
        return out if self.conv is None else out + self._convolve(self.conv[...], v)

    def _approximate(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Returns [B, T, H, D]; no array has T x T elements."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        q_mark, k_mark = (self._means(x.astype(wide)).astype(x.dtype) for x in (q, k))

        def weights(a: jax.Array, b: jax.Array) -> jax.Array:
            scores = jnp.einsum('bqhd,bkhd->bhqk', a, b, preferred_element_type=wide)
            return jax.nn.softmax(scores, axis=-1)

        values = jnp.einsum('bhmt,bthd->bhmd', weights(q_mark, k).astype(v.dtype), v)
        inverse = _pseudo_inverse(weights(q_mark, k_mark), self.iterations)
        values = jnp.einsum('bhmn,bhnd->bhmd', inverse, values.astype(wide)).astype(v.dtype)
        return jnp.einsum('bhtm,bhmd->bthd', weights(q, k_mark).astype(v.dtype), values)

    def _means(self, x_BTHD: jax.Array) -> jax.Array:
        """Returns [B, M, H, D]: means over pieces of the row."""
        batch, length, *rest = x_BTHD.shape
        size, count = self._pieces(length)
        pad = size * count - length
        x = jnp.pad(x_BTHD, ((0, 0), (0, pad), (0, 0), (0, 0)))
        total = jnp.sum(x.reshape(batch, count, size, *rest), axis=2)
        sizes = jnp.full(count, size, x.dtype).at[-1].add(-pad)
        return total / sizes[:, None, None]

    def _pieces(self, length: int) -> tuple[int, int]:
        """Returns how many tokens a piece has, and how many pieces there are."""
        size = -(-length // self.landmarks)
        return size, -(-length // size)

    def _convolve(self, taps_KH: jax.Array, v_BTHD: jax.Array) -> jax.Array:
        """Returns the values convolved with taps that are centred on each token."""
        half = self.taps // 2
        ahead = jnp.pad(v_BTHD, ((0, 0), (0, half), (0, 0), (0, 0)))
        taps = self.policy.cast(taps_KH)[..., None]
        taps = jnp.broadcast_to(taps, (self.taps, self.heads, self.head_dim))
        out = short_conv(ahead, taps)
        assert not isinstance(out, tuple)
        return out[:, half:]


def _pseudo_inverse(a: jax.Array, steps: int) -> jax.Array:
    """Returns about the Moore-Penrose inverse of [..., M, M], whose rows sum to 1.

    It starts from `a^T / (|a|_1 |a|_inf)`, for each matrix by itself, from where the steps converge
    (Razavi et al. 2014).
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    z = jnp.swapaxes(a, -1, -2) / jnp.max(jnp.sum(a, axis=-2), axis=-1)[..., None, None]

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)

    for _ in range(steps):
        az = product(a, z)
        z = 0.25 * product(z, 13 * eye - product(az, 15 * eye - product(az, 7 * eye - az)))
    return z
