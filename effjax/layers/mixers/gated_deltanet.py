"""Gated DeltaNet: the delta rule with a decay that a token chooses for each head."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.keys import branch
from effjax.kernels.delta_rule.cost import CHUNK
from effjax.layers.mixers.deltanet import DeltaNet


class GatedDeltaNet(DeltaNet):
    """`S_t = a_t (I - beta k k^T) S_{t-1} + beta k v^T` with a decay `a_t` a token and head.

    Yang et al., arXiv 2412.06464. The decay is Mamba-2's, `exp(-exp(A) softplus(W x + b))`, and
    the normalised output is gated. The paper's layers have key_dim = 3/4 width / heads and
    value_dim twice that.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions K of a head's queries and keys; None means width / heads.
      value_dim: dimensions V of a head's values; None means those of the keys.
      conv: taps of the convolution over queries, keys and values; 0 leaves it out.
      gate: multiply the normalised output by `silu` of one more projection.
      negative: beta in (0, 2) instead of (0, 1).
      chunk: tokens of a chunk of the parallel form.
      implementation: of the delta rule; None picks the best that can run.

    Raises:
      ConfigError: heads or sizes that cannot be, or a model that looks both ways.
    """

    name = 'gated_deltanet'
    decays = True

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
        gate: bool = True,
        negative: bool = False,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            ctx,
            heads=heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv=conv,
            gate=gate,
            negative=negative,
            chunk=chunk,
            implementation=implementation,
            rngs=rngs,
        )
        self.rate = self._by_head(ctx, branch(rngs, 'rate'))
        dtype = ctx.policy.param_dtype
        strength = jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1e-3, 16.0)
        low, high = math.log(1e-3), math.log(0.1)
        step = jnp.exp(jax.random.uniform(rngs.params(), (heads,), jnp.float32, low, high))
        step = jnp.maximum(step, 1e-4)
        fixed: Any = {'no_decay': True, 'keep_fp32': True}
        self.log_strength = param(jnp.log(strength).astype(dtype), ('heads',), **fixed)
        # softplus of this is the step.
        inverse = step + jnp.log(-jnp.expm1(-step))
        self.rate_bias = param(inverse.astype(dtype), ('heads',), **fixed)

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; two numbers a head more parameters than DeltaNet."""
        more = 2 * self.heads
        return super().cost(batch, seq_len) + Cost(params=more, params_used=more)

    def _log_decay(self, x_BTD: jax.Array) -> jax.Array | None:
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        rate = self.rate(x_BTD).astype(wide) + self.rate_bias[...].astype(wide)
        return -jnp.exp(self.log_strength[...].astype(wide)) * jax.nn.softplus(rate)
