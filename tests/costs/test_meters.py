"""Meters read what there is and return None, never an error, where there is nothing."""

import types

import jax
import jax.numpy as jnp

from effjax.costs import EnergyMeter, compiled_memory, meters


def test_compiled_memory_of_a_product():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    compiled = jax.jit(lambda a, b: a @ b, donate_argnums=0).lower(x, x).compile()
    memory = compiled_memory(compiled)
    size = 256 * 256 * 4
    assert memory['arguments'] == 2 * size
    assert memory['outputs'] == memory['aliased'] == size  # the donated argument is reused
    assert memory['total'] == sum(memory[k] for k in ('arguments', 'temporary', 'code'))


def test_compiled_memory_where_there_is_none():
    def refuses():
        raise NotImplementedError

    assert compiled_memory(types.SimpleNamespace(memory_analysis=refuses)) is None
    assert compiled_memory(types.SimpleNamespace(memory_analysis=lambda: None)) is None


def test_device_peak():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    def refuses():
        raise RuntimeError

    full = [device({'peak_bytes_in_use': 5}), device({'peak_bytes_in_use': 7}), device(None)]
    assert meters.peak_device_bytes(full) == 7
    assert meters.peak_device_bytes([types.SimpleNamespace(memory_stats=refuses)]) is None
    assert meters.peak_device_bytes(jax.devices('cpu')) is None
    assert set(meters.memory()) == {'device_peak_bytes', 'host_peak_bytes'}
    kept = meters.memory(before={'device_peak_bytes': 1 << 60, 'host_peak_bytes': 1, 'plan': 5})
    assert kept['device_peak_bytes'] == 1 << 60 and kept['plan'] == 5
    assert kept['host_peak_bytes'] > 1


def test_host_memory(monkeypatch):
    assert 10e6 < meters.host_bytes() <= 2 * meters.host_peak_bytes() < 1e12
    monkeypatch.setattr(meters, '_PROC_STATUS', '/nonexistent/status')
    assert meters.host_bytes() is None


class FakeNVML:
    """Stands for pynvml with three devices whose counters run as told."""

    def __init__(self, broken=()):
        self.counters = [1_000_000, 2_000_000, 4_000_000]
        self.broken = broken

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return 3

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {'GPU-b': 1}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if handle in self.broken:
            raise RuntimeError('not supported')
        return self.counters[handle]


def test_energy_adds_up_visible_devices(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    nvml = FakeNVML()
    meter = EnergyMeter(nvml=nvml)
    nvml.counters = [1_005_000, 2_000_500, 4_000_000]
    assert meter.joules() == 5.5
    meter.restore(100.0)
    assert meter.joules() == 105.5
    meter.restore(None)  # the run's first part had no meter
    assert meter.joules() is None


def test_energy_follows_cuda_visible_devices(monkeypatch):
    nvml = FakeNVML(broken=(2,))
    for names, seen in (('1', [1]), ('GPU-b,0', [1, 0]), ('0,-1,1', [0]), ('', [])):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', names)
        meter = EnergyMeter(nvml=nvml)
        assert meter._handles == seen
        assert (meter.joules() is None) == (not seen)


def test_no_energy_where_a_counter_is_missing(monkeypatch):
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert EnergyMeter(nvml=FakeNVML(broken=(2,))).joules() is None

    class NoDriver(FakeNVML):
        def nvmlInit(self):
            raise RuntimeError('driver not loaded')

    assert EnergyMeter(nvml=NoDriver()).joules() is None
    monkeypatch.setattr(meters, '_import_nvml', lambda: None)
    meter = EnergyMeter()
    meter.restore(3.0)
    assert meter.joules() is None
