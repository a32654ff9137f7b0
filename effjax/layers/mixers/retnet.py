"""RetNet's multi-scale retention: linear attention with a fixed decay a head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import linear_recurrence
from effjax.kernels.linear_recurrence.cost import model_flops
from effjax.layers.gates import gated_rms_norm
from effjax.layers.mixers.recurrent import (
    QueryKeyValue,
    Recurrent,
    State,
    ToHeads,
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.positions import Rope


class RetNet(Recurrent):
    """`out(swish(gate x) * norm(o))`, o_t = sum_{j<=t} gamma_h^(t-j) (q_t . k_j) v_j.

    Multi-scale retention (Sun et al., arXiv 2307.08621). Head h decays by 1 - 2^(-5-h); queries
    and keys turn with their position, whatever positions the model has; a head's output is
    divided by its root mean square (the paper's group norm; without an affine map, as its
    authors' code does). The authors' three normalisations of scores all cancel in that norm and
    are left out.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions of a head's queries and keys, even; None means width / heads.
      value_dim: dimensions of a head's values; None means 2 width / heads.
      conv: tokens that short convolutions of queries, keys and values see; 0, as in the
        paper, leaves them out.
      rotary_base: base of the rotation of queries and keys.
      eps: added to the mean square of a head's output.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or sizes that cannot be.
    """

    name = 'retnet'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 0,
        rotary_base: float = 10000.0,
        eps: float = 1e-6,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if heads < 1 or ((key_dim is None or value_dim is None) and ctx.width % heads):
            raise ConfigError(
                f'retnet: heads {heads} do not divide width {ctx.width}; change heads or give '
                'key_dim and value_dim.'
            )
        self.width, self.heads, self.policy = ctx.width, heads, ctx.policy
        self.key_dim = key_dim or ctx.width // heads
        self.value_dim = value_dim or 2 * ctx.width // heads
        self.eps, self.implementation = float(eps), implementation
        if self.key_dim % 2:
            raise ConfigError(
                f'retnet: key_dim must be even to turn with the position, not {self.key_dim}.'
            )
        self.rope = Rope(self.key_dim, base=rotary_base)
        self.inputs = QueryKeyValue(ctx, heads, self.key_dim, self.value_dim, conv=conv, rngs=rngs)
        self.gate = ToHeads(ctx, heads, self.value_dim, rngs=branch(rngs, 'gate'))
        self.out = from_heads(ctx, heads, self.value_dim, rngs=branch(rngs, 'out'))

    @property
    def log_decay(self) -> np.ndarray:
        """log(1 - 2^(-5-h)) of each head, float64 [H]."""
        return np.log1p(-(2.0 ** (-5 - np.arange(self.heads))))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns a matrix [K, V] a head, float32, and what the convolutions remember."""
        shape = (self.heads, self.key_dim, self.value_dim)
        recurrence = matrix_memory(batch, *shape, dtype)
        return {'recurrence': recurrence, **self.inputs.memory(batch, dtype)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Retention over a stretch of tokens; see `Recurrent.mix`."""
        q, k, v, new = self.inputs(x_BTD, info, memory)
        o, recurrence = linear_recurrence(
            self.rope(q, info.positions),
            self.rope(k, info.positions),
            v,
            jnp.asarray(self.log_decay, jnp.promote_types(q.dtype, jnp.float32)),
            scale=self.key_dim**-0.5,
            initial_state=None if memory is None else memory['recurrence'],
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        ones = jnp.ones(self.value_dim, self.policy.param_dtype)
        y = self.out(gated_rms_norm(self.eps, o, self.gate.linear(x_BTD), ones))
        return y, {'recurrence': recurrence, **new} if return_memory else None

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: five projections, and the recurrence."""
        tokens, values = batch * seq_len, self.heads * self.value_dim
        params = self.inputs.params + 2 * self.width * values
        return Cost(
            matmul=matmul_flops(tokens, self.width, self.inputs.columns + 2 * values),
            scan=model_flops(batch, seq_len, self.heads, self.key_dim, self.value_dim, decay=True),
            params=params,
            params_used=params,
            # The input, what the recurrence reads, gates, its output before the norm and gated.
            activation_bytes=tokens
            * (self.width + self.inputs.activations + 3 * values)
            * self.policy.compute_dtype.itemsize,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
