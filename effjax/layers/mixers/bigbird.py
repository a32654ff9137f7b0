"""BigBird: blocks see their neighbours, a few random blocks, and blocks that see all."""

from flax import nnx

from effjax.core.context import Context
from effjax.kernels import MaskSpec
from effjax.layers.mixers.sparse import SparseAttention


class BigBird(SparseAttention):
    """Attention by blocks: near ones, random ones, and the document's first and last.

    Zaheer et al., arXiv 2007.14062, with global tokens among the document's own. Random blocks
    differ by key-value head, are drawn by a hash of seed, head and block, and stay the same for a
    whole run. In a causal model they are drawn of the blocks before, and the first blocks alone
    are global.

    Args:
      ctx: the model's context.
      heads: query heads H.
      block: tokens of a block.
      near: a block sees those less than this away: 2 is the paper's window of three blocks.
      random: random blocks that a block sees.
      global_blocks: first blocks, and looking both ways last ones too, that see all and are seen.
      seed: of the random blocks.
      kv_heads: key-value heads G, a divisor of H; None means H.
      head_dim: dimensions of a head; None means width / heads.
      qk_norm: RMSNorm over each head of queries and keys.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: sizes that cannot be.
    """

    name = 'bigbird'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        block: int = 64,
        near: int = 2,
        random: int = 3,
        global_blocks: int = 1,
        seed: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self._needs(1, block=block, near=near)
        self._needs(0, random=random, global_blocks=global_blocks)
        self.block, self.near, self.random = block, near, random
        self.globals, self.seed = global_blocks * block, seed
        super().__init__(
            ctx, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, bias=bias,
            attention_dropout=attention_dropout, implementation=implementation, rngs=rngs,
        )  # fmt: skip

    def mask(self) -> tuple[MaskSpec, ...]:
        """Returns the mask of each head; heads that share keys share their random blocks."""
        return tuple(
            MaskSpec(
                self.causal,
                self.near,
                block=self.block,
                global_tokens=self.globals,
                last_tokens=0 if self.causal else self.globals,
                random=self.random,
                seed=(self.seed * 1009 + h * self.kv_heads // self.heads) if self.random else 0,
            )
            for h in range(self.heads)
        )
