"""The feed-forward part that does nothing: what the block around it still does, remains."""

from typing import Any

import jax
from flax import nnx

from effjax.core.axes import GrowthSpec
from effjax.core.context import Context
from effjax.core.cost import Cost
from effjax.core.info import SeqInfo


class Identity(nnx.Module):
    """`y = x`: a pre-norm block then adds its norm's output to the residual stream.

    The models of Zoology (Arora et al., arXiv 2312.04927) are made of such blocks. A block
    without a feed-forward part at all, norm included, has `ffn=None`.
    """

    growth_spec = GrowthSpec(frozenset({'embed'}))

    def __init__(self, ctx: Context, *, rngs: nnx.Rngs):
        del ctx, rngs

    def __call__(self, x: jax.Array, *, info: SeqInfo) -> tuple[jax.Array, dict[str, Any]]:
        """Returns (x, {})."""
        del info
        return x, {}

    def cost(self, batch: int, seq_len: int) -> Cost:
        """Nothing."""
        del batch, seq_len
        return Cost()
