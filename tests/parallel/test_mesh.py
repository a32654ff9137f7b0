"""Meshes from a config's block."""

import jax
import pytest

from effjax.core.config import MESH_AXES
from effjax.core.errors import ConfigError, DeviceError
from effjax.parallel import make_mesh


def test_one_device_has_all_axes():
    mesh = make_mesh({'data': -1}, jax.devices()[:1])
    assert mesh.axis_names == MESH_AXES
    assert set(mesh.shape.values()) == {1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ('block', 'error', 'message'),
    [
        ({'data': 1, 'fsdp': 64}, DeviceError, 'the mesh fsdp 64 needs 64 devices but there '),
        ({'fsdp': 64}, DeviceError, '--xla_force_host_platform_device_count=64'),
        ({'data': -1, 'fsdp': 64}, DeviceError, 'needs 64 devices'),
        ({'data': -1, 'fsdp': -1}, ConfigError, 'only one mesh axis may be -1, got data, fsdp'),
        ({'tensor': 0}, ConfigError, 'config.mesh.tensor must be -1 or at least 1, got 0'),
        ({'tensr': 2}, ConfigError, "unknown mesh axis config.mesh.tensr.*'tensor'"),
    ],
)
def test_impossible_meshes(block, error, message):
    with pytest.raises(error, match=message):
        make_mesh(block)


@pytest.mark.mesh
def test_sizes_on_eight_devices(caplog):
    shape = make_mesh({'data': -1, 'tensor': 2}).shape
    assert (shape['data'], shape['tensor'], shape['fsdp']) == (4, 2, 1)
    assert make_mesh({'fsdp': 4, 'tensor': 2}).size == 8
    assert make_mesh().shape['data'] == 8
    assert not caplog.records
    assert make_mesh({'data': 1}).size == 1
    assert 'uses 1 of 8 devices' in caplog.text


@pytest.mark.mesh
def test_devices_that_do_not_divide():
    with pytest.raises(DeviceError, match=r'8 devices are not divisible by the 3 of .* tensor 3'):
        make_mesh({'data': -1, 'tensor': 3})
