"""DeltaNet: linear attention that corrects what a key holds instead of adding to it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import delta_rule
from effjax.kernels.delta_rule.cost import CHUNK, model_flops
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


class DeltaNet(Recurrent):
    """`S_t = (I - beta k k^T) S_{t-1} + beta k v^T`, read with q and normalised head by head.

    Yang et al., arXiv 2406.06484: queries, keys and values pass a short convolution and `silu`,
    queries and keys are then scaled to norm 1; beta is a sigmoid a head; the output an RMSNorm
    over each head. A state of K x V numbers a head stands for the whole past.

    Args:
      ctx: the model's context.
      heads: heads H.
      key_dim: dimensions K of a head's queries and keys; None means width / heads.
      value_dim: dimensions V of a head's values; None means those of the keys.
      conv: taps of the convolution over queries, keys and values; 0 leaves it out.
      gate: multiply the normalised output by `silu` of one more projection.
      negative: beta in (0, 2) instead of (0, 1), so that a state's eigenvalues may be negative
        (Grazzi et al., arXiv 2411.12537).
      chunk: tokens of a chunk of the parallel form.
      implementation: of the delta rule; None picks the best that can run.

    Raises:
      ConfigError: heads or sizes that cannot be, or a model that looks both ways.
    """

    name = 'deltanet'
    decays = False

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv: int = 4,
        gate: bool = False,
        negative: bool = False,
        chunk: int = CHUNK,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        need_causal(ctx, self.name)
        _check(self.name, ctx, heads, key_dim, value_dim, conv, chunk)
        self.width, self.heads, self.policy = ctx.width, heads, ctx.policy
        self.key_dim = key_dim or ctx.width // heads
        self.value_dim = value_dim or self.key_dim
        self.negative = negative
        self.chunk, self.implementation = chunk, implementation
        self.inputs = QueryKeyValue(
            ctx, heads, self.key_dim, self.value_dim, conv=conv, activation=jax.nn.silu, rngs=rngs
        )
        behind = branch(rngs, 'gate')
        self.gate = ToHeads(ctx, heads, self.value_dim, rngs=behind) if gate else None
        self.beta = self._by_head(ctx, branch(rngs, 'beta'))
        self.norm = RMSNorm(ctx, self.value_dim, 'head_dim', rngs=rngs)
        self.out = from_heads(ctx, heads, self.value_dim, rngs=branch(rngs, 'out'))

    def _by_head(self, ctx: Context, rngs: nnx.Rngs) -> Projection:
        """A projection [embed, heads]: one number a head."""
        return Projection(
            ctx,
            '...d,dh->...h',
            (ctx.width, self.heads),
            ('embed', 'heads'),
            bias=False,
            init=initializer(ctx, ctx.width),
            rngs=rngs,
        )

    def memory(self, batch: int, dtype: Any) -> State:
        """Returns a matrix [K, V] a head, float32, and the convolutions' last inputs."""
        matrix = matrix_memory(batch, self.heads, self.key_dim, self.value_dim, dtype)
        return {'matrix': matrix, **self.inputs.memory(batch, dtype)}

    def mix(
        self, x_BTD: jax.Array, info: SeqInfo, memory: State | None, return_memory: bool
    ) -> tuple[jax.Array, State | None]:
        """The delta rule over a stretch of tokens; see `Recurrent.mix`."""
        q, k, v, new = self.inputs(x_BTD, info, memory)
        beta = jax.nn.sigmoid(self.beta(x_BTD).astype(_wide(x_BTD.dtype)))
        o, new['matrix'] = delta_rule(
            _unit(q),
            _unit(k),
            v,
            2 * beta if self.negative else beta,
            self._log_decay(x_BTD),
            scale=self.key_dim**-0.5,
            initial_state=None if memory is None else memory['matrix'],
            segment_ids=info.segment_ids,
            return_state=True,
            chunk=self.chunk,
            implementation=self.implementation,
        )
        if self.gate is None:
            y = self.norm(o)
        else:
            gate = self.gate.linear(x_BTD)
            y = gated_rms_norm(self.norm.eps, o, gate, self.norm.scale[...])
        return self.out(y), new if return_memory else None

    def _log_decay(self, x_BTD: jax.Array) -> jax.Array | None:
        """Log-decays [B, T, H], at most 0, or None."""
        del x_BTD
        return None

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass; the delta rule by its recurrence, whatever the chunks."""
        tokens, item = batch * seq_len, self.policy.compute_dtype.itemsize
        keys, values = self.heads * self.key_dim, self.heads * self.value_dim
        gate = values if self.gate is not None else 0
        by_head = self.heads * (2 if self.decays else 1)
        params = self.inputs.params + self.width * (gate + by_head + values) + self.value_dim
        return Cost(
            matmul=matmul_flops(tokens, self.width, self.inputs.columns + gate + by_head + values),
            scan=model_flops(
                batch, seq_len, self.heads, self.key_dim, self.value_dim, decay=self.decays
            ),
            params=params,
            params_used=params,
            # The input, the projections before and after convolution, silu and norm, the output;
            # by head and token float32 rates, the chunks' matrices and solved columns, by chunk a
            # state.
            activation_bytes=tokens
            * (self.width + self.inputs.activations + self.inputs.columns + 2 * gate + values)
            * item
            + 4.0 * tokens * (by_head + self.heads * (4 * self.chunk) + 2 * (keys + values))
            + 4.0 * batch * -(-seq_len // self.chunk) * keys * self.value_dim,
            state_bytes=self.state_bytes(batch, seq_len, self.policy.compute_dtype),
        )


def _wide(dtype: Any) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last dimension, in float32 inside; 0 stays 0."""
    wide = x.astype(_wide(x.dtype))
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * inverse).astype(x.dtype)


def _check(
    name: str,
    ctx: Context,
    heads: int,
    key_dim: int | None,
    value_dim: int | None,
    conv: int,
    chunk: int,
) -> None:
    if heads < 1 or (key_dim is None and ctx.width % heads):
        raise ConfigError(
            f'{name}: heads {heads} do not divide width {ctx.width}; change heads or give key_dim.'
        )
    for what, size in (('key_dim', key_dim), ('value_dim', value_dim), ('chunk', chunk)):
        if size is not None and size < 1:
            raise ConfigError(f'{name}: {what} must be at least 1, got {size}.')
    if conv < 0:
        raise ConfigError(f'{name}: conv must be at least 0 taps, got {conv}.')
