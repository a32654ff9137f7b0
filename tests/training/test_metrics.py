"""Metrics: each step once, strict JSON, whatever interrupts the run."""

import json
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core.errors import ConfigError
from effjax.training import metrics
from effjax.training.files import write_json_atomic
from effjax.training.metrics import MetricsWriter, last_row


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def write(workdir, *steps, **kw):
    writer = MetricsWriter(workdir, tensorboard=False, **kw)
    for step in steps:
        writer.write({'step': step, 'loss': 1.0 / step})
    writer.close()
    writer.close()


def test_one_object_a_step(tmp_path):
    write(tmp_path / 'new' / 'folder', 1, 2)
    assert rows(tmp_path / 'new' / 'folder') == [
        {'step': 1, 'loss': 1.0},
        {'step': 2, 'loss': 0.5},
    ]


def test_resume_drops_later_steps_and_half_a_line(tmp_path):
    write(tmp_path, 1, 2, 3, 4)
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"step": 2, "lo')  # killed while writing
    assert last_row(tmp_path / 'metrics.jsonl') == {'step': 4, 'loss': 0.25}
    write(tmp_path, 3, 4, 5, resume_step=2)
    assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    write(tmp_path, 1)  # no checkpoint to resume from: a fresh start
    assert [row['step'] for row in rows(tmp_path)] == [1]
    assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


def test_values_are_strict_json(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(
        {
            'step': np.int64(1),
            'loss': float('nan'),
            'norm': jnp.float32(np.inf),
            'lr': np.float32(0.5),
            'rows': jnp.arange(2),
            'eval': {'val': {'loss': np.float64(2.0)}},
            'name': 'warm-up',
            'ok': True,
        }
    )
    writer.close()
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        'step': 1,
        'loss': None,
        'norm': None,
        'lr': 0.5,
        'rows': [0, 1],
        'eval': {'val': {'loss': 2.0}},
        'name': 'warm-up',
        'ok': True,
    }


def test_flushed_on_request_and_after_a_while(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
    writer = MetricsWriter(tmp_path, tensorboard=False, flush_seconds=5.0)
    writer.write({'step': 1})
    assert rows(tmp_path) == []
    writer.flush()
    assert len(rows(tmp_path)) == 1
    writer.write({'step': 2})
    now[0] = 5.0
    writer.write({'step': 3})
    assert len(rows(tmp_path)) == 3
    writer.close()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
    write(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_tensorboard_holds_each_scalar(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2):
        writer.write({'step': step, 'loss': 0.5 * step, 'nan': float('nan'), 'name': 'x'})
    writer.close()
    (file,) = (tmp_path / 'tensorboard').iterdir()
    assert [
        (event.step, {v.tag: v.simple_value for v in event.summary.value})
        for event in _events(file)
        if event.summary.value
    ] == [(1, {'loss': 0.5}), (2, {'loss': 1.0})]
    assert 'tensorflow' not in sys.modules


def _events(path):
    """Yields the events of a file of length-prefixed records (8 + 4 bytes before, 4 after)."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        size = int.from_bytes(content[:8], 'little')
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_wandb_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(
        ConfigError, match=r"needs the wandb package: pip install 'effjax\[wandb\]'"
    ):
        MetricsWriter(tmp_path / 'run', wandb='project')
    assert not (tmp_path / 'run').exists()


def test_wandb_gets_the_rows_and_the_same_run_on_resume(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((step, row['loss']))

        def finish(self):
            calls.append('finish')

    def init(**kw):
        calls.append(kw)
        return Run()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    write(tmp_path, 1, wandb='project', config={'seed': 3})
    write(tmp_path, 2, wandb='project', config={'seed': 3}, resume_step=1)
    first, *log, second, _, _ = calls
    assert log == [(1, 1.0), 'finish']
    assert first == second and first['project'] == 'project' and first['config'] == {'seed': 3}


def test_json_file_is_old_or_new(tmp_path):
    path = tmp_path / 'summary.json'
    write_json_atomic(path, {'loss': float('inf'), 'where': tmp_path, 'steps': (1, 2)})
    assert json.loads(path.read_text()) == {'loss': None, 'where': str(tmp_path), 'steps': [1, 2]}
    with pytest.raises(TypeError, match='object has no form in JSON'):
        write_json_atomic(path, {'bad': object()})
    assert json.loads(path.read_text())['loss'] is None
    assert [p.name for p in tmp_path.iterdir()] == ['summary.json']


def test_a_full_disk_does_not_end_the_training(tmp_path, capfd):
    writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
    writer._file.close()
    writer._file = pathlib.Path('/dev/full').open('w')  # noqa: SIM115 (the writer closes it)
    for step in (1, 2, 3):
        writer.write({'step': step})
        writer.flush()
    writer.close()
    assert capfd.readouterr().err.count('warning: metrics cannot be written (No space left') == 1
