"""One config on several meshes: the same data, the same losses; two real processes too."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from effjax import train

MESHES = {
    'one device': {'data': 1},
    'data 8': {'data': 8},
    'fsdp 8': {'data': 1, 'fsdp': 8},
    'fsdp 4 x tensor 2': {'data': 1, 'fsdp': 4, 'tensor': 2},
}


def losses(folder: pathlib.Path) -> list[float]:
    return [json.loads(line)['loss'] for line in (folder / 'metrics.jsonl').open()]


def config_on(tiny, mesh: dict[str, int], **changes):
    return tiny(*[f'mesh.{axis}={n}' for axis, n in mesh.items()], **changes)


@pytest.mark.mesh
def test_what_is_not_sharded_is_said(tiny, tmp_path, capfd):
    config = config_on(tiny, {'data': 1, 'tensor': 4}, steps=1, evals={})  # of two heads
    config.log.progress = True
    sharding = train.run(config, tmp_path).summary['sharding']
    assert sharding['mesh']['tensor'] == 4
    assert any("axis 'heads' is not sharded over 'tensor'" in why for why in sharding['fell_back'])
    told = capfd.readouterr().err
    assert f'sharding fell back in {len(sharding["fell_back"])} places: ' in told
    assert 'in summary.json' in told


@pytest.mark.mesh
def test_losses_do_not_depend_on_the_mesh(tiny, tmp_path):
    assert jax.device_count() == 8
    found, evals, flops = {}, {}, {}
    for name, mesh in MESHES.items():
        run = train.run(config_on(tiny, mesh), tmp_path / name)
        found[name] = losses(run.workdir)
        evals[name] = run.summary['eval']['valid']['loss']
        flops[name] = run.summary['ledger']['model_flops']
    for name in MESHES:
        # float32 sums in another order, amplified over six steps of training.
        np.testing.assert_allclose(found[name], found['one device'], rtol=2e-5, err_msg=name)
        np.testing.assert_allclose(evals[name], evals['one device'], rtol=2e-5, err_msg=name)
        assert flops[name] == flops['one device']


@pytest.mark.mesh
def test_accumulation_and_documents_on_a_mesh(tiny, tmp_path):
    one = train.run(config_on(tiny, {'data': 1}, batch_size=16, accumulate=2), tmp_path / 'one')
    many = train.run(
        config_on(tiny, {'data': 2, 'fsdp': 4}, batch_size=16, accumulate=2), tmp_path / 'many'
    )
    np.testing.assert_allclose(losses(many.workdir), losses(one.workdir), rtol=2e-5)


@pytest.mark.mesh
def test_a_run_goes_on_on_another_mesh(tiny, tmp_path):
    whole = train.run(config_on(tiny, {'data': 8}), tmp_path / 'whole')
    cut = tmp_path / 'cut'
    train.run(
        config_on(
            tiny, {'data': 8}, steps=3, schedule={'kind': 'constant', 'peak': 1e-2, 'warmup': 0.0}
        ),
        cut,
    )
    again = config_on(
        tiny,
        {'data': 1, 'fsdp': 4, 'tensor': 2},
        schedule={'kind': 'constant', 'peak': 1e-2, 'warmup': 0.0},
    )
    done = train.run(again, cut)
    straight = train.run(
        config_on(tiny, {'data': 8}, schedule={'kind': 'constant', 'peak': 1e-2, 'warmup': 0.0}),
        tmp_path / 'straight',
    )
    assert whole.summary['final_step'] == done.summary['final_step'] == 6
    np.testing.assert_allclose(losses(cut), losses(straight.workdir), rtol=2e-5)


@pytest.mark.mesh
def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path):
    from effjax.core.errors import ConfigError

    with pytest.raises(ConfigError, match=r'config.batch_size 6 is not divisible by the 8 devices'):
        train.run(config_on(tiny, {'data': 8}, batch_size=6), tmp_path)


SCRIPT = """
import sys
from effjax import train
from effjax.core import config as config_lib
train.run(config_lib.load(sys.argv[1]), sys.argv[2])
"""

CONFIG = """
from effjax.core.config import defaults

def get_config():
    config = defaults()
    config.steps = 6
    config.batch_size = 8
    config.seq_len = 32
    config.data = dict(kind='text', path={words!r}, tokenizer=dict(kind='byte'))
    config.model = dict(kind='decoder', width=16, layers=2, mixer=dict(kind='attention', heads=2),
                        ffn=dict(kind='swiglu', hidden=32))
    config.schedule = dict(kind='linear', peak=1e-2, warmup=0.1)
    config.precision.kind = 'fp32'
    config.mesh.fsdp = 2
    config.checkpoint.every_steps = 3
    config.log.tensorboard = False
    config.evals.valid = dict()
    return config
"""


@pytest.mark.process
def test_two_processes_equal_one(words, tmp_path):
    config = tmp_path / 'two.py'
    config.write_text(CONFIG.format(words=str(words)))
    flags = '--xla_force_host_platform_device_count='

    def start(folder: str, devices: int, extra: dict[str, str]) -> subprocess.Popen:
        env = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'{flags}{devices}', **extra}
        line = [sys.executable, '-c', SCRIPT, str(config), str(tmp_path / folder)]
        return subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    shared = {'EFFJAX_COORDINATOR': f'localhost:{port}', 'EFFJAX_PROCESSES': '2'}
    both = [start('two', 2, {**shared, 'EFFJAX_PROCESS_ID': str(i)}) for i in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=150)
        assert process.returncode == 0, out.decode()[-3000:]
    one = start('one', 4, {})
    out, _ = one.communicate(timeout=150)
    assert one.returncode == 0, out.decode()[-3000:]
    # Another order of the sums in the collectives.
    np.testing.assert_allclose(losses(tmp_path / 'two'), losses(tmp_path / 'one'), rtol=2e-5)
    two, single = (
        json.loads((tmp_path / name / 'summary.json').read_text()) for name in ('two', 'one')
    )
    assert two['environment']['processes'] == 2
    np.testing.assert_allclose(
        two['eval']['valid']['loss'], single['eval']['valid']['loss'], rtol=2e-5
    )
