"""MATE: on a table, half of the heads look along rows and half along columns."""

from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.kernels import MaskSpec
from effjax.layers.mixers.sparse import SparseAttention


class Mate(SparseAttention):
    """Row heads and column heads over a grid read row by row, and first tokens that see all.

    Eisenschlos et al., arXiv 2109.04312, for grids of a known width, one cell a token, such as
    an image's patches; heads of the first half see their row, those of the second their column.

    Args:
      ctx: the model's context.
      heads: query heads H, even.
      columns: cells of a row.
      global_tokens: first tokens of a document that see all and are seen by all; they take cells
        of the first row.
      kv_heads: key-value heads G, a divisor of H; None means H.
      head_dim: dimensions of a head; None means width / heads.
      qk_norm: RMSNorm over each head of queries and keys.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: sizes that cannot be.
    """

    name = 'mate'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        columns: int,
        global_tokens: int = 0,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self._needs(1, columns=columns)
        self._needs(0, global_tokens=global_tokens)
        if heads % 2:
            raise ConfigError(f'mate: heads must be even, for rows and columns, got {heads}.')
        self.columns, self.globals = columns, global_tokens
        super().__init__(
            ctx, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, bias=bias,
            attention_dropout=attention_dropout, implementation=implementation, rngs=rngs,
        )  # fmt: skip

    def mask(self) -> tuple[MaskSpec, ...]:
        """Returns the mask of each head."""
        rows = MaskSpec(self.causal, segment=self.columns, global_tokens=self.globals)
        columns = MaskSpec(self.causal, stride=self.columns, global_tokens=self.globals)
        half = self.heads // 2
        return (rows,) * half + (columns,) * half
