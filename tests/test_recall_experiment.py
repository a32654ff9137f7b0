"""The recall sweep: every model builds, a small cell trains, results resume, the page says it."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models, parallel
from effjax.core.config import as_dict
from effjax.core.info import SeqInfo
from effjax.training.runtime import Runtime
from experiments.recall import page, peer, run
from experiments.recall.cells import (
    HIDDEN,
    LENGTHS,
    MIXERS,
    PUBLISHED,
    VARIANTS,
    WIDTHS,
    Cell,
    configs,
    order,
)
from experiments.recall.claims import Claims
from experiments.recall.train import Lanes

GOLDEN = pathlib.Path(__file__).parent / 'golden'


@pytest.mark.parametrize('mixer', [*MIXERS, *VARIANTS])
def test_every_model_builds(mixer):
    made = configs(Cell(mixer, 64, 64), rows=1000, held_out=64, epochs=2)
    runtime = Runtime(made[0])
    assert runtime.config['model']['vocab_size'] == 8192
    assert runtime.config['task']['queries'] == 4
    assert [c.schedule.peak for c in made] == pytest.approx(
        [1e-4, 4.64e-4, 2.15e-3, 1e-2], rel=1e-2
    )
    # No feed-forward parts: a layer is little beside the embedding of 8192 x 64.
    layers = 4 if mixer.endswith('_deep') else 2
    assert 0 < runtime.params - 8192 * 64 < layers * 55_000


def test_the_protocol():
    (config, *_) = configs(Cell('attention', 256, 128))
    assert (config.batch_size, config.steps) == (256, 25_000)  # 64 epochs of 100,000 rows
    assert config.data.to_dict() == {
        'kind': 'mqar', 'seq_len': 256, 'pairs': 16, 'train': 100_000, 'valid': 3_000
    }  # fmt: skip
    assert configs(Cell('attention', 64, 128))[0].batch_size == 512
    cells = order()
    assert len(cells) == len(set(cells)) == len(MIXERS) * 9
    published = [c.published is not None for c in cells]
    assert published == sorted(published, reverse=True) and sum(published) == 45
    assert all(Cell(*h).published is not None for h in HIDDEN)
    assert set(PUBLISHED) < set(MIXERS) and not set(VARIANTS) & set(MIXERS)
    assert order(['hyena_small'])[0] == Cell('hyena_small', 64, 64)


SMALL = {'rows': 1200, 'held_out': 64, 'epochs': 2, 'vocab_size': 64}


@pytest.mark.ci
def test_a_cell_trains_and_ends_early(tmp_path, monkeypatch, capsys):
    cell = Cell('base_conv', 16, 64)
    lanes = Lanes(configs(cell, **SMALL), 2)
    assert lanes.steps == 3  # 1200 rows in batches of 512: the last is filled up
    row = run.run_cell(lanes, cell)
    assert row['steps'] == row['of_steps'] == 6 and not row['diverged']
    assert set(row['by_rate']) == {'1.00e-04', '4.64e-04', '2.15e-03', '1.00e-02'}
    assert row['accuracy'] == max(row['by_rate'].values()) and row['state_bytes'] > 0
    monkeypatch.setattr(run, 'ENOUGH', -1.0)  # of which the first evaluation is enough
    assert run.run_cell(lanes, cell)['steps'] == 3
    monkeypatch.setattr(run, 'ENOUGH', 0.99)
    assert run.run_cell(lanes, cell, until=0.0) is None
    # What is done is not made again, and a torn last line is left out.
    file = tmp_path / 'cells.jsonl'
    file.write_text(json.dumps({**row, 'length': 64}) + '\n{"mixer"')
    argv = ['run', '--mixers=base_conv', '--lengths=64', '--widths=64', f'--results={tmp_path}']
    monkeypatch.setattr(run, 'Lanes', lambda *a, **kw: pytest.fail('made again'))
    monkeypatch.setattr('sys.argv', argv)
    run.main()
    assert '| base_conv | 64 |' in capsys.readouterr().out


def row(mixer, length, width, accuracy):
    return {
        'mixer': mixer, 'length': length, 'width': width, 'accuracy': accuracy,
        'by_rate': {'1.00e-04': accuracy, '1.00e-02': 0.0}, 'diverged': ['1.00e-02'],
        'steps': 100, 'of_steps': 12500, 'state_bytes': 1000 * width, 'device': 'cpu',
    }  # fmt: skip


def test_the_page(tmp_path):
    rows = [row('hyena', 64, 64, 0.5), row('hyena', 128, 64, 0.5), row('mamba', 64, 128, 0.9)]
    text = page.write(rows, tmp_path)
    assert '| hyena | 64 | 0.50 / 0.52 / -0.02 | not run / 0.75 | not run / 0.84 |' in text
    assert '| hyena | 128 | 0.50 / ~0.20 / +0.30 |' in text
    assert '| mamba | 64 | not run | 0.90 | not run |' in text
    assert page.far(rows) == [
        'hyena, N = 128, d = 64: 0.50 against 0.20 (its marker is half hidden in the figure)'
    ]
    assert '| mamba | 64 | 128 | 0.900 | diverged | 100 of 12,500 |' in text
    assert f'3 of {len(MIXERS) * len(LENGTHS) * len(WIDTHS)} cells, on cpu' in text
    assert (tmp_path / 'results.md').read_text() == text
    assert 'hyena' in (tmp_path / 'state.svg').read_text()


def test_a_sweep_appends_each_cell_and_leaves_out_what_would_be_late(tmp_path, monkeypatch):
    results = {'base_conv': {**row('base_conv', 64, 64, 0.5), 'seconds': 1.0}, 'hyena': None}
    monkeypatch.setattr(run, 'Lanes', lambda configs, epochs: configs[0].name)
    monkeypatch.setattr(run, 'run_cell', lambda lanes, cell, until: results[cell.mixer])
    cells, file = [Cell(m, 64, 64) for m in ('hyena', 'base_conv')], tmp_path / 'cells.jsonl'
    run.sweep(cells, file, float('inf'), **SMALL)
    assert [r['mixer'] for r in run.read(file)] == ['base_conv']
    assert not [*(tmp_path / 'claims').iterdir()]
    run.sweep(cells, file, 0.0, **SMALL)  # time is up
    assert len(run.read(file)) == 1


def test_processes_share_the_cells(tmp_path, monkeypatch):
    cells = [Cell(m, 64, 64) for m in ('hyena', 'base_conv', 'h3')]
    claims = Claims(tmp_path / 'claims')
    assert claims.take(cells[0]) and not claims.take(cells[0])
    with subprocess.Popen([sys.executable, '-c', '']) as dead:
        pass
    (tmp_path / 'claims' / 'base_conv-64-64').symlink_to(str(dead.pid))
    made = []
    monkeypatch.setattr(run, 'Lanes', lambda configs, epochs: configs[0].name)
    monkeypatch.setattr(run, 'run_cell', lambda lanes, cell, until: made.append(cell))
    run.sweep(cells, tmp_path / 'cells.jsonl', float('inf'), **SMALL)
    assert made == cells[1:]  # the first is at work here, the second's process is dead
    assert [f.name for f in (tmp_path / 'claims').iterdir()] == ['hyena-64-64']
    claims.release(cells[0])
    run.sweep(cells[:1], tmp_path / 'cells.jsonl', float('inf'), **SMALL)
    assert made[2:] == cells[:1]


def test_the_peer_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    with pytest.raises(SystemExit, match='experiments.recall.peer needs PyTorch'):
        peer.main(['--mixer', 'hyena'])


@pytest.mark.ci
@pytest.mark.parametrize('mixer', ['base_conv', 'hyena'])
def test_models_are_those_of_the_peer(mixer):
    """Two whole models with the peer's weights, by the mapping of golden/make_mqar.py."""
    with np.load(GOLDEN / 'mqar.npz') as file:
        golden = {k.split('/', 1)[1]: v for k, v in file.items() if k.startswith(f'{mixer}/')}
    (config, *_) = configs(Cell(mixer, 64, 8), rows=512, held_out=64, epochs=2, vocab_size=64)
    runtime = Runtime(as_dict(config))
    with parallel.mesh_context(runtime.mesh, runtime.rules):
        state = runtime.initial_state()

        def place(path, leaf):
            ours = golden.pop('params/' + '/'.join(str(k.key) for k in path))
            return jnp.asarray(ours).reshape(leaf.shape)  # layers are stacked: one a segment

        params = jax.tree_util.tree_map_with_path(place, state['params'])
        model = models.merge(runtime.built.graphdef, {**state, 'params': params})
        tokens, at = (jnp.asarray(golden.pop(n)) for n in ('tokens', 'at'))
        hidden, _ = model(tokens, SeqInfo.of(*tokens.shape))
        hidden = jnp.take_along_axis(hidden, at[..., None], axis=1)
        got = hidden @ params['embedding']['table'].T
    # float32 on both sides, logits up to 10, through products of activations.
    np.testing.assert_allclose(got, golden.pop('logits'), atol=1e-4)
    assert not golden
