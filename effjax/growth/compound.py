"""Depth and width in one transition."""

from collections.abc import Mapping
from typing import Any

import jax

from effjax.core.errors import ConfigError
from effjax.core.registry import check_arguments, lookup
from effjax.growth.base import Kind, Operator, Rule
from effjax.growth.change import Change, LeafChange

_DEPTH = {
    name: f'effjax.growth.depth:{name.capitalize()}'
    for name in ('stack', 'interpolate', 'append', 'midas', 'identity')
}
_WIDTH = {
    'net2net': 'effjax.growth.width:Net2Net',
    'aki': 'effjax.growth.width:Aki',
    'staged': 'effjax.growth.width:Staged',
    'lemon': 'effjax.growth.lemon:Lemon',
}


class Compound(Operator):
    """An operator on depth, then one on width.

    CompoundGrow (Gu et al., arXiv 2010.12562) stacks layers, splits the feed-forward parts' hidden
    units, and trains on longer sequences: `depth='stack'`, `width='net2net'`, and the stage's own
    `seq_len`. Moments pass through both; the function is preserved, and symmetry broken, as the
    two say: `depth='identity', width='lemon'` is LEMON in both.

    Args:
      depth: 'stack', 'interpolate', 'append', 'midas' or 'identity'.
      width: 'net2net', 'aki', 'staged' or 'lemon'.
      depth_args: arguments of the first.
      width_args: arguments of the second.

    Raises:
      ConfigError: unknown operator or argument.
    """

    name = 'compound'

    def __init__(
        self,
        *,
        depth: str = 'stack',
        width: str = 'net2net',
        depth_args: Mapping[str, Any] | None = None,
        width_args: Mapping[str, Any] | None = None,
    ):
        self.deeper = _make(_DEPTH, depth, depth_args, 'depth')
        self.wider = _make(_WIDTH, width, width_args, 'width')
        self.changes_eps = self.wider.changes_eps

    @property
    def preserves_function(self) -> bool:  # type: ignore[override]
        """Whether both operators do."""
        return self.deeper.preserves_function and self.wider.preserves_function

    @property
    def breaks_symmetry(self) -> bool:  # type: ignore[override]
        """Whether copies of units part; copies of layers always do."""
        return self.wider.breaks_symmetry

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        parts = change.depth_part(), change.width_part()
        deepen, widen = self.deeper.bind(parts[0], seed), self.wider.bind(parts[1], seed)

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            x = deepen(parts[0].leaves[leaf.name], x, kind)
            return widen(parts[1].leaves[leaf.name], x, kind)

        return rule


def _make(
    registry: Mapping[str, str], name: str, args: Mapping[str, Any] | None, key: str
) -> Operator:
    component, given = lookup(registry, name, f'operator on {key}'), dict(args or {})
    check_arguments(component, given, f'operator {name!r}', f'{key}_args')
    if not issubclass(component, Operator):
        raise ConfigError(f'{name!r} is no growth operator.')
    return component(**given)
