"""Peak FLOP/s of devices by kind and dtype, and utilisation against them.

A device or dtype that is not in the table has no peak, hence no MFU: a missing number is better
than a wrong one. Peaks are dense (no structured sparsity) and per jax device.

The dtype is that of the products' inputs. 'float32' is the fastest that XLA may run a float32
product at its default precision: TF32 on NVIDIA, one bfloat16 pass on TPU.
"""

from collections.abc import Mapping
from typing import Any

_T = 1e12

# Hopper whitepaper and H100, H200 and GH200 datasheets, SXM boards (sparse figures halved).
_HOPPER_SXM = {
    'bfloat16': 989.4 * _T, 'float16': 989.4 * _T, 'float32': 494.7 * _T,
    'float8': 1978.9 * _T, 'int8': 1978.9 * _T,
}  # fmt: skip
# H100 NVL and H200 NVL datasheets: 1671 sparse bf16.
_HOPPER_NVL = {
    'bfloat16': 835.5 * _T, 'float16': 835.5 * _T, 'float32': 417.5 * _T,
    'float8': 1670.5 * _T, 'int8': 1670.5 * _T,
}  # fmt: skip
# A100 datasheet, the same for SXM and PCIe, 40 and 80 GB.
_A100 = {'bfloat16': 312 * _T, 'float16': 312 * _T, 'float32': 156 * _T, 'int8': 624 * _T}

# Matched as substrings of `device_kind`, the first hit counts: longer names stand first.
_PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    # DGX B200 datasheet: 8 GPUs, 36 PFLOP/s dense fp8, half of it bf16.
    ('NVIDIA B200', {'bfloat16': 2250 * _T, 'float16': 2250 * _T, 'float32': 1125 * _T,
                     'float8': 4500 * _T, 'int8': 4500 * _T}),
    # GB200 NVL72 datasheet: 72 GPUs, 180 PFLOP/s dense bf16.
    ('NVIDIA GB200', {'bfloat16': 2500 * _T, 'float16': 2500 * _T, 'float32': 1250 * _T,
                      'float8': 5000 * _T, 'int8': 5000 * _T}),
    ('NVIDIA GH200', _HOPPER_SXM),
    ('NVIDIA H200 NVL', _HOPPER_NVL),
    ('NVIDIA H200', _HOPPER_SXM),
    ('NVIDIA H100 NVL', _HOPPER_NVL),
    # H100 PCIe datasheet: 1513 sparse bf16.
    ('NVIDIA H100 PCIe', {'bfloat16': 756.5 * _T, 'float16': 756.5 * _T, 'float32': 378 * _T,
                          'float8': 1513 * _T, 'int8': 1513 * _T}),
    ('NVIDIA H100', _HOPPER_SXM),
    ('NVIDIA H800', _HOPPER_SXM),
    # H20 datasheet.
    ('NVIDIA H20', {'bfloat16': 148 * _T, 'float16': 148 * _T, 'float32': 74 * _T,
                    'float8': 296 * _T, 'int8': 296 * _T}),
    ('NVIDIA A100', _A100),
    ('NVIDIA A800', _A100),
    # L40S datasheet.
    ('NVIDIA L40S', {'bfloat16': 362.05 * _T, 'float16': 362.05 * _T, 'float32': 183 * _T,
                     'float8': 733 * _T, 'int8': 733 * _T}),
    # V100 datasheet, SXM2; no bfloat16 units and no TF32.
    ('Tesla V100-SXM2', {'float16': 125 * _T, 'float32': 15.7 * _T}),
    # T4 datasheet.
    ('Tesla T4', {'float16': 65 * _T, 'float32': 8.1 * _T}),
    # Ada and Ampere whitepapers, products accumulated in fp32.
    ('NVIDIA GeForce RTX 4090', {'bfloat16': 165.2 * _T, 'float16': 165.2 * _T,
                                 'float32': 82.6 * _T, 'float8': 330.3 * _T}),
    ('NVIDIA GeForce RTX 3090 Ti', {}),  # not the 3090's
    ('NVIDIA GeForce RTX 3090', {'bfloat16': 71 * _T, 'float16': 71 * _T, 'float32': 35.6 * _T}),
    # Cloud TPU documentation, per chip, divided by two where jax shows each of the two cores of a
    # chip as a device (v2, v3, TPU7x).
    ('TPU v2', {'bfloat16': 23 * _T, 'float32': 23 * _T}),
    ('TPU v3', {'bfloat16': 61.5 * _T, 'float32': 61.5 * _T}),
    ('TPU v4 lite', {}),
    ('TPU v4', {'bfloat16': 275 * _T, 'float32': 275 * _T, 'int8': 275 * _T}),
    ('TPU v5 lite', {'bfloat16': 197 * _T, 'float32': 197 * _T, 'int8': 393 * _T}),
    ('TPU v5e', {'bfloat16': 197 * _T, 'float32': 197 * _T, 'int8': 393 * _T}),
    ('TPU v5', {'bfloat16': 459 * _T, 'float32': 459 * _T, 'int8': 918 * _T}),  # v5p
    ('TPU v6', {'bfloat16': 918 * _T, 'float32': 918 * _T, 'int8': 1836 * _T}),  # v6e, 'v6 lite'
    ('TPU7x', {'bfloat16': 1153.5 * _T, 'float32': 1153.5 * _T, 'float8': 2307 * _T}),
)  # fmt: skip


def peak_flops(device: Any, dtype: Any = 'bfloat16') -> float | None:
    """Returns a device's dense peak in FLOP/s for products of a dtype, or None.

    Args:
      device: a jax device, or its `device_kind`.
      dtype: dtype of the products' inputs, or its name; any float8 is one.
    """
    name = _name(dtype)
    name = 'float8' if name.startswith('float8') else name
    for part, peaks in _PEAKS:
        if part in _kind(device):
            return peaks.get(name)
    return None


def mfu(
    model_flops: float,
    seconds: float,
    device: Any,
    dtype: Any = 'bfloat16',
    devices: int = 1,
    *,
    hardware_flops: float | None = None,
) -> dict[str, Any] | None:
    """Returns utilisation with its convention, or None where the device has no known peak.

    Args:
      model_flops: model FLOPs done (forward and backward).
      seconds: training time that they took.
      device: a jax device or its `device_kind`.
      dtype: dtype of the products, or its name.
      devices: number of devices that did them.
      hardware_flops: FLOPs executed, rematerialisation included; adds `hfu`.

    Returns:
      {'mfu', 'hfu' (None if unknown), 'peak_flops' (one device), 'device_kind', 'devices',
      'dtype', 'convention'}.
    """
    peak = peak_flops(device, dtype)
    if peak is None or seconds <= 0:
        return None
    kind = _kind(device)
    available = peak * seconds * devices
    return {
        'mfu': model_flops / available,
        'hfu': None if hardware_flops is None else hardware_flops / available,
        'peak_flops': peak,
        'device_kind': kind,
        'devices': devices,
        'dtype': _name(dtype),
        'convention': (
            'model FLOPs (multiply-add 2, causal attention T(T+1)/2 pairs, backward 2x forward, '
            'no rematerialisation, no optimizer) over training time, waiting for data included, '
            f'at {peak / _T:.1f} TFLOP/s dense {_name(dtype)} a device ({kind})'
        ),
    }


def _kind(device: Any) -> str:
    return device if isinstance(device, str) else str(getattr(device, 'device_kind', ''))


def _name(dtype: Any) -> str:
    return str(getattr(dtype, 'name', None) or getattr(dtype, '__name__', dtype))
