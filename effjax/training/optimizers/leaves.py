"""What an optimizer knows of each parameter: how it is stacked, decayed, scaled, and shaped."""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from effjax.core.axes import JOINED, Meta, product_groups, stack_depth
from effjax.core.errors import ConfigError
from effjax.core.trees import path_name

# A matrix maps one hidden space to another. Embeddings, heads, routers, convolution taps and
# anything over positions do not, and are left to AdamW by Muon.
_HIDDEN = frozenset({'embed', 'mlp', 'state'}) | JOINED


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Facts about one parameter; a pytree leaf.

    Attributes:
      path: its path, as `core.trees.path_name` writes it.
      axes: a logical name for each dimension.
      stack: number of leading dimensions that count separate parameters: `layers`, then `expert`.
      groups: the other dimensions, joined where they are one dimension of a product.
      matrix: whether it maps one hidden space to another: two groups, both hidden, decayed.
      decay: factor on the optimizer's weight decay.
      lr: factor on the learning rate.
    """

    path: str
    axes: tuple[str | None, ...]
    stack: int
    groups: tuple[tuple[int, ...], ...]
    matrix: bool
    decay: float
    lr: float

    def view(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns `shape` with joined dimensions flattened: stack first, then one per group."""
        joined = (math.prod(shape[i] for i in group) for group in self.groups)
        return (*shape[: self.stack], *joined)


def leaf_tree(
    meta: Any,
    lr_scales: Sequence[Sequence[Any]] = (),
    decay_scales: Sequence[Sequence[Any]] = (),
) -> Any:
    """Returns the tree of `Leaf` for a tree of `Meta`.

    Args:
      meta: nested dicts of `core.axes.Meta`, as the parameters are nested.
      lr_scales: pairs (regular expression searched in the path, factor); the first match counts
        and multiplies the parameter's own `lr_scale`.
      decay_scales: the same for weight decay; a parameter marked `no_decay` stays without.

    Raises:
      ConfigError: a malformed pair, or an expression that matches no parameter.
    """
    lr_pairs = _pairs(lr_scales, 'config.lr_scales')
    decay_pairs = _pairs(decay_scales, 'config.decay_scales')
    paths = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(meta)[0]]
    for name, pairs in (('lr_scales', lr_pairs), ('decay_scales', decay_pairs)):
        for i, (pattern, _) in enumerate(pairs):
            if not any(pattern.search(path) for path in paths):
                raise ConfigError(
                    f'config.{name}.{i}: {pattern.pattern!r} matches no parameter; paths look '
                    f'like {", ".join(paths[:3])}.'
                )

    def leaf(path: tuple, m: Meta) -> Leaf:
        name = path_name(path)
        return _leaf(name, m, m.lr_scale * _first(lr_pairs, name), _first(decay_pairs, name))

    return jax.tree_util.tree_map_with_path(leaf, meta)


def _leaf(path: str, meta: Meta, lr: float, decay: float) -> Leaf:
    stack = stack_depth(meta.axes)
    groups = product_groups(meta.axes, stack)
    hidden = all(meta.axes[i] in _HIDDEN for group in groups for i in group)
    return Leaf(
        path=path,
        axes=tuple(meta.axes),
        stack=stack,
        groups=groups,
        matrix=len(groups) == 2 and hidden and not meta.no_decay,
        decay=0.0 if meta.no_decay else decay,
        lr=lr,
    )


def _pairs(scales: Sequence[Sequence[Any]], name: str) -> list[tuple[re.Pattern[str], float]]:
    out = []
    for i, pair in enumerate(scales):
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits or not _is_factor(pair[1]):
            raise ConfigError(
                f'{name}.{i}: expected a pair (regular expression, factor >= 0), got {pair!r}.'
            )
        try:
            out.append((re.compile(pair[0]), float(pair[1])))
        except re.error as e:
            raise ConfigError(f'{name}.{i}: {pair[0]!r} is no regular expression: {e}.') from e
    return out


def _is_factor(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def _first(pairs: Sequence[tuple[re.Pattern[str], float]], path: str) -> float:
    for pattern, factor in pairs:
        if pattern.search(path):
            return factor
    return 1.0
