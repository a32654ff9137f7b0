"""Run an operation that XLA cannot partition on each device's part of its arrays.

A custom call (a Pallas kernel, cuDNN's ragged layout) is opaque to the partitioner. Where it works
on rows and heads independently, `over` gives each device its own rows and heads by `shard_map`;
the operation itself never sees a mesh.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from effjax.parallel.rules import current_rules, resolve


def auto_axes() -> dict[str, int]:
    """Returns the sizes of the current mesh's axes that are above 1 and not manual already."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {a: mesh.shape[a] for a, kind in kinds if kind == AxisType.Auto and mesh.shape[a] > 1}


def over(
    op: Callable[..., jax.Array],
    in_axes: Sequence[Sequence[str | None] | None],
    out_axes: Sequence[str | None],
) -> Callable[..., jax.Array]:
    """Returns `op`, run on each device's part along the named dimensions.

    Dimensions that are None, or that the mesh does not divide, are whole on every device; the
    gradient of an input that is whole along a mesh axis is summed over it. Without a mesh of
    several devices `op` is called as it is.

    Args:
      op: a function of arrays, independent along every named dimension.
      in_axes: for each argument, logical names ('batch', 'heads', ...) of its dimensions, or None
        for an argument that is None.
      out_axes: the names of the output's dimensions; each stands in some input too.
    """

    def run(*args: Any) -> jax.Array:
        sizes = auto_axes()
        if not sizes:
            return op(*args)
        mesh, rules = jax.sharding.get_abstract_mesh(), current_rules()
        # Axes of size 1 too: a Pallas kernel lowers only where every axis of the mesh is manual.
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        every = {axis for axis, kind in kinds if kind == AxisType.Auto}
        free = {n: tuple(a for a in found if a in sizes) for n, found in rules.items()}
        specs: list[PartitionSpec | None] = []
        found: dict[str | None, Any] = {}
        for axes, x in zip(in_axes, args, strict=True):
            if x is None:
                specs.append(None)
                continue
            assert axes is not None
            spec = resolve(axes, x.shape, mesh, free)
            specs.append(spec)
            found.update(zip(axes, (*spec, *[None] * (x.ndim - len(spec))), strict=True))
        out = PartitionSpec(*(found[a] if a is not None else None for a in out_axes))
        # vma checks know no Pallas kernel; the sums over unnamed axes are right without them.
        return jax.shard_map(
            op,
            in_specs=tuple(specs),
            out_specs=out,
            axis_names=every,
            check_vma=False,
        )(*args)

    return run
