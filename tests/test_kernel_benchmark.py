"""The benchmark of kernels runs everything it names, tiny, and says what is wrong or missing."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.kernels import cases, run


@pytest.mark.ci
def test_tiny_shapes_on_a_cpu(tmp_path, capsys):
    out = tmp_path / 'rows.json'
    run.main(['--small', '--calls', '1', '--rounds', '1', '--out', str(out)])
    rows = json.loads(out.read_text())['rows']
    assert [row['case'] for row in rows] == [case.name for case in cases.SMALL]
    for row in rows:
        assert 0 < row['floor'][0] < row['floor'][1]
    *rows, experts = rows
    for row in rows:
        ours = row['programs']['effjax']
        assert ours['ran'] == 'xla' and ours['error_of_gradients'] < 1e-6
    programs = experts['programs']
    assert {'forward', 'whole'} == set(programs['xla']) == set(programs['one dense product'])
    assert 'it needs a Hopper GPU, not cpu' in programs['pallas_gpu']['error']
    scans = [row for row in rows if 'scan' in row['case']]
    others = [row['programs'].get('associative_scan') for row in scans]
    assert len(others) == 2
    assert all(found['error_of_gradients'] < run.BOUND for found in others)
    text = capsys.readouterr().out
    assert '| **scalar decay 1,64,2,16,16** | floor |' in text and '**wrong**' not in text


def test_a_wrong_result_is_marked():
    found = {'forward': 1.0, 'whole': 2.0, 'error_of_output': 0.5, 'error_of_gradients': 0.0}
    row = {'case': 'x', 'floor': [0.5, 1.0], 'programs': {'a': found, 'b': {'error': 'no GPU'}}}
    first, second, third = run.lines(row)
    assert '50% / 50%' in second and '**wrong**' in second and 'no GPU' in third and 'x' in first
    assert run.distance([jnp.ones(2)], [jnp.full(2, 2.0)]) == 0.5


def test_decays_that_nothing_trains_are_no_input():
    """They are RetNet's, and have no gradient that a floor could count."""
    fixed, scalar = (cases.recurrence(kind, 1, 64, 4, 16, 8) for kind in ('fixed', 'scalar'))
    assert scalar.bytes()[0] - fixed.bytes()[0] == 64 * 4 * 4 and fixed.flops == scalar.flops
    np.testing.assert_allclose(np.exp(fixed.context['log_decay'][:2]), [31 / 32, 63 / 64], 1e-6)


def test_floors_of_the_delta_rule():
    """Pairs of a chunk's tokens, a solve that is half a product, and the state's products."""
    case = cases.delta(1, 64, 1, 16, 8)
    pairs, solve, state = 2 * 64 * 64, 64 * 64 * 8, 2 * 64 * 16 * 8
    assert case.flops[0] == pairs * (2 * 16 + 8) + solve + 3 * state
    assert case.flops[1] == pairs * (6 * 16 + 3 * 8) + solve + 6 * state


def test_floors_count_each_array_once():
    case = cases.recurrence('scalar', 2, 64, 4, 16, 8)
    tokens = 2 * 64 * 4
    inputs, out = tokens * (2 * 2 * 16 + 2 * 8 + 4), tokens * 2 * 8
    assert case.bytes() == (inputs + out, 2 * inputs + out)
    assert case.flops[0] == tokens * (2 * 64 * (16 + 8) + 4 * 16 * 8)
