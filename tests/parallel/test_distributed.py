"""Several processes on one host: joining, batches from each one's rows, broadcasting."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap

import jax
import pytest

from effjax import parallel
from effjax.core.errors import ConfigError, DeviceError

WORKER = textwrap.dedent("""
    import json
    import numpy as np
    import jax
    from effjax import parallel
    from effjax.core.errors import DeviceError

    assert parallel.initialize()
    mesh = parallel.make_mesh({'data': -1, 'tensor': 2})
    rows = parallel.process_rows(8, mesh)
    tokens = np.arange(8 * 3).reshape(8, 3)
    batch = parallel.put_batch({'tokens': tokens[rows]}, mesh, batch_size=8)
    weights = np.arange(8)[:, None]
    total = jax.jit(lambda x: (x * weights).sum())(batch['tokens'])
    try:
        parallel.make_mesh({'data': 1})
        refused = ''
    except DeviceError as e:
        refused = str(e)
    mine = jax.process_index() + 1
    print('RESULT', json.dumps({
        'rows': [rows.start, rows.stop],
        'total': int(total),
        'shape': list(batch['tokens'].shape),
        'primary': parallel.is_primary(),
        'float': parallel.broadcast(mine / 3),
        'json': parallel.broadcast({'name': 'abc' * mine, 'values': [mine, 2**60]}),
        'refused': refused,
    }))
""")


def test_one_process_needs_nothing(monkeypatch):
    for name in list(os.environ):
        if name.startswith(('EFFJAX_', 'SLURM_', 'OMPI_', 'TPU_')):
            monkeypatch.delenv(name)
    assert parallel.initialize() is False
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1')
    assert parallel.initialize() is False
    assert parallel.initialize('localhost:1', 1, 0) is False
    assert parallel.is_primary()
    value = {'a': 1}
    assert parallel.broadcast(value) is value


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('localhost:1', 2, None), 'EFFJAX_PROCESS_ID; give EFFJAX_PROCESS_ID'),
        (('localhost:1', 2, 2), 'a process id below the number of processes'),
        (('localhost', 2, 0), 'host:port'),
        (('localhost:1', 'two', 0), "must be numbers, got 'two'"),
    ],
)
def test_incomplete_or_senseless(arguments, message, monkeypatch):
    for name in ('EFFJAX_COORDINATOR', 'EFFJAX_PROCESSES', 'EFFJAX_PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        parallel.initialize(*arguments)


@pytest.mark.parametrize(
    'variables',
    [
        {'EFFJAX_COORDINATOR': 'auto'},
        {'SLURM_STEP_NUM_TASKS': '4'},
        {'TPU_WORKER_HOSTNAMES': 'host-0,host-1'},
    ],
)
def test_launchers_that_jax_understands(variables, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **kw: calls.append(kw))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert parallel.initialize() is True
    assert calls == [{}]


def test_processes_that_cannot_be_joined(monkeypatch):
    def fail(**kw):
        raise RuntimeError('deadline exceeded\nmore')

    monkeypatch.setattr(jax.distributed, 'initialize', fail)
    with pytest.raises(DeviceError, match=r'could not be joined: deadline exceeded$'):
        parallel.initialize('localhost:1', 2, 0)


@pytest.mark.process
def test_two_processes(repository):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    workers = []
    for number in range(2):
        flags = '--xla_force_host_platform_device_count=4'
        env = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'XLA_FLAGS': flags,
            'EFFJAX_COORDINATOR': f'localhost:{port}',
            'EFFJAX_PROCESSES': '2',
            'EFFJAX_PROCESS_ID': str(number),
            'PYTHONPATH': str(repository),
        }
        command = [sys.executable, '-c', WORKER]
        workers.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        done = [w.communicate(timeout=150) for w in workers]
    finally:
        for w in workers:
            w.kill()
    results = []
    for worker, (out, err) in zip(workers, done, strict=True):
        assert worker.returncode == 0, err[-2000:]
        # Gloo writes to the same streams, at times into the same line.
        results.append(json.loads(re.search(r'RESULT (\{.*\})', out).group(1)))
    assert sorted(r['rows'] for r in results) == [[0, 4], [4, 8]]
    total = sum(i * sum(range(3 * i, 3 * i + 3)) for i in range(8))
    assert [r['total'] for r in results] == [total, total]
    assert [r['shape'] for r in results] == [[8, 3], [8, 3]]
    assert [r['primary'] for r in results] == [True, False]
    assert [r['float'] for r in results] == [1 / 3, 1 / 3]  # all 64 bits
    assert [r['json'] for r in results] == [{'name': 'abc', 'values': [1, 2**60]}] * 2
    assert all('must use all' in r['refused'] for r in results)
