"""Builds the optimizer that a config block names."""

from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.registry import arguments, check_block
from effjax.training import OPTIMIZERS
from effjax.training.optimizers.base import Optimizer
from effjax.training.optimizers.leaves import leaf_tree


def check(block: Mapping[str, Any], path: str = 'config.optimizer') -> Any:
    """Checks an optimizer block's kind, argument names and types, and returns the component.

    Raises:
      ConfigError: unknown kind or argument, or a value of the wrong type.
    """
    return check_block(OPTIMIZERS, block, 'optimizer', path)


def build(
    block: Mapping[str, Any],
    *,
    meta: Any,
    lr_scales: Sequence[Sequence[Any]] = (),
    decay_scales: Sequence[Sequence[Any]] = (),
) -> Optimizer:
    """Builds an optimizer for parameters with the given metadata.

    Args:
      block: `dict(kind='adamw', b2=0.95, ...)`.
      meta: nested dicts of `core.axes.Meta`, as the parameters are nested.
      lr_scales: pairs (regular expression searched in a parameter's path, factor); the first
        match counts.
      decay_scales: the same for weight decay.

    Raises:
      ConfigError: unknown kind or argument, a value of the wrong type or out of range, or a
        scale that matches no parameter.
    """
    component = check(block)
    return component(leaf_tree(meta, lr_scales, decay_scales), **arguments(block))
