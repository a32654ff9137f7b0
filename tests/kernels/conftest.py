"""What the tests of kernels share: interpreters, chips to compile for ahead of time."""

import contextlib
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from jax._src import callback as callbacks
from jax._src.pallas.mosaic_gpu.interpret import shared_memory
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from effjax.kernels import target


@pytest.fixture(autouse=True)
def _quickly(request: pytest.FixtureRequest) -> None:
    """Interpreted kernels run once, after long compiling; what is for a chip stays as it is."""
    for_a_chip = 'tpu_sharding' in request.fixturenames
    request.getfixturevalue('full_compile' if for_a_chip else 'quick_compile')


@pytest.fixture(autouse=True)
def _plain_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreters' memory is numpy behind a callback for each access: it gets numpy arrays.

    What jax does with them instead, arrays on a device for numbers that are read at once, is half
    of the time of a test. Copies, since the buffers are the program's.
    """

    def call(*args, result_avals, callback, sharding, ordered):
        del result_avals, sharding, ordered
        return [np.asarray(out) for out in callback(*map(np.array, args))]

    to_int = shared_memory._to_int
    monkeypatch.setattr(callbacks, 'io_callback_impl', call)
    monkeypatch.setattr(
        shared_memory, '_to_int', lambda x: int(x) if isinstance(x, np.ndarray) else to_int(x)
    )


@pytest.fixture
def interpreted() -> Callable:
    """Returns `interpreted(implementation)`: kernels are interpreted inside, and races raise."""

    @contextlib.contextmanager
    def inside(implementation: str) -> Iterator[None]:
        if implementation == 'pallas_tpu':
            mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True))
        else:
            mode = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True))
        with target(implementation.removeprefix('pallas_')), mode:
            yield

    return inside


@pytest.fixture
def tpu_sharding(monkeypatch) -> Callable:
    """Returns `sharding(topology)`: one chip of a TPU topology, which libtpu compiles for anywhere.

    Skips without libtpu, unless `EFFJAX_NEED_LIBTPU` is set, as it is where everything must run.
    """
    try:
        import libtpu
    except ImportError:
        if os.environ.get('EFFJAX_NEED_LIBTPU'):
            raise
        pytest.skip('needs libtpu, of the extra effjax[tpu]')
    for name, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_LIBRARY_PATH': libtpu.get_library_path(),
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }.items():
        monkeypatch.setenv(name, value)

    def sharding(topology: str) -> jax.sharding.SingleDeviceSharding:
        chips = topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
        return jax.sharding.SingleDeviceSharding(chips[0])

    return sharding
