"""Meters of memory and energy. Where the hardware or a library has none, a meter returns None."""

import contextlib
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any

_PROC_STATUS = '/proc/self/status'


def compiled_memory(compiled: Any) -> dict[str, int] | None:
    """Returns the bytes on one device that a compiled function needs, by what they are for.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns.

    Returns:
      {'arguments', 'outputs', 'aliased' (outputs that reuse arguments), 'temporary', 'code',
      'total'}, where total = arguments + outputs - aliased + temporary + code; or None.
    """
    try:
        stats = compiled.memory_analysis()
    except Exception:  # a backend without the analysis raises its own kind of error
        return None
    if stats is None:
        return None
    out = {
        'arguments': int(stats.argument_size_in_bytes),
        'outputs': int(stats.output_size_in_bytes),
        'aliased': int(stats.alias_size_in_bytes),
        'temporary': int(stats.temp_size_in_bytes),
        'code': int(stats.generated_code_size_in_bytes),
    }
    out['total'] = sum(out.values()) - 2 * out['aliased']
    return out


def peak_device_bytes(devices: Iterable[Any]) -> int | None:
    """Returns the largest peak of bytes in use over devices, since the process began, or None."""
    peaks = []
    for device in devices:
        try:
            stats = device.memory_stats()
        except Exception:  # not implemented by every backend
            stats = None
        if stats and 'peak_bytes_in_use' in stats:
            peaks.append(int(stats['peak_bytes_in_use']))
    return max(peaks, default=None)


def host_peak_bytes() -> int | None:
    """Returns the peak resident size of this process in bytes, or None."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak <= 0:
        return None
    return peak if sys.platform == 'darwin' else peak * 1024  # kilobytes on Linux


def host_bytes() -> int | None:
    """Returns the resident size of this process now in bytes, or None (no /proc)."""
    with contextlib.suppress(OSError, ValueError, IndexError), open(_PROC_STATUS) as file:
        for line in file:
            if line.startswith('VmRSS:'):
                return int(line.split()[1]) * 1024
    return None


def memory(
    devices: Iterable[Any] | None = None, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the measured peaks that summary.json shows; what cannot be measured is None.

    Args:
      devices: whose memory to read; None for this process's.
      before: what earlier processes of the run had: the higher peaks stay.

    Returns:
      {'device_peak_bytes' (of the fullest device), 'host_peak_bytes'}, and the rest of `before`.
    """
    if devices is None:
        import jax  # late: reports and plans use this module without a backend

        devices = jax.local_devices()
    out = dict(before or {})
    now = {'device_peak_bytes': peak_device_bytes(devices), 'host_peak_bytes': host_peak_bytes()}
    for key, peak in now.items():
        known = [p for p in (peak, out.get(key)) if p is not None]
        out[key] = max(known, default=None)
    return out


class EnergyMeter:
    """Joules used by this host's visible NVIDIA devices since the meter was made.

    Reads NVML's energy counter (Volta and later), which runs in hardware, so no sampling thread is
    needed. Without NVML, its Python module, or the counter on every visible device, `joules` is
    None. The counter is of whole boards: other programs on them are included.
    """

    def __init__(self, *, nvml: Any = None):
        """Starts the meter.

        Args:
          nvml: the `pynvml` module or a stand-in; None imports it.
        """
        self._before: float | None = 0.0
        self._nvml = nvml if nvml is not None else _import_nvml()
        self._handles = _visible(self._nvml)
        self._start = self._read()

    def joules(self) -> float | None:
        """Joules so far, earlier parts of the run included, or None."""
        now = self._read()
        if now is None or self._start is None:
            return None
        return None if self._before is None else self._before + (now - self._start) / 1000.0

    def restore(self, joules: float | None) -> None:
        """Adds the joules of the run's earlier part; None (not metered) leaves no total."""
        self._before = joules

    def _read(self) -> int | None:
        """Millijoules on all counters, or None."""
        if not self._handles:
            return None
        try:
            return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles)
        except Exception:  # NVMLError, whose class exists only where pynvml does
            return None


def _import_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _visible(nvml: Any) -> list[Any]:
    """Returns handles of the devices that CUDA_VISIBLE_DEVICES leaves visible."""
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
        names = os.environ.get('CUDA_VISIBLE_DEVICES')
        if names is None:
            count = nvml.nvmlDeviceGetCount()
            return [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        out = []
        for name in filter(None, (n.strip() for n in names.split(','))):
            if name.lstrip('-').isdigit():
                if int(name) < 0:  # CUDA ignores everything from the first invalid one
                    break
                out.append(nvml.nvmlDeviceGetHandleByIndex(int(name)))
            else:
                out.append(nvml.nvmlDeviceGetHandleByUUID(name))
        return out
    except Exception:  # no driver, no permission: NVMLError
        return []
