"""Sharded arrays: initialisation in place, batches from the rows that each process loads."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from effjax.core.errors import ConfigError
from effjax.parallel.rules import DEFAULT_RULES, Rules


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def init_sharded(init: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """Runs an initialiser under one jit, so that nothing is ever whole on one device.

    The random bits do not depend on the mesh (jax's are partitionable), so the values agree up to
    the rounding of the functions applied to them.

    Args:
      init: makes a tree of arrays from `args`.
      shardings: the sharding of each array of that tree.
      *args: a key, for example.
    """
    return jax.jit(init, out_shardings=shardings)(*args)


def batch_sharding(
    mesh: Mesh, *, sequence: bool = False, rules: Rules = DEFAULT_RULES
) -> NamedSharding:
    """Returns the sharding of a batch's arrays: rows over the mesh axes of `batch`.

    Args:
      mesh: the mesh.
      sequence: whether the arrays are [B, T, ...], T being sharded over the axes of `sequence`.
      rules: logical axis -> mesh axes.
    """
    names = ('batch', 'sequence') if sequence else ('batch',)
    return NamedSharding(mesh, PartitionSpec(*(_entry(_axes(mesh, rules, n)) for n in names)))


def check_batch(
    batch_size: int,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    seq_len: int | None = None,
    rules: Rules = DEFAULT_RULES,
) -> None:
    """Checks that a microbatch divides over the mesh.

    Args:
      batch_size: rows a step.
      mesh: the mesh.
      accumulate: microbatches a step.
      seq_len: tokens a row, or None where the task has no sequence.
      rules: logical axis -> mesh axes.

    Raises:
      ConfigError: rows or tokens that the mesh axes do not divide.
    """
    rows = _axes(mesh, rules, 'batch')
    ways = math.prod(mesh.shape[a] for a in rows)
    if batch_size % (accumulate * ways):
        named = ' x '.join(f'{a} {mesh.shape[a]}' for a in rows)
        micro = f' in {accumulate} microbatches' if accumulate > 1 else ''
        raise ConfigError(
            f'config.batch_size {batch_size}{micro} is not divisible by the {ways} devices of the '
            f'mesh axes {named}; make it a multiple of {accumulate * ways}.'
        )
    columns = _axes(mesh, rules, 'sequence')
    ways = math.prod(mesh.shape[a] for a in columns)
    if seq_len is not None and seq_len % ways:
        raise ConfigError(
            f'config.seq_len {seq_len} is not divisible by the {ways} devices of the mesh axis '
            f'{", ".join(columns)}; make it a multiple of {ways}.'
        )


def process_rows(batch_size: int, mesh: Mesh, *, rules: Rules = DEFAULT_RULES) -> slice:
    """Returns the rows of the global batch that this process must load, as one slice.

    Args:
      batch_size: rows of the global batch.
      mesh: the mesh.
      rules: logical axis -> mesh axes.
    """
    sharding = batch_sharding(mesh, rules=rules)
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = [index[0].indices(batch_size)[:2] for index in indices if index is not None]
    return slice(min(start for start, _ in bounds), max(stop for _, stop in bounds))


def put_batch(
    rows: Mapping[str, np.ndarray],
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    sequence: bool = False,
    rules: Rules = DEFAULT_RULES,
) -> dict[str, jax.Array]:
    """Returns global arrays, sharded over rows, from the rows that this process loaded.

    Args:
      rows: arrays [rows of `process_rows`, ...].
      mesh: the mesh.
      batch_size: rows of the global batch; None where this process loads all of them.
      sequence: as in `batch_sharding`; arrays of one dimension have no sequence.
      rules: logical axis -> mesh axes.
    """
    chex.assert_equal_shape_prefix(list(rows.values()), 1)
    total = len(next(iter(rows.values()))) if batch_size is None else batch_size
    mine = process_rows(total, mesh, rules=rules)
    by_rows = batch_sharding(mesh, rules=rules)
    by_both = batch_sharding(mesh, sequence=sequence, rules=rules)

    def put(x: np.ndarray) -> jax.Array:
        chex.assert_axis_dimension(x, 0, mine.stop - mine.start)

        def piece(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(total)
            return x[(slice(start - mine.start, stop - mine.start), *index[1:])]

        sharding = by_both if x.ndim > 1 else by_rows
        return jax.make_array_from_callback((total, *x.shape[1:]), sharding, piece)

    return {name: put(x) for name, x in rows.items()}


def _axes(mesh: Mesh, rules: Rules, name: str) -> tuple[str, ...]:
    return tuple(a for a in rules[name] if mesh.shape.get(a, 1) > 1)


def _entry(axes: tuple[str, ...]) -> Any:
    return axes if len(axes) > 1 else axes[0] if axes else None
