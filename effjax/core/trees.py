"""Nested dicts of arrays: paths, strict comparison, counts and bytes."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from effjax.core.errors import CheckpointError


def path_name(path: tuple) -> str:
    """Returns a jax key path as 'body/segment_0/slot_0/mixer/query'."""
    return jax.tree_util.keystr(path, simple=True, separator='/')


def flatten(tree: Any) -> dict[str, Any]:
    """Returns `path -> leaf` in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def map_named(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `f(name, leaf, ...)` over trees of one structure."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: f(path_name(path), *leaves), tree, *rest
    )


def parameter_of(name: str, params: Mapping[str, Any]) -> str | None:
    """Returns the path of the parameter that a piece of state belongs to, or None.

    A moment's path ends in its parameter's path (`0/mu/body/slot_0/mixer/query`).

    Args:
      name: path of the piece of state, as `core.trees.flatten` gives it.
      params: `path -> anything` of the parameters.
    """
    keys = name.split('/')
    for start in range(len(keys)):
        tail = '/'.join(keys[start:])
        if tail in params:
            return tail
    return None


def count(tree: Any) -> int:
    """Number of elements in all leaves (arrays or shape structs)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Bytes of all leaves (arrays or shape structs)."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Lists how two trees differ, one sentence a leaf.

    Args:
      expected: `path -> thing with shape and dtype`, as `flatten` gives it.
      found: the same of the other tree.
    """
    out = []
    for name, leaf in expected.items():
        if name not in found:
            out.append(f'{name} {tuple(leaf.shape)} is missing')
        elif tuple(found[name].shape) != tuple(leaf.shape):
            out.append(f'{name} is {tuple(found[name].shape)}, expected {tuple(leaf.shape)}')
        elif str(found[name].dtype) != str(leaf.dtype):
            out.append(f'{name} is {found[name].dtype}, expected {leaf.dtype}')
    out.extend(f'{name} is not expected' for name in found if name not in expected)
    return out


def strict(expected: Any, tree: Any, what: str = 'state') -> Any:
    """Returns `tree` after checking that it has the structure, shapes and dtypes of `expected`.

    Raises:
      CheckpointError: naming the leaves that differ (`nnx.update` would accept them silently).
    """
    wrong = differences(flatten(expected), flatten(tree))
    if wrong:
        more = f' (and {len(wrong) - 5} more)' if len(wrong) > 5 else ''
        raise CheckpointError(f'{what} does not fit: {"; ".join(wrong[:5])}{more}.')
    return tree
