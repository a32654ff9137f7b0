"""Global tokens: a second, short stream beside a row's tokens, through all layers (ETC)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.core.axes import param
from effjax.core.context import Context
from effjax.core.errors import ConfigError
from effjax.core.info import SeqInfo
from effjax.core.registry import check_arguments
from effjax.models.plan import SegmentSpec

PATH = 'config.model.globals'


class GlobalTokens(nnx.Module):
    """Tokens in front of a row, one for each group of its own tokens (arXiv 2004.08483).

    All begin as one trained vector, as the paper's sentence tokens do; mixers tell them apart by
    the groups. They pass through norms and feed-forward parts as all tokens do. The batch says the
    groups (`info.groups`), or each stretch of `every` tokens of a document is one. A global token
    belongs to its group's document; those beyond the row's groups are padding, and groups beyond
    the row's global tokens have none.

    Args:
      ctx: the model's context.
      tokens: global tokens G of a row.
      every: tokens of a group, where the batch says no groups; None: it must.
    """

    def __init__(self, ctx: Context, *, tokens: int, every: int | None = None, rngs: nnx.Rngs):
        self.tokens, self.every, self.policy = tokens, every, ctx.policy
        first = 0.02 * jax.random.normal(rngs.params(), (ctx.width,), jnp.float32)
        self.first = param(first.astype(ctx.policy.param_dtype), ('embed',), no_decay=True)

    def vector(self) -> jax.Array:
        """Returns what every global token begins as, [D] in the compute dtype."""
        return self.policy.cast(self.first[...])

    def join(
        self, vector_D: jax.Array, x_BTD: jax.Array, info: SeqInfo
    ) -> tuple[jax.Array, SeqInfo]:
        """Returns rows [B, G + T, D] with the global tokens in front, and their info.

        Args:
          vector_D: what every global token begins as.
          x_BTD: the row's own tokens.
          info: of them.
        """
        batch, _, width = x_BTD.shape
        groups = self.groups(info)
        ids = jnp.ones_like(groups) if info.segment_ids is None else info.segment_ids
        rows = jnp.arange(batch)[:, None]
        # A token without a group writes past the end, which is dropped.
        at = jnp.where(groups >= 0, groups, self.tokens)
        own_ids = jnp.zeros((batch, self.tokens), ids.dtype).at[rows, at].max(ids, mode='drop')
        number = jnp.broadcast_to(jnp.arange(self.tokens, dtype=groups.dtype), own_ids.shape)
        first = jnp.broadcast_to(vector_D.astype(x_BTD.dtype), (batch, self.tokens, width))
        return jnp.concatenate([first, x_BTD], axis=1), dataclasses.replace(
            info,
            positions=jnp.concatenate([number, info.positions], axis=1),
            segment_ids=jnp.concatenate([own_ids, ids], axis=1),
            groups=jnp.concatenate([number, groups], axis=1),
        )

    def groups(self, info: SeqInfo) -> jax.Array:
        """Returns int32 [B, T]: the group of each token, -1 where it has no global token.

        Raises:
          ConfigError: neither the batch nor the config says the groups.
        """
        if info.groups is not None:
            groups = info.groups
        elif self.every is None:
            raise ConfigError(
                f'{PATH}.every is None, and the batch has no groups; give the tokens of a group.'
            )
        else:
            ids = info.segment_ids
            begins = info.positions % self.every == 0
            begins = begins.at[:, 0].set(True)  # a row may begin inside a document
            if ids is not None:
                before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
                begins = (begins | (ids != before)) & (ids != 0)
            groups = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
            groups = groups if ids is None else jnp.where(ids != 0, groups, -1)
        return jnp.where(groups < self.tokens, groups, -1)

    def metrics(self, info: SeqInfo) -> dict[str, tuple[jax.Array, jax.Array]]:
        """Returns the share of tokens whose group has no global token, as a (sum, weight)."""
        groups = self.groups(info)
        real = jnp.ones(groups.shape, bool) if info.segment_ids is None else info.segment_ids != 0
        alone = jnp.sum(real & (groups < 0), dtype=jnp.float32)
        return {'globals/uncovered': (alone, jnp.sum(real, dtype=jnp.float32))}


def check(
    block: Mapping[str, Any], max_len: int, causal: bool, plan: Sequence[SegmentSpec]
) -> None:
    """Checks a model's block of global tokens.

    Raises:
      ConfigError: a causal model, a mixer that knows no global tokens, unknown or missing keys, or
        sizes that cannot be.
    """
    check_arguments(GlobalTokens, block, 'a block of global tokens', PATH)
    if causal:
        raise ConfigError(
            f'{PATH}: global tokens see all of their document, so that in a causal model a token '
            "would see what it has to predict; use model.kind='encoder', or leave globals at None."
        )
    tokens, every = block['tokens'], block.get('every')
    for key, value in (('tokens', tokens), ('every', every)):
        if value is not None and value < 1:
            raise ConfigError(f'{PATH}.{key} must be at least 1, got {value}.')
    if every is not None and tokens * every < max_len:
        raise ConfigError(
            f'{PATH}: {tokens} tokens for {every} each do not reach the end of a row of {max_len} '
            f'tokens; give at least {-(-max_len // every)}, and more for rows of several documents.'
        )
    for spec in (spec for segment in plan for spec in segment.pattern):
        if 'globals' not in spec.check().supports:
            raise ConfigError(
                f'{PATH}: mixer {spec.mixer["kind"]!r} does not know global tokens; use '
                "mixer.kind='etc', or leave globals at None."
            )
