"""Masked structural growth: new units and blocks of any values, let in by a mask that rises.

The mask is no part of the model. To multiply a unit's activation is to multiply the parameters that
write or read it, so that all of it stands in a view of the parameters (`Msg.view`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.growth.base import Kind, Operator, Rule, View
from effjax.growth.change import Change, LeafChange
from effjax.growth.copies import draw, equal
from effjax.growth.depth import can_be_silent, check_placement, is_output, placed
from effjax.growth.lemon import check_eps, not_linear
from effjax.growth.width import along, normal, root_mean_square
from effjax.layers.norms import LayerNorm


class Msg(Operator):
    """New units and blocks are multiplied by a mask that rises from 0 to 1 while training goes on.

    MSG (Yao et al., arXiv 2305.02869). At mask 0 the function is the small model's whatever the new
    weights are; with the mask r = min(share of the stage done / ramp, 1)
      hidden units and heads: what reads them is multiplied by r;
      width: what writes new units is multiplied by r; a norm's scale by r for new units, and by
        sqrt(sum of the mask / D'), the paper's masked statistics, for all; its shift by r. The
        large config's eps must be D / D' of the small one's;
      blocks: `x + r f(x)`, by the part's last product and bias. Of a block with two parts that is
        `x + r f(x) + r g(x + r f(x))`; the paper's `r block(x) + (1 - r) x` agrees at 0 and 1.
    From r = 1 on the view is the parameters themselves. The paper grows one size after another,
    which is a stage each; several in one stage rise together.

    LayerNorm takes away a mean over all D' units. New units therefore start not at zero but at the
    mean of the old ones: (1 - r) mean + r own, which works where only linear products write to the
    stream. Where norms do (BERT), new units start as copies of old ones and what reads them is
    multiplied by r: this takes a multiple of the width and the small config's eps. Blocks that do
    not add to the stream, as post-norm ones, are refused in depth.

    New units are drawn: products and tables normal with the root mean square of the old entries,
    biases and shifts 0, scales the mean of the old. Of new entries first moments are 0 and second
    ones the mean of the old, so that the first steps are no larger than others.

    Args:
      ramp: share of the stage, in (0, 1], over which the mask rises.
      placement: of new blocks: 'end', 'alternate' or 'start', as in 'identity'.
      layers: 'copy' makes new blocks copies of old ones, second moments too; 'random' draws them as
        it does units, but for what growth knows no role of, which is copied.
    """

    name = 'msg'
    preserves_function = True
    changes_eps = True

    def __init__(
        self,
        *,
        ramp: float = 0.2,
        placement: Literal['end', 'alternate', 'start'] = 'end',
        layers: Literal['copy', 'random'] = 'copy',
    ):
        if not 0 < ramp <= 1:
            raise ConfigError(f"'msg': ramp is a share of the stage in (0, 1], got {ramp}.")
        check_placement(self.name, placement)
        if layers not in ('copy', 'random'):
            raise ConfigError(f"'msg': layers must be 'copy' or 'random', got {layers!r}.")
        self.ramp, self.placement, self.layers = float(ramp), placement, layers

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        news = self._news(change)
        for slot in change.slots.values():
            if slot.old != slot.new:
                can_be_silent(self.name, slot, change)
        old, new = change.spaces['embed']
        check_eps(change, 1.0 if news.start == 'copy' else old / new, self.name)

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            return x if leaf.old == leaf.new else self._grown(leaf, x, kind, news, seed)

        return rule

    def view(self, change: Change) -> View:
        """See `Operator.view`."""
        news = self._news(change)

        def view(params: Any, frozen: Any, progress: jax.Array) -> Any:
            del frozen
            mask = jnp.minimum(progress[1] / self.ramp, 1.0)

            def one(name: str, x: jax.Array) -> jax.Array:
                leaf = change.leaves[name]
                silent = leaf.old[:1] != leaf.new[:1] and is_output(change, name)
                if not leaf.grown() and not silent:
                    return x
                wide = jnp.promote_types(x.dtype, jnp.float32)
                y, m = x.astype(wide), mask.astype(wide)
                if silent:
                    y = y * _masked(news.layers[leaf.slot][1], m, 0, leaf)
                for dim in leaf.grown():
                    y = _along_units(leaf, dim, y, m, news)
                return y.astype(x.dtype)

            return trees.map_named(one, params)

        return view

    def _news(self, change: Change) -> '_News':
        """Returns what is new.

        Raises:
          ConfigError: grouped queries that would lose their keys, or a width that is not possible.
        """
        copies = draw(change, 0, 'cyclic', equal)
        return _News(
            {key: units.index for key, units in copies.items()},
            {key: _later(units.index) for key, units in copies.items()},
            {path: placed(slot, self.placement) for path, slot in change.slots.items()},
            _start(change),
        )

    def _grown(
        self, leaf: LeafChange, x: jax.Array, kind: Kind, news: '_News', seed: int
    ) -> jax.Array:
        """Returns a leaf with its new layers and units, in its own dtype."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        fresh = np.zeros([1] * y.ndim, bool)
        if leaf.meta.stacked:
            sources, late = news.layers[leaf.slot]
            y = jnp.take(y, sources, axis=0)
            drawn = self.layers == 'random' and leaf.meta.role is not None
            if drawn or kind in ('first', 'step'):
                fresh = fresh | along(late, 0, leaf)
        fill = _fill(leaf, y, kind, seed)
        for dim in leaf.grown():
            key = str(leaf.spaces[dim])
            y = jnp.take(y, news.index[key], axis=dim)
            fresh = fresh | along(news.fresh[key], dim, leaf)
        return jnp.where(fresh, fill, y).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _News:
    """What is new in a large model.

    Attributes:
      index: space -> [new] the old unit that a unit is, or would be a copy of.
      fresh: space -> [new] whether a unit is new.
      layers: slot -> (the old layer that a layer is or copies, whether it is new).
      start: what new units of the width are at mask 0.
    """

    index: Mapping[str, np.ndarray]
    fresh: Mapping[str, np.ndarray]
    layers: Mapping[str, tuple[np.ndarray, np.ndarray]]
    start: Literal['zero', 'mean', 'copy']


def _later(index: np.ndarray) -> np.ndarray:
    """Says which units are not the first copy of their source."""
    fresh = np.ones(len(index), bool)
    fresh[np.unique(index, return_index=True)[1]] = False
    return fresh


def _start(change: Change) -> Literal['zero', 'mean', 'copy']:
    """Returns what new units of the width are at mask 0, so that norms do not see them.

    Raises:
      ConfigError: none will do.
    """
    old, new = change.spaces['embed']
    if old == new or not any(isinstance(norm, LayerNorm) for _, norm in change.norms.values()):
        return 'zero'
    found = not_linear(change)
    if not found:
        return 'mean'
    if new % old == 0:
        return 'copy'
    raise ConfigError(
        f"'msg' lets new units of the width ({old} to {new}) start at the mean of the old ones "
        f'under LayerNorm, which {found} would not keep; use a width of {-(-new // old) * old}, '
        "where they start as copies, or norm 'rmsnorm'."
    )


def _along_units(leaf: LeafChange, dim: int, y: jax.Array, m: jax.Array, news: _News) -> jax.Array:
    """Returns a leaf as the model sees it at mask m, as far as units along one dimension go."""
    key, role, reads = str(leaf.spaces[dim]), leaf.meta.role, leaf.meta.inputs[dim]
    mask = _masked(news.fresh[key], m, dim, leaf)
    if key != 'embed':
        return y * mask if reads else y
    if news.start == 'copy':
        # A norm before a tied table counts as reading: the table itself holds the copies.
        return y * mask if reads else mask * y + (1 - mask) * jnp.take(y, news.index[key], dim)
    if role == 'scale':
        old, new = leaf.old[dim], leaf.new[dim]
        return y * mask * jnp.sqrt((old + m * (new - old)) / new)
    if role == 'shift' or (news.start == 'zero' and not reads):
        return y * mask
    if reads:
        return y  # what it reads is masked: by the norm before it, or by what wrote it
    mean = jnp.mean(jax.lax.slice_in_dim(y, 0, leaf.old[dim], axis=dim), dim, keepdims=True)
    return mask * y + (1 - mask) * mean


def _masked(fresh: np.ndarray, m: jax.Array, dim: int, leaf: LeafChange) -> jax.Array:
    """Returns the mask, m where `fresh` and 1 elsewhere, along one dimension of a leaf."""
    return jnp.where(along(fresh, dim, leaf), m, jnp.ones((), m.dtype))


def _fill(leaf: LeafChange, y: jax.Array, kind: Kind, seed: int) -> jax.Array:
    """Returns what new entries of a leaf are, to be broadcast over it.

    Args:
      leaf: the leaf.
      y: its values with all layers and the old units.
      kind: what it holds.
      seed: of the draws, together with the leaf's name.
    """
    dims = tuple(range(int(leaf.meta.stacked), y.ndim))
    if kind == 'second' or (kind == 'value' and leaf.meta.role == 'scale'):
        return jnp.mean(y, axis=dims, keepdims=True)
    if kind == 'value' and leaf.meta.role in ('product', 'table'):
        return root_mean_square(leaf, y) * normal(leaf, y.dtype, seed)
    return jnp.zeros((), y.dtype)
