"""LongNet: dilated attention in segments of several lengths, mixed by their softmaxes' sums."""

import dataclasses

from flax import nnx

from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.kernels import MaskSpec
from effjax.layers.mixers.sparse import SparseAttention


class LongNet(SparseAttention):
    """Attention in short segments to all, in longer ones to each so-manieth token.

    Ding et al., arXiv 2307.02486. In a segment of `segments[i]` tokens, those whose place leaves
    one remainder by `dilations[i]` attend to each other, another remainder in each head; a token's
    outputs of all segment lengths are weighed by the denominators of their softmaxes. Lengths and
    dilations that grow together keep the cost linear in the sequence.

    Args:
      ctx: the model's context.
      heads: query heads H.
      segments: lengths of segments, each a multiple of its dilation.
      dilations: as many; the first is 1, or some tokens would see nothing.
      kv_heads: key-value heads G, a divisor of H; None means H.
      head_dim: dimensions of a head; None means width / heads.
      qk_norm: RMSNorm over each head of queries and keys.
      bias: whether projections carry a bias; None asks the model.
      attention_dropout: rate at which attention weights are dropped while training.
      implementation: of the attention kernel; None picks the best that can run.

    Raises:
      ConfigError: segments and dilations that cannot be.
    """

    name = 'longnet'

    def __init__(
        self,
        ctx: Context,
        *,
        heads: int,
        segments: tuple = (128, 512, 2048),
        dilations: tuple = (1, 4, 16),
        kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool | None = None,
        attention_dropout: float = 0.0,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        fits = len(segments) == len(dilations) and len(segments) and dilations[0] == 1
        pairs = list(zip(segments, dilations, strict=False))
        if not fits or any(w < 1 or r < 1 or w % r for w, r in pairs):
            raise ConfigError(
                'longnet: segments and dilations are as many, each segment a multiple of its '
                f'dilation and the first dilation 1; got {segments} and {dilations}.'
            )
        self.lengths = tuple((int(w), int(r)) for w, r in pairs)
        super().__init__(
            ctx, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, bias=bias,
            attention_dropout=attention_dropout, implementation=implementation, rngs=rngs,
        )  # fmt: skip

    def mask(self) -> tuple[MaskSpec, ...]:
        """Returns the mask of each head: a branch for each length of segments."""

        def branch(head: int, length: int, dilation: int) -> MaskSpec:
            one = MaskSpec(self.causal, segment=length)
            if dilation == 1:
                return one
            return dataclasses.replace(one, stride=dilation, offset=head % dilation)

        return tuple(
            MaskSpec(self.causal, branches=tuple(branch(h, *sizes) for sizes in self.lengths))
            for h in range(self.heads)
        )
