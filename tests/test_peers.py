"""experiments/benchmarks/train_step: our side and its peers, at shapes that a CPU runs."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest

from effjax import models
from effjax.core import trees
from experiments.benchmarks.train_step import ours, run
from experiments.benchmarks.train_step.peers import fla, jla
from experiments.benchmarks.train_step.shapes import SHAPES, having

FLA = {  # parameters of fla 0.6.0's models, counted on torch's meta device
    'retnet_380m': 380_171_264,
    'gla_380m': 374_475_776,
    'mamba2_380m': 382_387_712,
    'retnet_smoke': 32_992,
    'gla_smoke': 26_336,
    'mamba2_smoke': 36_472,
}


def start_peer(repository, name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, '-m', f'experiments.benchmarks.train_step.peers.{name}']
    return subprocess.run(
        [*command, *arguments, '--steps=2'], cwd=repository, capture_output=True, text=True
    )


def run_peer(repository, name: str) -> dict:
    done = start_peer(repository, name, '--smoke')
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('name', ['plain_jax', 'hf'])
def test_peer_trains_the_shape_it_says(repository, name):
    if name == 'hf' and not importlib.util.find_spec('transformers'):
        pytest.skip("needs the 'hf' extra, which CI does not install")
    result = run_peer(repository, name)
    # ln 64 = 4.16 is the loss of a model that knows nothing; random tokens teach little.
    assert 0 < result['loss'] < 4.3
    assert result['params'] == 24736
    assert result['tok_s'] > 0
    assert len(result['rounds_s']) == 5


@pytest.mark.ci
@pytest.mark.parametrize('mixer', ['retnet', 'mamba2'])
def test_our_recurrent_models_train(mixer):
    shape = SHAPES[f'{mixer}_smoke']
    result = ours.bench(shape, steps=1, rounds=1)
    assert 0 < result['loss'] < 4.3
    assert result['params'] == shape.params
    assert result['tok_s'] > 0


@pytest.mark.parametrize('name', FLA)
def test_our_models_hold_as_many_parameters_as_flas(name):
    shape = SHAPES[name]
    built = models.build(ours.config_of(shape))
    assert trees.count(built.abstract_state['params']) == shape.params
    assert shape.params == pytest.approx(FLA[name], rel=0.01)


@pytest.mark.parametrize('name', [n for n in SHAPES if n.endswith('_long')])
def test_a_long_shape_is_the_same_model_on_as_many_tokens(name):
    long, short = SHAPES[name], SHAPES[name.removesuffix('_long')]
    assert (long.batch, long.length) == (2, 16384)
    assert long.tokens == short.tokens
    assert dataclasses.replace(long, batch=short.batch, length=short.length) == short


def test_recurrent_peers_compile(repository):
    folder = repository / 'experiments' / 'benchmarks' / 'train_step' / 'peers'
    for path in folder.glob('*.py'):
        compile(path.read_text(), str(path), 'exec')


@pytest.mark.parametrize('name', ['fla', 'jla'])  # of the peer, and of its package
def test_a_recurrent_peer_says_what_it_lacks(repository, name):
    if importlib.util.find_spec(name):
        pytest.skip(f'{name} is installed')
    for mixer in ('retnet', 'mamba2'):
        done = start_peer(repository, name, f'--shape={mixer}_smoke')
        assert done.returncode == 1
        assert done.stderr.startswith(f'{name}: needs ')
        assert 'No module named' in done.stderr
        assert 'Traceback' not in done.stderr


@pytest.mark.parametrize('name', ['plain_jax', 'hf'])
def test_a_llama_refuses_recurrent_shapes(repository, name):
    done = start_peer(repository, name, '--shape=retnet_smoke')
    assert done.returncode == 2
    assert "invalid choice: 'retnet_smoke'" in done.stderr


def test_programs_are_modules_here(repository):
    folder = repository / 'experiments' / 'benchmarks' / 'train_step'
    for program in run.PROGRAMS.values():
        assert (folder / (program.module.replace('.', '/') + '.py')).exists()
    assert fla.MIXERS == jla.MIXERS == run.RECURRENT


def test_a_program_without_a_form_of_a_shape_is_skipped():
    assert run.skips('effjax', 'retnet_380m') is None
    assert run.skips('hf', '374m_long') is None
    assert run.skips('hf', 'gla_380m') == 'gla_380m hf: skipped, it has attention and no gla'
    why = run.skips('fla', '374m_long')
    assert why == '374m_long fla: skipped, it has retnet, gla, mamba2 and no attention'
    assert set(having('attention', *run.RECURRENT)) == set(SHAPES)


def result(tok_s: float, params: int, peak: int | None = 2**31) -> dict:
    return {
        'tok_s': tok_s,
        'step_s': 32768 / tok_s,
        'rounds_s': [32768 / tok_s] * 2,
        'peak_bytes': peak,
        'params': params,
    }


def test_the_table_has_both_ratios_and_both_counts():
    found = {
        'retnet_380m_long': {
            'effjax': result(200e3, 380_158_976),
            'fla': result(160e3, 380_171_264, None),
        },
        '374m_long': {'effjax': result(100e3, 374_000_000)},
        'gla_380m': {'fla': result(50e3, 374_475_776)},
    }
    head, rule, ours_, fla_, attention, alone = run.table(found).splitlines()
    assert head.count('|') == rule.count('|') == ours_.count('|')
    assert ours_ == (
        '| retnet_380m_long | effjax | 200,000 | 163.8 (163.8, 163.8) | 2.0 | 380,158,976 | 1.000 '
        '| 2.000 |'
    )
    assert fla_.endswith('|  | 380,171,264 | 1.250 |  |')
    assert attention.endswith('| 1.000 |  |')
    assert alone.endswith('| 374,475,776 |  |  |')  # ours did not run
