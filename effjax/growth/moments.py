"""Grows what an optimizer keeps of each parameter.

An optimizer's state is a tree whose moments' paths end in their parameter's path; growing a model
changes shapes but no paths, so that the large optimizer's state has the small one's structure. What
is kept of a parameter is recognised by the name of the field that holds it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.axes import product_groups, stack_depth
from effjax.core.errors import ConfigError
from effjax.core.trees import flatten, map_named, parameter_of
from effjax.growth.base import Kind, Rule
from effjax.growth.change import Change, LeafChange

# Field of an optimizer's state -> what it holds. `z` is schedule-free's last iterate, `ema`
# Adafactor's momentum.
_KINDS: dict[str, Kind] = {
    'mu': 'first', 'trace': 'first', 'nu': 'second', 'v': 'second', 'z': 'value', 'ema': 'step',
}  # fmt: skip
_FACTORED = ('v', 'v_row', 'v_col')


def grow_moments(state: Any, change: Change, rule: Rule, expected: Any) -> Any:
    """Returns an optimizer's state for the large model; what belongs to no parameter stays.

    Args:
      state: the small model's.
      change: from where to where.
      rule: the operator's rule for it.
      expected: shapes and dtypes of the large model's state, as the optimizer's `init` gives them.

    Raises:
      ConfigError: a field that growth does not know.
    """
    old, new = flatten(state), flatten(expected)

    def one(name: str, x: Any) -> Any:
        path = parameter_of(name, change.leaves)
        if path is None:
            return x
        leaf, prefix = change.leaves[path], name[: -len(path)].rstrip('/')
        above, _, field = prefix.rpartition('/')
        if field in _FACTORED and f'{above}/v_row/{path}'.lstrip('/') in old:
            pieces = [f'{above}/{f}/{path}'.lstrip('/') for f in _FACTORED]
            v = _joined_square(leaf, [old[piece] for piece in pieces])
            return _parted_square(leaf, rule(leaf, v, 'second'), field, [new[p] for p in pieces])
        if field not in _KINDS:
            raise ConfigError(
                f"growth does not know the optimizer's {field!r} of {path}; use moments='reset'."
            )
        grown = rule(leaf, x.reshape(leaf.old), _KINDS[field])
        return grown.reshape(new[name].shape).astype(new[name].dtype)

    return map_named(one, state)


def _joined_square(leaf: LeafChange, pieces: list[Any]) -> jax.Array:
    """Returns the whole second moment of a parameter from Adafactor's rows and columns.

    Adafactor (arXiv 1804.04235) takes `row column / mean(row)` for it; of small matrices it keeps
    the whole.
    """
    v, row, col = pieces
    view = _view(leaf, leaf.old)
    if np.prod(v.shape) == np.prod(view):
        return v.reshape(leaf.old)
    small, large = _factored_dims(leaf, view)
    row, col = jnp.expand_dims(row, large), jnp.expand_dims(col, small)
    mean = jnp.mean(row, axis=small, keepdims=True)
    return (row * col / jnp.where(mean == 0, 1, mean)).reshape(leaf.old)


def _parted_square(leaf: LeafChange, v: jax.Array, field: str, expected: list[Any]) -> jax.Array:
    """Returns one of Adafactor's three pieces of a second moment, in the form that is expected."""
    view = _view(leaf, leaf.new)
    like = expected[_FACTORED.index(field)]
    whole = np.prod(expected[0].shape) == np.prod(view)
    if whole != (field == 'v'):
        return jnp.zeros(like.shape, like.dtype)
    v = v.reshape(view)
    if not whole:
        small, large = _factored_dims(leaf, view)
        v = jnp.mean(v, axis=large if field == 'v_row' else small)
    return v.reshape(like.shape).astype(like.dtype)


def _view(leaf: LeafChange, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with the dimensions joined that are one dimension of a product."""
    stack = stack_depth(leaf.meta.axes)
    groups = product_groups(leaf.meta.axes, stack)
    return (*shape[:stack], *(int(np.prod([shape[i] for i in group])) for group in groups))


def _factored_dims(leaf: LeafChange, view: tuple[int, ...]) -> tuple[int, int]:
    """The second largest and the largest dimension, which columns and rows lack, as in optax."""
    stack = stack_depth(leaf.meta.axes)
    order = np.argsort(view[stack:])
    return stack + int(order[-2]), stack + int(order[-1])
