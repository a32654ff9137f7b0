"""Peaks by device kind, and utilisation that states its convention or is absent."""

import jax
import jax.numpy as jnp
import pytest

from effjax.costs import mfu, peak_flops


@pytest.mark.parametrize(
    ('kind', 'dtype', 'peak'),
    [
        ('NVIDIA H200', 'bfloat16', 989.4e12),
        ('NVIDIA H100 80GB HBM3', jnp.bfloat16, 989.4e12),
        ('NVIDIA H100 PCIe', 'bfloat16', 756.5e12),  # not the SXM board's
        ('NVIDIA H100 NVL', 'bfloat16', 835.5e12),
        ('NVIDIA H100 80GB HBM3', 'float32', 494.7e12),  # TF32
        ('NVIDIA H100 80GB HBM3', jnp.float8_e4m3fn, 1978.9e12),
        ('NVIDIA A100-SXM4-80GB', jnp.dtype('bfloat16'), 312e12),
        ('NVIDIA H20', 'bfloat16', 148e12),  # a substring of H200
        ('NVIDIA B200', 'bfloat16', 2250e12),
        ('NVIDIA GB200', 'bfloat16', 2500e12),
        ('TPU v4', 'bfloat16', 275e12),
        ('TPU v5 lite', 'bfloat16', 197e12),
        ('TPU v5e', 'bfloat16', 197e12),
        ('TPU v5p', 'bfloat16', 459e12),
        ('TPU v5', 'bfloat16', 459e12),
        ('TPU v6 lite', 'bfloat16', 918e12),
        ('TPU v6e', 'bfloat16', 918e12),
        ('TPU7x', 'bfloat16', 1153.5e12),
        ('cpu', 'bfloat16', None),
        ('NVIDIA H300', 'bfloat16', None),
        ('TPU v4 lite', 'bfloat16', None),
        ('TPU v4', 'float64', None),
        ('Tesla V100-SXM2-16GB', 'bfloat16', None),
        ('NVIDIA A100-SXM4-80GB', 'float8_e4m3fn', None),
    ],
)
def test_peaks(kind, dtype, peak):
    assert peak_flops(kind, dtype) == peak


def test_cpu_has_no_mfu():
    device = jax.devices('cpu')[0]
    assert peak_flops(device, jnp.float32) is None
    assert mfu(1e12, 1.0, device, 'float32') is None


def test_mfu_states_its_convention():
    got = mfu(4 * 989.4e12 * 10 / 2, 10.0, 'NVIDIA H200', jnp.bfloat16, 4)
    assert got['mfu'] == pytest.approx(0.5)
    assert got['hfu'] is None
    assert (got['dtype'], got['devices'], got['device_kind']) == ('bfloat16', 4, 'NVIDIA H200')
    for word in ('T(T+1)/2', 'no rematerialisation', '989.4 TFLOP/s dense bfloat16', 'NVIDIA H200'):
        assert word in got['convention']
    both = mfu(1e15, 10.0, 'TPU v4', hardware_flops=1.25e15)
    assert both['hfu'] == pytest.approx(1.25 * both['mfu'])
    assert mfu(1e15, 0.0, 'TPU v4') is None
