"""From logical axis names to mesh axes: the resolver, the parameters' shardings, constraints."""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core.axes import AXES, Meta
from effjax.core.config import MESH_AXES
from effjax.core.errors import ConfigError
from effjax.core.registry import suggest
from effjax.core.trees import flatten, map_named

Rules = Mapping[str, tuple[str, ...]]

# The mesh axes that shard a logical axis, all of them where they divide it. `batch` and `sequence`
# name dimensions of activations; all others name dimensions of parameters and activations.
DEFAULT_RULES: Rules = {
    'batch': ('data', 'fsdp', 'expert'),
    'sequence': ('sequence',),
    'layers': (),
    'embed': ('fsdp',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'head_dim': (),
    'mlp': ('tensor',),
    'vocab': ('tensor',),
    'position': (),
    'expert': ('expert',),
    'state': (),
    'conv': (),
    'rank': (),
    'patch': (),
    'classes': (),
}

_NAMES = ('batch', 'sequence', *AXES)
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar('rules', default=DEFAULT_RULES)


def make_rules(overrides: Mapping[str, Any] | None = None) -> dict[str, tuple[str, ...]]:
    """Returns the default rules with `config.sharding` over them.

    Args:
      overrides: logical axis -> a mesh axis, a sequence of mesh axes, or None for no sharding.

    Raises:
      ConfigError: unknown logical or mesh axis, or a mesh axis twice in one rule.
    """
    rules = dict(DEFAULT_RULES)
    for name, value in (overrides or {}).items():
        if name not in _NAMES:
            raise ConfigError(
                f'config.sharding.{name}: unknown logical axis; known: {", ".join(_NAMES)}.'
                + suggest(name, _NAMES)
            )
        axes = (value,) if isinstance(value, str) else tuple(value or ())
        for axis in axes:
            if axis not in MESH_AXES:
                raise ConfigError(
                    f'config.sharding.{name}: unknown mesh axis {axis!r}; known: '
                    f'{", ".join(MESH_AXES)}.' + suggest(axis, MESH_AXES)
                )
        if len(set(axes)) < len(axes):
            raise ConfigError(f'config.sharding.{name}: a mesh axis occurs twice in {axes}.')
        rules[name] = axes
    return rules


def resolve(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules = DEFAULT_RULES,
    *,
    name: str = 'array',
    fallbacks: list[str] | None = None,
) -> PartitionSpec:
    """Returns the `PartitionSpec` of an array from the logical names of its dimensions.

    A mesh axis of size 1 shards nothing and is left out. A mesh axis is passed over, with a
    sentence in `fallbacks`, where it does not divide the dimension (after those before it) or
    already shards an earlier dimension of the same array.

    Args:
      axes: a name, or None, for each dimension.
      shape: the dimensions.
      mesh: the mesh; its sizes are all that matters.
      rules: logical axis -> mesh axes.
      name: what the array is called in `fallbacks`.
      fallbacks: list that receives a sentence for each mesh axis passed over.

    Raises:
      ValueError: not as many names as dimensions, or a name without a rule.
    """
    if len(axes) != len(shape):
        raise ValueError(f'{name}: {len(axes)} axis names {tuple(axes)} for shape {tuple(shape)}.')
    for logical in axes:
        if logical is not None and logical not in rules:
            raise ValueError(f'{name}: no sharding rule for the axis {logical!r}.')
    entries, passed = _assign(axes, shape, mesh, rules)
    if fallbacks is not None:
        fallbacks.extend(
            f"{name}: axis '{axes[dim]}' is not sharded over '{axis}': {why}."
            for dim, axis, why in passed
        )
    return PartitionSpec(*entries)


def _assign(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, rules: Rules
) -> tuple[list[Any], list[tuple[int, str, str]]]:
    """Returns a spec's entries, and (dimension, mesh axis, why) for each mesh axis passed over."""
    used: dict[str, int] = {}
    entries: list[Any] = []
    passed: list[tuple[int, str, str]] = []
    for dim, (logical, size) in enumerate(zip(axes, shape, strict=True)):
        chosen: list[str] = []
        parts = 1
        for axis in rules[logical] if logical is not None else ():
            ways = mesh.shape.get(axis, 1)
            if ways == 1:
                continue
            if axis in used:
                passed.append((dim, axis, f"it already shards axis '{axes[used[axis]]}'"))
            elif size % (parts * ways):
                over = ' x '.join(f'{a} {mesh.shape[a]}' for a in (*chosen, axis))
                passed.append((dim, axis, f'{size} is not divisible by {over}'))
            else:
                chosen.append(axis)
                used[axis] = dim
                parts *= ways
        entries.append(tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None)
    while entries and entries[-1] is None:
        entries.pop()
    return entries, passed


def shardings(
    meta: Any, abstract: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> tuple[Any, list[str]]:
    """Returns the sharding of each parameter, and a sentence for each fall-back.

    Whoever calls shows the sentences: an axis that silently stays whole is how runs end out of
    memory.

    Args:
      meta: tree of `core.axes.Meta`.
      abstract: the parameters or their shapes, in the same structure.
      mesh: the mesh.
      rules: logical axis -> mesh axes.
    """
    fallbacks: list[str] = []
    metas: dict[str, Meta] = flatten(meta)

    def one(name: str, x: Any) -> NamedSharding:
        spec = resolve(metas[name].axes, x.shape, mesh, rules, name=name, fallbacks=fallbacks)
        return NamedSharding(mesh, spec)

    return map_named(one, abstract), fallbacks


@contextlib.contextmanager
def mesh_context(mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[Mesh]:
    """Makes `mesh` and `rules` the ones that `constrain` uses; enter it before tracing.

    jax keys its compilation cache by the mesh, not by the rules: one program, one set of rules.
    """
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _rules.reset(token)


def current_rules() -> Rules:
    """Returns the rules of the innermost `mesh_context`, the default ones outside of any."""
    return _rules.get()


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Shards an activation by the logical names of its dimensions, where a mesh is set.

    The mesh axes of the batch shard nothing else here: `embed` names a dimension that FSDP shards
    in parameters and keeps whole in activations. A dimension that its mesh axes do not divide is
    left to the partitioner. Inside `shard_map` only the axes that are not manual count.

    Args:
      x: any activation.
      axes: a name of `core.axes.AXES`, 'batch', 'sequence', or None (kept whole), for each
        dimension.

    Returns:
      `x`, constrained; exactly `x` without a mesh or on one device.

    Raises:
      ValueError: not as many names as dimensions, or an unknown name.
    """
    if len(axes) != x.ndim:
        raise ValueError(f'{len(axes)} axis names {tuple(axes)} for an activation of {x.shape}.')
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    auto = {a for a, kind in kinds if kind == AxisType.Auto and mesh.shape[a] > 1}
    if not auto:
        return x
    rules = _rules.get()
    for name in axes:
        if name is not None and name not in rules:
            raise ValueError(f'no sharding rule for the axis {name!r}.')
    rows = {'data', 'fsdp', *(rules['batch'] if 'batch' in axes else ())}
    allowed = {
        name: tuple(a for a in found if a in auto and (name == 'batch' or a not in rows))
        for name, found in rules.items()
    }
    entries, passed = _assign(axes, x.shape, mesh, allowed)
    entries += [None] * (x.ndim - len(entries))
    for dim, _, _ in passed:
        if entries[dim] is None:
            entries[dim] = PartitionSpec.UNCONSTRAINED
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
