"""`effjax.crossover`: what it measures, where it says a mixer wins, resuming, refusals."""

import concurrent.futures
import json

import jax
import numpy as np
import pytest

from effjax import crossover as command
from effjax.core.command import run_command
from effjax.core.config import as_dict, load
from effjax.study import crossover, crossover_page
from effjax.study.crossover import Point

CONFIG = 'configs/lm.py'
OWN = {'kind': 'attention', 'heads': 2}


def run(tmp_path, *extra, mixers='shaped_attention,attention', lengths='8,16'):
    return command.main(
        [f'--config={CONFIG}', f'--mixers={mixers}', f'--lengths={lengths}', '--steps=3',
         f'--out={tmp_path}', *extra]
    )  # fmt: skip


def test_mixers_are_read_with_their_arguments():
    found = crossover.parse_mixers('shaped_attention, attention(window=4, heads=1),attention', OWN)
    assert found == {
        'shaped_attention': {'kind': 'shaped_attention', 'heads': 2},
        'attention(window=4,heads=1)': {'kind': 'attention', 'heads': 1, 'window': 4},
        'attention': OWN,
    }
    # Another kind takes what it needs of the config's, and nothing else.
    own = {**OWN, 'window': 4}
    assert 'window' not in crossover.parse_mixers('shaped_attention', own)['shaped_attention']


def test_lengths():
    assert crossover.parse_lengths('512:4096') == [512, 1024, 2048, 4096]
    assert crossover.parse_lengths('3:20') == [3, 6, 12]
    assert crossover.parse_lengths('900,100,100') == [100, 900]


def points(**seconds):
    return [
        Point(mixer, length, 1, seconds=value)
        for mixer, by_length in seconds.items()
        for length, value in by_length.items()
    ]


@pytest.mark.parametrize(
    ('mine', 'first', 'words'),
    [
        # Halfway in the logarithm between 0.5x and 2x: 100 * sqrt(2).
        ({100: 2.0, 200: 0.5}, 200, 'from about 141 tokens on (between 100 and 200)'),
        ({100: 0.5, 200: 0.5}, 100, 'at every length measured, 0.50x at 100 tokens'),
        ({100: 0.5, 200: 2.0}, None, '2.00x at 200 tokens, though less at some shorter ones'),
        ({100: 3.0, 200: 2.0}, None, 'at no length from some one on: 2.00x at 200 tokens'),
        ({}, None, 'cannot be compared'),
    ],
)
def test_where_a_mixer_begins_to_win(mine, first, words):
    found = crossover.crossing(points(a=mine, b={100: 1.0, 200: 1.0}), 'a', 'b')
    assert found[0] == first and words in found[1]


@pytest.mark.ci
def test_what_is_measured_of_a_layer(tmp_path, capsys):
    assert run(tmp_path) == 0
    saved = json.loads((tmp_path / 'crossover.json').read_text())
    found = {(p['mixer'], p['length']): p for p in saved['points']}
    assert set(found) == {(m, n) for m in ('shaped_attention', 'attention') for n in (8, 16)}
    config = as_dict(load(CONFIG, []))
    for (mixer, length), point in found.items():
        assert point['batch'] == 16 // length
        assert point['seconds'] > 0 and point['forward_seconds'] > 0 and not point['error']
        assert point['peak_bytes'] > 0 and 'attention=' in point['ran']
        layer = crossover.Layer(mixer, {**OWN, 'kind': mixer}, config, length, 16 // length)
        assert point['flops'] == layer.flops and point['state_bytes'] == layer.state_bytes
    # Projections 4 * 64^2, scores and values over T (T + 1) / 2 pairs, forward and backward.
    assert found['attention', 8]['flops'] == 3 * 2 * (16 * 4 * 64**2 + 2 * 2 * 36 * 64)
    page = capsys.readouterr().out
    assert 'does not carry over to an accelerator' in page
    assert '**shaped_attention** takes less memory than attention' in page
    assert (tmp_path / 'crossover.md').read_text() in page
    for name in ('time', 'memory', 'state'):
        assert (tmp_path / f'{name}.svg').read_text().count('<path class="line') >= 1


def test_the_step_is_forward_and_all_gradients():
    config = as_dict(load(CONFIG, ['precision.kind=fp32']))
    layer = crossover.Layer('attention', OWN, config, 8, 2)
    layer.trace()
    layer.compile()
    layer.place()
    y, (dparams, dx) = layer._both(*layer._args)
    params, buffers, x, dy = layer._args
    assert y.shape == dx.shape == (2, 8, 64)
    assert jax.tree.structure(dparams) == jax.tree.structure(params)
    # Against a difference along a random direction of the input, in float32: 1e-2 of the value.
    t = jax.random.normal(jax.random.key(7), x.shape)
    ahead, behind = (layer._forward(params, buffers, x + s * t) for s in (1e-2, -1e-2))
    slope = float(((ahead - behind) * dy).sum() / 2e-2)
    np.testing.assert_allclose(float((dx * t).sum()), slope, rtol=1e-2)


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    assert run(tmp_path, lengths='8') == 0
    measured = []
    real = crossover.prepare

    def watch(config, mixers, length, tokens, pool):
        measured.append(length)
        return real(config, mixers, length, tokens, pool)

    monkeypatch.setattr(crossover, 'prepare', watch)
    assert run(tmp_path, '--tokens=8', lengths='8,16') == 0
    assert measured == [16]


def test_what_does_not_fit_is_said(monkeypatch):
    config = as_dict(load(CONFIG, []))
    mixers = crossover.parse_mixers('shaped_attention,attention', OWN)
    real = crossover.Layer.compile

    def compile_(self):
        if self.label == 'attention':
            raise MemoryError
        real(self)

    monkeypatch.setattr(crossover.Layer, 'compile', compile_)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ready = crossover.prepare(config, mixers, 8, 8, pool)
    found = {p.mixer: p for p in crossover.measure(ready, steps=3)}
    assert found['shaped_attention'].seconds and found['attention'].seconds is None
    assert 'does not fit into the memory of' in found['attention'].error
    wanted = command.conditions(config, mixers, 8, 3)
    page = crossover_page.render(wanted, list(found.values()), 'attention')
    assert 'attention at 8 tokens: does not fit' in page and 'cannot be compared' in page


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'mixers': 'retnot'}, "unknown mixer 'retnot'"),
        ({'mixers': 'attention(width=3)'}, "takes no 'width'"),
        ({'mixers': 'attention(3)'}, 'write NAME or NAME(ARGUMENT=VALUE'),
        ({'mixers': ''}, '--mixers takes names and arguments'),
        ({'mixers': 'attention,attention'}, 'twice'),
        ({'mixers': 'attention(heads=7)'}, 'heads'),
        ({'lengths': '0:8'}, '--lengths takes LOW:HIGH'),
        ({'lengths': 'long'}, '--lengths takes LOW:HIGH'),
    ],
)
def test_bad_input(tmp_path, capsys, changes, message):
    args = {'mixers': 'attention', 'lengths': '8', **changes}
    argv = [f'--config={CONFIG}', *(f'--{k}={v}' for k, v in args.items()), f'--out={tmp_path}']
    assert run_command(command.main, argv) == 1
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
    assert not (tmp_path / 'crossover.json').exists()


def test_points_of_other_conditions_are_refused(tmp_path, capsys):
    run(tmp_path, lengths='8')
    argv = [f'--config={CONFIG}', '--mixers=attention', '--lengths=8', '--steps=3']
    assert run_command(command.main, [*argv, f'--out={tmp_path}']) == 1
    assert 'holds points with another mixers; give' in capsys.readouterr().err
    assert run_command(command.main, [*argv, '--steps=4', f'--out={tmp_path}']) == 1
    assert 'holds points with another steps (3, now 4), mixers;' in capsys.readouterr().err
    (tmp_path / 'crossover.json').write_text('{')
    assert run_command(command.main, [*argv, f'--out={tmp_path}']) == 1
    assert 'is damaged; delete it' in capsys.readouterr().err
