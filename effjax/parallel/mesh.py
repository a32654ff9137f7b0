"""Makes the mesh that a config's `mesh` block describes."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from effjax.core.config import MESH_AXES
from effjax.core.errors import ConfigError, DeviceError
from effjax.core.registry import suggest

_log = logging.getLogger(__name__)


def make_mesh(block: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `core.config.MESH_AXES`, all of Auto type.

    Args:
      block: size of each axis; absent axes are 1, and -1 on one axis takes all devices that the
        others leave. None is `{'data': -1}`. A mesh of fewer devices than there are takes the
        first ones, in a single process.
      devices: the devices to use; None uses all devices of all processes.

    Raises:
      ConfigError: unknown axis, a size that is neither positive nor -1, or two axes at -1.
      DeviceError: more devices than there are, devices that the fixed axes do not divide, or
        devices of some process left out.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes({'data': -1} if block is None else block, len(devices))
    count = math.prod(sizes.values())
    if count > len(devices):
        raise DeviceError(
            f'the mesh {_name(sizes)} needs {count} devices but there '
            f'{"is" if len(devices) == 1 else "are"} {len(devices)}; lower config.mesh, or '
            f'simulate them on the CPU with XLA_FLAGS=--xla_force_host_platform_device_count='
            f'{count}.'
        )
    if count < len(devices):
        if jax.process_count() > 1:
            raise DeviceError(
                f'the mesh {_name(sizes)} uses {count} of {len(devices)} devices; with several '
                'processes it must use all: set one axis of config.mesh to -1.'
            )
        _log.warning('the mesh %s uses %d of %d devices.', _name(sizes), count, len(devices))
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:count],
    )


def _sizes(block: Mapping[str, int], available: int) -> dict[str, int]:
    for axis in block:
        if axis not in MESH_AXES:
            raise ConfigError(
                f'unknown mesh axis config.mesh.{axis}; known: {", ".join(MESH_AXES)}.'
                + suggest(axis, MESH_AXES)
            )
    sizes = {axis: int(block.get(axis, 1)) for axis in MESH_AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ConfigError(f'config.mesh.{axis} must be -1 or at least 1, got {size}.')
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f'only one mesh axis may be -1, got {", ".join(free)}.')
    if free:
        fixed = -math.prod(sizes.values())
        if fixed <= available and available % fixed:
            rest = _name({a: s for a, s in sizes.items() if s != -1})
            raise DeviceError(
                f'{available} devices are not divisible by the {fixed} of the mesh axes {rest}; '
                f'change config.mesh, or set config.mesh.{free[0]} to a number.'
            )
        sizes[free[0]] = max(available // fixed, 1)
    return sizes


def _name(sizes: Mapping[str, int]) -> str:
    return ' x '.join(f'{a} {s}' for a, s in sizes.items() if s > 1) or 'data 1'
