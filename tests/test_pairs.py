"""The table of pairs: complete, current, what it says is so, and rows are put together honestly."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import random
import subprocess
import sys

import pytest

from effjax import methods
from effjax.core.errors import ConfigError, StudyError
from effjax.study import pairs

METHODS = methods.load()
PAIRS = pairs.load()


@pytest.fixture(scope='module')
def tool(repository):
    spec = importlib.util.spec_from_file_location('pairs', repository / 'tools' / 'pairs.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(*config: str, base: str = pairs.PLAIN, name: str = 'x') -> methods.Method:
    return methods.Method(name, 't', 'p', base, config, (), (), '')


# ---- the stored table --------------------------------------------------------------------------


def test_every_pair_has_a_current_entry(tool):
    wanted = list(tool.every_pair(METHODS))
    assert list(PAIRS) == wanted, 'run: python tools/pairs.py'
    stale = [k for k in wanted if PAIRS[k].digest != pairs.digest(*(METHODS[n] for n in k))]
    assert not stale, 'run: python tools/pairs.py'


def test_no_pair_is_broken_and_every_other_one_has_a_reason():
    assert {pair.state for pair in PAIRS.values()} <= {'works', 'refused', 'untested'}
    assert all(bool(pair.reason) == (pair.state != 'works') for pair in PAIRS.values())


def test_the_page_is_current(tool):
    assert tool.TARGET.read_text() == tool.page(METHODS, PAIRS), 'run: python tools/pairs.py'


@pytest.mark.ci
def test_which_pairs_fit_one_config_is_still_so(repository):
    """All pairs: which are untested, and which a base config refuses, needs no model."""
    for key, pair in PAIRS.items():
        combined, outcome = pairs.judge(METHODS[key[0]], METHODS[key[1]], repository)
        assert (outcome or combined.config) and (
            not outcome or outcome == (pair.state, pair.reason)
        )


def sample(state: str, count: int) -> list[tuple[str, str]]:
    keys = [key for key, pair in PAIRS.items() if pair.state == state]
    return random.Random(0).sample(keys, min(count, len(keys)))


@pytest.mark.parametrize('key', sample('works', 8) + sample('refused', 8), ids=' + '.join)
def test_a_pair_builds_or_is_refused_as_stored(key, repository):
    combined, outcome = pairs.judge(METHODS[key[0]], METHODS[key[1]], repository)
    assert (outcome or pairs.build(combined.config)) == (PAIRS[key].state, PAIRS[key].reason)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
@pytest.mark.parametrize(
    'key',
    [
        ('palm', 'albert'),
        ('simplified-block', 'mixed-precision'),
        ('bpe', 'autoregressive-decoding'),
        ('kv-cache', 'llama'),
        ('positional-encoding', 'vit'),
    ],
    ids=' + '.join,
)
def test_a_pair_trains_or_is_refused_as_stored(key, repository, tmp_path):
    combined, outcome = pairs.judge(METHODS[key[0]], METHODS[key[1]], repository)
    found = outcome or pairs.attempt(combined.config, tmp_path)
    assert found == (PAIRS[key].state, PAIRS[key].reason)


# ---- putting rows together ---------------------------------------------------------------------


def test_lines_of_both_rows_are_in_the_config(repository):
    block = row("model.mixer={'kind': 'attention', 'heads': 1}")
    for rows in ((block, row('model.mixer.kv_heads=1')), (row('model.mixer.kv_heads=1'), block)):
        config = pairs.combine(rows, repository).config
        assert config['model']['mixer'] == {'kind': 'attention', 'heads': 1, 'kv_heads': 1}
    other = row("model.mixer={'kind': 'attention', 'window': 4}")
    config = pairs.combine((block, other), repository).config
    assert config['model']['mixer'] == {'kind': 'attention', 'heads': 1, 'window': 4}


def test_a_value_that_equals_the_base_configs_still_counts(repository):
    rows = row('model.mixer.heads=2'), row("model.mixer={'kind': 'attention', 'heads': 1}")
    combined = pairs.combine(rows, repository)
    assert combined.config is None
    assert combined.reason == 'both set config.model.mixer.heads: 2 and 1'


def test_a_key_inside_what_the_other_replaces(repository):
    rows = row('checkpoint.every_steps=1'), row('model.positions=None')
    assert pairs.combine(rows, repository).config['model']['positions'] is None
    rows = row("model.positions={'kind': 'rope'}"), row('model.positions=None')
    reason = 'one sets config.model.positions.kind, the other replaces what holds it'
    assert pairs.combine(rows, repository).reason == reason
    assert pairs.combine(rows[::-1], repository).reason == reason


@pytest.mark.parametrize(
    'first, second, base',
    [
        (row(), row('ema=0.9'), 'lm'),
        (row('ema=0.9'), row(base='configs/digits_vit.py'), 'digits_vit'),
        (row('ema=0.9'), row('clip_norm=2.0', base='configs/shapes.py:gpt2'), 'shapes_gpt2'),
        (row(), row('clip_norm=2.0', base='configs/shapes.py:gpt2'), 'lm'),
    ],
)
def test_lines_are_carried_to_the_base_that_is_fixed(first, second, base, repository):
    for rows in ((first, second), (second, first)):
        config = pairs.combine(rows, repository).config
        assert config['name'] == base
        assert config['ema'] == (0.9 if 'ema=0.9' in first.config + second.config else 0)


def test_two_base_configs_are_not_in_one_run(repository):
    rows = row(), row(base='configs/digits_vit.py')
    reason = 'configs/lm.py and configs/digits_vit.py are two base configs, and a run has one'
    assert pairs.combine(rows, repository) == pairs.Combined(None, reason)


def test_a_line_that_the_model_would_not_read_is_not_called_tested(repository):
    rows = row('model.mixer.kv_heads=1'), row(base='configs/shapes.py:gpt3')
    assert pairs.combine(rows, repository).reason.endswith('does not read config.model.mixer')
    rows = row('model.block=parallel'), row(base='configs/shapes.py:gpt3')
    assert pairs.combine(rows, repository).config['model']['block'] == 'parallel'


def test_a_refusal_is_its_sentence_and_a_bug_is_no_refusal(repository, monkeypatch, tmp_path):
    state, reason = pairs.build(pairs.combine([row('model.mixer.heads=3')], repository).config)
    assert state == 'refused' and 'heads' in reason and '\n' not in reason
    config = pairs.combine([row()], repository).config
    monkeypatch.setattr('effjax.training.loop.Trainer.run', lambda self: 1 / 0)
    found = pairs.attempt(config, tmp_path)
    assert found == ('broken', 'ZeroDivisionError: division by zero')


def test_a_signal_stops_more_than_one_run(repository, monkeypatch, tmp_path):
    config = pairs.combine([row()], repository).config
    monkeypatch.setattr('effjax.training.loop.Trainer.run', lambda self: 'SIGINT')
    with pytest.raises(KeyboardInterrupt):
        pairs.attempt(config, tmp_path)


# ---- the generator -----------------------------------------------------------------------------


def test_the_generator_goes_on_where_it_was(tool, monkeypatch, tmp_path):
    rows = {name: METHODS[name] for name in ('transformer', 'palm', 'vit')}
    ran = []

    def attempt(config, folder):
        ran.append(config['model']['kind'])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return 'works', ''

    monkeypatch.setattr(tool.methods, 'load', lambda: rows)
    monkeypatch.setattr(tool.pairs_lib, 'attempt', attempt)
    monkeypatch.setattr(tool.pairs_lib, 'FILE', tmp_path / 'pairs.json')
    monkeypatch.setattr(tool, 'TARGET', tmp_path / 'pairs.md')
    with pytest.raises(KeyboardInterrupt):
        tool.main([])
    assert ran == ['decoder', 'vit'] and not tool.TARGET.exists()
    with pytest.raises(StudyError, match='1 pairs have no current entry; run without --page'):
        tool.main(['--page'])
    tool.main([])
    assert ran == ['decoder', 'vit', 'vit']
    stored = pairs.load(tmp_path / 'pairs.json')
    assert [pair.state for pair in stored.values()] == ['works', 'untested', 'works']
    tool.main(['palm'])
    assert len(ran) == 5
    assert '3 pairs of 3 methods: 2 works, 0 refused, 1 untested' in tool.TARGET.read_text()
    del rows['vit']
    tool.main([])
    assert len(ran) == 5 and len(pairs.load(tmp_path / 'pairs.json')) == 1
    with pytest.raises(ConfigError, match="no method 'pal'"):
        tool.main(['pal'])
    # Out of time: what is left is noted, and runs when there is time again.
    rows['vit'] = METHODS['vit']
    tool.main(['--minutes=0'])
    stored = pairs.load(tmp_path / 'pairs.json')
    assert len(ran) == 5
    assert [p.state for p in stored.values()] == ['works', 'untested', 'untested']
    assert stored['palm', 'vit'].reason == pairs.NOT_RUN in tool.TARGET.read_text()
    tool.main([])
    assert len(ran) == 6
    assert pairs.load(tmp_path / 'pairs.json')['palm', 'vit'].state == 'works'


@pytest.mark.ci
def test_several_processes_find_what_one_does(tool, repository):
    combined = [pairs.judge(METHODS[a], METHODS[b], repository)[0].config for a, b in JOBS]
    texts = [json.dumps(config) for config in combined]
    found = dict(tool.outcomes(texts, 2, math.inf))
    assert [found[text][0] for text in texts] == ['works', 'refused']
    assert dict(tool.outcomes(texts, 2, 0.0)) == {}  # time is up


JOBS = (('transformer', 'mixed-precision'), ('bpe', 'vit'))


# ---- the command -------------------------------------------------------------------------------


def test_a_pair_that_has_not_run_is_untested():
    rows = {'a': row(name='a'), 'b': row('ema=0.9', name='b'), 'c': row(name='c')}
    stored = pairs.Pair('a', 'b', 'works', '', pairs.digest(rows['a'], rows['b']))
    found = pairs.partners('b', rows, {stored.key: stored})
    assert found['works'] == {'a': ''}
    assert found['untested'] == {'c': 'not run yet; run: python tools/pairs.py'}
    changed = rows | {'b': dataclasses.replace(rows['b'], config=('ema=0.5',))}
    found = pairs.partners('a', changed, {stored.key: stored})
    assert found['untested']['b'].startswith('a row has changed since it was run')


def test_a_damaged_table_is_said(tmp_path):
    file = tmp_path / 'pairs.json'
    assert pairs.load(file) == {}
    file.write_text('[{"first": "a"}]')
    with pytest.raises(StudyError, match='make it again: python tools/pairs.py --all'):
        pairs.load(file)


def command(repository: pathlib.Path, *args: str) -> subprocess.CompletedProcess:
    line = [sys.executable, '-m', 'effjax.methods', *args]
    return subprocess.run(line, capture_output=True, text=True, cwd=repository)


def test_the_command(repository):
    text = command(repository, '--compatible_with', 'palm').stdout
    assert text.index('works (') < text.index('untested (') < text.index('both set config.model')
    found = json.loads(command(repository, '--compatible_with', 'palm', '--json').stdout)
    assert found['id'] == 'palm' and 'albert' in found['works']
    assert sum(len(found[state]) for state in pairs.STATES) == len(METHODS) - 1
    one = command(repository, 'albert', '--compatible_with=palm', '--json').stdout
    assert json.loads(one)['works'] == {'albert': ''} and not json.loads(one)['untested']
    bad = command(repository, '--compatible_with', 'plam')
    assert bad.returncode == 1
    assert bad.stderr == "error: no method 'plam'. Did you mean 'palm'?\n"
