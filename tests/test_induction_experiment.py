"""The induction experiment: every mixer's run builds, pieces equal the whole, results are kept."""

import json

import jax
import pytest

from effjax.core.config import as_dict
from experiments.induction import run


@pytest.mark.parametrize('name', run.MIXERS)
def test_every_run_builds(name):
    from effjax.training.runtime import Runtime

    runtime = Runtime(as_dict(run.config_of(name, 10, 8, 2**14)))
    assert runtime.built.model.max_len == 2**14
    assert runtime.config['task']['queries'] == 1


@pytest.mark.ci
def test_it_trains_small_and_pieces_equal_the_whole(tmp_path, capsys):
    argv = ['--mixers=mamba', '--steps=3', '--batch=4', '--lengths', '16', '40', '--rows=32',
            '--data={"seq_len": 16, "vocab_size": 6}', f'--out={tmp_path}']  # fmt: skip
    run.main([*argv, '--piece=64'])
    file = tmp_path / 'mamba' / 'result.json'
    whole = json.loads(file.read_text())
    assert set(whole['tested']) == {'16', '40'} and whole['rows_seen'] == 12
    run.main([*argv, '--piece=64'])  # is not trained again
    assert json.loads(file.read_text()) == whole
    file.unlink()
    run.main([*argv, '--piece=7'])  # the run goes on from its end: the same model
    assert json.loads(file.read_text())['tested'] == whole['tested']
    assert '| mamba | 12 |' in capsys.readouterr().out
    jax.clear_caches()
