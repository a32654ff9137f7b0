"""How to shard each piece of an optimizer's state: as the parameter that it belongs to."""

from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from effjax.core.trees import flatten, map_named, parameter_of
from effjax.training.optimizers.leaves import Leaf


def shardings_of(state: Any, params: Any, shardings: Any, leaves: Any) -> Any:
    """Returns a `NamedSharding` for each array of an optimizer state.

    Args:
      state: the state's shapes.
      params: the parameters' shapes.
      shardings: tree of `NamedSharding`, as the parameters.
      leaves: tree of `Leaf`, as the parameters.
    """
    shapes, specs, facts = flatten(params), flatten(shardings), flatten(leaves)
    mesh = next(iter(specs.values())).mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def one(name: str, x: Any) -> NamedSharding:
        path = parameter_of(name, shapes)
        if path is None:
            return replicated
        spec = _spec(name, x.shape, shapes[path].shape, specs[path].spec, facts[path])
        return NamedSharding(mesh, spec) if spec is not None else replicated

    return map_named(one, state)


def _spec(
    name: str, shape: tuple[int, ...], param: tuple[int, ...], spec: PartitionSpec, leaf: Leaf
) -> PartitionSpec | None:
    """Returns the spec of a piece of state of `shape`, or None where it matches no dimensions."""
    entries = tuple(spec) + (None,) * (len(param) - len(spec))
    if shape == param:
        return PartitionSpec(*entries)
    view = leaf.view(param)
    # Of joined dimensions the first one may stay sharded: its shards remain contiguous.
    joined = (*entries[: leaf.stack], *(entries[group[0]] for group in leaf.groups))
    if shape == view:
        return PartitionSpec(*joined)
    # A factored moment lacks one dimension. Of a square matrix the row statistics keep the first.
    drops = range(len(view) - 1, leaf.stack - 1, -1)
    for drop in drops if 'v_row' in name.split('/') else reversed(drops):
        if shape == view[:drop] + view[drop + 1 :]:
            return PartitionSpec(*joined[:drop], *joined[drop + 1 :])
    return None
