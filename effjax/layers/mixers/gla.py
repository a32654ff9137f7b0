"""Gated linear attention: each dimension of a key is forgotten at a rate that the token chooses."""

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
from effjax.layers.gates import gated_rms_norm
from effjax.layers.linear import Projection, initializer
from effjax.layers.mixers.recurrent import (
    QueryKeyValue,
    Recurrent,
    State,
    ToHeads,
    from_heads,
    matrix_memory,
    need_causal,
)
from effjax.layers.norms import RMSNorm


class GLA(Recurrent):
    """`out(swish(gate x) * norm(o))`, S_t = diag(a_t) S_{t-1} + k_t v_t^T, o_t = q_t S_t.

    Gated linear attention (Yang et al., arXiv 2312.06635): a_t = sigmoid(x A B + b)^(1/16), a
    product of low rank, one number for each dimension of a head's key. A head's output is
    divided by its root mean square and scaled.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions of a head's queries and keys; None means width / (2 heads).
      value_dim: dimensions of a head's values; None means width / heads.
      rank: inner dimensions of the product that decays come from.
      temperature: the root that is drawn of a decay; higher forgets less.
      conv: tokens that short convolutions of queries, keys and values see; 0, as in the
        paper, leaves them out.
      eps: added to the mean square of a head's output.
      implementation: of the recurrence; None picks the best that can run.

    Raises:
      ConfigError: a model that looks in both directions; heads or sizes that cannot be.
    """

    name = 'gla'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        conv: int = 0,
        eps: float = 1e-6,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        if heads < 1 or (key_dim is None and ctx.width % (2 * heads)):
            raise ConfigError(
                f'gla: 2 x heads {heads} do not divide width {ctx.width}; change heads or give '
                'key_dim and value_dim.'
            )
        if value_dim is None and ctx.width % heads:
            raise ConfigError(f'gla: heads {heads} do not divide width {ctx.width}.')
        if rank < 1 or temperature <= 0:
            raise ConfigError(
                f'gla: rank is at least 1 and temperature above 0, not {rank} and {temperature}.'
            )
        self.width, self.heads, self.policy = ctx.width, heads, ctx.policy
        self.key_dim = key_dim or ctx.width // (2 * heads)
        self.value_dim = value_dim or ctx.width // heads
        self.rank, self.temperature = rank, float(temperature)
        self.implementation = implementation
        self.inputs = QueryKeyValue(ctx, heads, self.key_dim, self.value_dim, conv=conv, rngs=rngs)
        self.gate = ToHeads(ctx, heads, self.value_dim, rngs=branch(rngs, 'gate'))
        self.decay_in = Projection(
            ctx, '...d,dr->...r', (ctx.width, rank), ('embed', 'rank'), bias=False,
            init=initializer(ctx, ctx.width), rngs=branch(rngs, 'decay_in'),
        )  # fmt: skip
        self.decay_out = Projection(
            ctx, '...r,rhk->...hk', (rank, heads, self.key_dim), ('rank', 'heads', 'head_dim'),
            bias=False, init=initializer(ctx, rank), rngs=branch(rngs, 'decay_out'),
        )  # fmt: skip
        bias = jnp.zeros((heads, self.key_dim), ctx.policy.param_dtype)
        self.decay_bias = param(bias, ('heads', 'head_dim'), no_decay=True, keep_fp32=True)
        self.norm = RMSNorm(ctx, self.value_dim, 'head_dim', eps=eps, rngs=rngs)
        self.out = from_heads(ctx, heads, self.value_dim, rngs=branch(rngs, 'out'))

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns a matrix [K, V] a head, float32, and what the convolutions remember."""
        shape = (self.heads, self.key_dim, self.value_dim)
        recurrence = matrix_memory(batch, *shape, dtype)
        return {'recurrence': recurrence, **self.inputs.memory(batch, dtype)}

    def log_decay(self, x_BTD: jax.Array) -> jax.Array:
        """Returns the log-decays [B, T, H, K], float32 and below 0."""
        logits = self.decay_out(self.decay_in(x_BTD))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return jax.nn.log_sigmoid(logits + self.decay_bias[...]) / self.temperature

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """Gated linear attention over a stretch of tokens; see `Recurrent.mix`."""
        q, k, v, new = self.inputs(x_BTD, info, memory)
        o, recurrence = linear_recurrence(
            q,
            k,
            v,
            self.log_decay(x_BTD),
            scale=self.key_dim**-0.5,
            initial_state=None if memory is None else memory['recurrence'],
            segment_ids=info.segment_ids,
            return_state=True,
            implementation=self.implementation,
        )
        gate = self.gate.linear(x_BTD)
        y = self.out(gated_rms_norm(self.norm.eps, o, gate, self.norm.scale[...]))
        return y, {'recurrence': recurrence, **new} if return_memory else None

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the projections, and the recurrence."""
        tokens = batch * seq_len
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        low = self.width + keys
        params = self.inputs.params + 2 * self.width * values + self.rank * low
        params += keys + self.value_dim
        return Cost(
            matmul=matmul_flops(tokens, self.width, self.inputs.columns + 2 * values)
            + matmul_flops(tokens, self.rank, low),
            scan=model_flops(batch, seq_len, self.heads, self.key_dim, self.value_dim, decay=True),
            params=params,
            params_used=params,
            # The input, what the recurrence reads, gates, its output before the norm and gated;
            # logits of decays in float32.
            activation_bytes=tokens
            * (self.width + self.inputs.activations + self.rank + 3 * values)
            * self.policy.compute_dtype.itemsize
            + 4.0 * tokens * keys,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )
