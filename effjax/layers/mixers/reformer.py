"""Reformer's attention: each token attends to those that a hash of its query brings near."""

from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.cost import Cost, matmul_flops
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.keys import branch
from effjax.kernels import lsh_attention, lsh_buckets
from effjax.kernels.lsh_attention.cost import attention_flops, hash_flops, pairs
from effjax.layers.linear import Projection, initializer
from effjax.layers.positions import rotary

# Folded into the mixer's key for the rotations of a training step.
_DRAW = 7


class Reformer(nnx.Module):
    """Attention by locality-sensitive hashing (Kitaev et al., arXiv 2001.04451).

    Queries are their own keys. A hash of the query, drawn anew in each step of training and fixed
    otherwise, sorts the tokens of a document into buckets; sorted, they are cut into chunks, and a
    token sees its own chunk and the one before, in several rounds with a hash each.

    In the paper's chunks, which run on across buckets, whom a token sees depends on the buckets of
    later tokens too. A causal model therefore cuts each bucket by itself: then its past alone
    decides. Rotary positions turn queries and keys behind the hash. There is no decoding state, and
    reversible residuals are not part of this.

    Args:
      ctx: the model's context.
      heads: heads H.
      chunk: tokens of a chunk.
      rounds: hashes, each of which sorts and attends.
      buckets: of a round, even; None is twice the chunks of the longest row, as in the paper.
      cut: 'sorted' cuts a document's sorted tokens, 'bucket' each bucket; None is 'bucket' in a
        causal model and 'sorted' otherwise.
      head_dim: dimensions of a head; None means width / heads.
      bias: whether projections carry a bias; None asks the model.
      seed: of the hash that evaluations use.
      implementation: of the kernel; None picks the best that can run.

    Raises:
      ConfigError: sizes that cannot be, or 'sorted' chunks in a causal model.
    """

    causal: bool = True
    supports = frozenset({'packing', 'bidirectional'})
    growth_spec = GrowthSpec(outputs=('out',))

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        chunk: int = 64,
        rounds: int = 2,
        buckets: int | None = None,
        cut: Literal['sorted', 'bucket'] | None = None,
        head_dim: int | None = None,
        bias: bool | None = None,
        seed: int = 0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _check(ctx, heads, head_dim, chunk, rounds, buckets, cut)
        self.width, self.heads, self.head_dim = ctx.width, heads, head_dim or ctx.width // heads
        self.causal, self.policy = ctx.causal, ctx.policy
        self.chunk, self.rounds = chunk, rounds
        self.buckets = buckets or 2 * -(-ctx.max_len // chunk)
        self.by_bucket = ctx.causal if cut is None else cut == 'bucket'
        self.with_bias = ctx.bias if bias is None else bias
        self.seed, self.implementation = seed, implementation
        self.rope = rotary(ctx, self.head_dim)
        self.query = self._inward(ctx, branch(rngs, 'query'))
        self.value = self._inward(ctx, branch(rngs, 'value'))
        self.out = Projection(
            ctx,
            '...hk,hkd->...d',
            (heads, self.head_dim, ctx.width),
            ('heads', 'head_dim', 'embed'),
            bias=self.with_bias,
            init=initializer(ctx, heads * self.head_dim, residual=True),
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

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        info: SeqInfo,
        context: Any = None,
        state: Any = None,
        return_state: bool = False,
    ) -> tuple[jax.Array, None, dict[str, Any]]:
        """Returns (y [B, T, D], None, {}); see `layers.mixers`.

        Raises:
          ConfigError: a context or a state.
        """
        chex.assert_rank(x_BTD, 3)
        chex.assert_shape(info.positions, x_BTD.shape[:2])
        if context is not None:
            raise ConfigError(
                'reformer reads its own sequence only: it takes no context; use '
                "mixer.kind='attention'."
            )
        if state is not None or return_state:
            self._refuse('decoding state')
        q, v = self.query(x_BTD), self.value(x_BTD)
        buckets = lsh_buckets(q, self.rotations(info))
        if self.rope is not None:
            q = self.rope(q, info.positions)
        o = lsh_attention(
            q,
            v,
            buckets,
            chunk=self.chunk,
            by_bucket=self.by_bucket,
            causal=self.causal,
            # Of later tokens nothing may be known: not even through odd positions.
            order=None if self.causal else info.positions,
            segment_ids=info.segment_ids,
            implementation=self.implementation,
        )
        return self.out(o), None, {}

    def rotations(self, info: SeqInfo) -> jax.Array:
        """Returns the hash [H, D, R, N / 2]: the step's own in training, else the fixed one."""
        shape = (self.heads, self.head_dim, self.rounds, self.buckets // 2)
        if info.train and info.rng is not None:
            return jax.random.normal(jax.random.fold_in(info.rng, _DRAW), shape, jnp.float32)
        return jnp.asarray(np.random.default_rng(self.seed).normal(size=shape), jnp.float32)

    def init_state(self, batch: int, max_len: int, dtype: Any) -> dict[str, jax.Array]:
        """Refuses: see `layers.mixers`."""
        return self._refuse('decoding state')

    def step(
        self, x_BD: jax.Array, state: Any, *, reset: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """Refuses: see `layers.mixers`."""
        return self._refuse('step')

    def state_bytes(self, batch: int, max_len: int, dtype: Any) -> int:
        """Bytes of the state: none."""
        return 0

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Cost of one forward pass: the hash, and the pairs that full chunks allow."""
        tokens, inner = batch * seq_len, self.heads * self.head_dim
        params = 3 * self.width * inner
        if self.with_bias:
            params += 2 * inner + self.width
        scored = self.rounds * pairs(seq_len, min(self.chunk, seq_len), causal=self.causal)
        item = self.policy.compute_dtype.itemsize
        return Cost(
            matmul=matmul_flops(tokens, self.width, 3 * inner)
            + hash_flops(batch, seq_len, self.heads, self.head_dim, self.rounds, self.buckets)
            + attention_flops(batch, self.heads, self.head_dim, scored),
            params=params,
            params_used=params,
            # The input, queries, values, the output; of each round sorted queries, keys, values,
            # its output, and the weights of its pairs.
            activation_bytes=tokens * (self.width + 3 * inner) * item
            + self.rounds * tokens * inner * (3 * item + 4)
            + 4 * batch * self.heads * scored,
        )

    def _refuse(self, what: str) -> Any:
        ways = 'sorts the whole sequence' if self.causal else 'looks in both directions'
        raise ConfigError(
            f'reformer {ways} and has no {what}; use a mixer with a state to decode, such as '
            'attention or retnet.'
        )


def _check(
    ctx: Context,
    heads: int,
    head_dim: int | None,
    chunk: int,
    rounds: int,
    buckets: int | None,
    cut: str | None,
) -> None:
    if heads < 1 or (head_dim is None and ctx.width % heads):
        raise ConfigError(
            f'reformer: heads {heads} do not divide width {ctx.width}; change heads or give '
            'head_dim.'
        )
    for key, value in (('chunk', chunk), ('rounds', rounds), ('head_dim', head_dim)):
        if value is not None and value < 1:
            raise ConfigError(f'reformer: {key} must be at least 1, got {value}.')
    if buckets is not None and (buckets < 2 or buckets % 2):
        raise ConfigError(f'reformer: buckets must be even and at least 2, got {buckets}.')
    if ctx.causal and cut == 'sorted':
        raise ConfigError(
            "reformer: chunks of cut='sorted' depend on later tokens, which a causal model must "
            "not see; use cut='bucket'."
        )
