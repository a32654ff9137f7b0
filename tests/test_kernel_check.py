"""The check of Hopper kernels: what it refuses, that it sees what is wrong, and what it covers."""

import functools
import itertools
import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import kernels
from experiments.benchmarks.kernels import check, racecheck
from experiments.benchmarks.kernels.checks import Check, checks, documents
from experiments.benchmarks.kernels.measures import compare

INTERPRETED = ['--small', '--interpret', '--seed', '3']


def test_it_needs_a_hopper_gpu_and_compiles_nothing_without(monkeypatch, capsys):
    monkeypatch.setattr(check, 'prepare', None)
    assert check.main([]) == check.main(['--small']) == 2
    assert 'it needs a Hopper GPU, not cpu' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('argv', 'why'),
    [
        (['--interpret'], 'add --small'),
        (['--cases', 'nothing'], 'there are scalar decay, documents, '),
        (['--calls', '1'], 'at least 2'),
    ],
)
def test_arguments_that_say_nothing(argv, why, capsys):
    with pytest.raises(SystemExit) as e:
        check.main(argv)
    assert e.value.code == 2 and why in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.parametrize(
    ('case', 'results', 'least'),
    [
        ('grouped product, even', {'y', 'dx_MK', 'dw_EKN'}, 1e-4),  # bfloat16's rounding
        pytest.param(
            'diagonal scan, extreme',
            {'o', 'state', 'dx', 'dlog_decay', 'dinitial_state'},
            0.0,
            marks=pytest.mark.ci,
        ),
    ],
)
def test_kernels_in_the_interpreter(case, results, least, tmp_path, capsys):
    """Real kernels, tiny: outputs, states and all gradients are held to the token loop."""
    out = tmp_path / 'rows.json'
    assert check.main([*INTERPRETED, '--cases', case, '--out', str(out)]) == 0
    report = json.loads(out.read_text())
    assert report['seed'] == 3 and report['interpreted']
    (row,) = report['rows']
    assert row['case'] == case and row['right'] and row['same'] and not row['wrong']
    assert set(row['results']) == results
    assert all(least <= x['error'] < x['bound'] for x in row['results'].values())
    text = capsys.readouterr().out
    assert '--seed 3' in text and '1 right, 0 WRONG' in text


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled(x, factor):
    return x


scaled.defvjp(lambda x, factor: (x, None), lambda factor, _, g: (factor * g,))
counter = itertools.count()


def counted(x):
    """Other bits, not another number, in every other call."""
    sign = jax.pure_callback(
        lambda: np.float32(-0.0 if next(counter) % 2 else 0.0), jax.ShapeDtypeStruct((), np.float32)
    )
    return x.at[0, 0].set(sign)


FAULTS = {
    'output': (lambda x: 1.1 * x, 'o: off by'),
    'gradient': (lambda x: scaled(x, 0.9), 'dx: off by 1.0e-01'),
    'row': (lambda x: x.at[77].set(0), 'o: a row is off by'),
    'nan': (lambda x: x.at[5, 1].set(jnp.nan), 'o: 1 not finite'),
    'race': (counted, 'o: another call gives other bits'),
    'refusal': (lambda x: x @ x, 'TypeError: dot_general'),
}


def faulty(fault):
    """A check of sin(x) that has a fault; a row of 4096 alone is less than the bound."""

    def run(implementation, inputs):
        x = inputs['x'].at[0, 0].set(0.0)
        return {'o': jnp.sin(fault(x) if implementation == check.KERNEL else x)}

    def make(key):
        return {'x': jax.random.normal(key, (4096, 8))}, {}

    return Check('sine', 'sin', make, run, 'reference', 0.02, 'a test')


@pytest.mark.parametrize('name', [*FAULTS, 'none'])
def test_what_is_wrong_is_said(name, monkeypatch, capsys):
    fault, words = FAULTS.get(name, (lambda x: x, '1 right, 0 WRONG'))
    monkeypatch.setattr(check, 'checks', lambda **_: (faulty(fault),))
    status = check.main(INTERPRETED)
    text = capsys.readouterr().out
    assert words in text
    assert status == (0 if name == 'none' else 1)
    assert ('WRONG: ' in text and '**WRONG**' in text) == (name != 'none')


def test_results_are_written_into_memory_full_of_nan():
    """What a kernel does not write stays NaN: the memory is donated, and results take its place."""
    made = check.lower(faulty(lambda x: x), interpret=False)
    programs = check.Programs(**{name: x.compile() for name, x in made.items()})
    memory = check.poisoned(programs)
    assert all(jnp.isnan(x).all() for x in memory.values())
    places = {x.unsafe_buffer_pointer() for x in memory.values()}
    out = programs.ours(memory, programs.make(jax.random.key(0)))
    assert all(x.is_deleted() for x in memory.values())
    assert {x.unsafe_buffer_pointer() for x in out.values()} == places


def test_bits_and_distances():
    a = {'x': jnp.array([[3.0, 4.0], [0.0, 0.0]]), 'z': jnp.array([1 + 1j])}
    found = compare(a, {'x': a['x'], 'z': a['z'] + 1e-7j}, {'x': 2 * a['x'], 'z': a['z']})
    assert float(found['x']['error']) == 0.5 == float(found['x']['row'])
    assert bool(found['x']['same']) and not bool(found['z']['same'])
    assert not bool(compare({'x': a['x']}, {'x': a['x'] * -1.0}, {'x': a['x']})['x']['same'])
    nothing = compare({'x': jnp.zeros(3)}, {'x': jnp.zeros(3)}, {'x': jnp.zeros(3)})['x']
    assert float(nothing['error']) == 0.0 and bool(nothing['truth_finite'])


def test_every_hopper_kernel_is_checked():
    folder = pathlib.Path(kernels.__file__).parent
    ops = {path.parent.name for path in folder.glob('*/hopper.py')} | {'wkv'}
    for small in (False, True):
        names = [c.name for c in checks(small=small)]
        assert {c.op for c in checks(small=small)} == ops and len(names) == len(set(names))
    assert names == [c.name for c in checks()]


def test_rows_of_documents():
    ids = np.asarray(documents(jax.random.key(0), 3, 1003))
    for row in ids:
        real = row[row > 0]
        assert np.all(np.diff(real) >= 0) and len(set(real)) > 3 and not row[-1]
        assert row[448] != row[447] or 0 in row[440:449]


def test_racecheck_says_where_there_is_no_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(racecheck.shutil, 'which', lambda _: None)
    assert check.main(['--racecheck', '--seed', '4']) == 2
    text = capsys.readouterr().out
    assert 'there is no compute-sanitizer here' in text
    commands = [x for x in text.splitlines() if x.startswith('compute-sanitizer --tool racecheck ')]
    assert len(commands) == len({c.op for c in checks()}) + len(racecheck.ALSO)
    assert all('--small --seed 4 --cases' in x for x in commands)
    assert all(sum(name in x for x in commands) == 1 for name in racecheck.ALSO)


@pytest.mark.parametrize(
    ('said', 'status', 'expected'),
    [
        ('RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)', 0, 0),
        ('Error: Race reported\nRACECHECK SUMMARY: 2 hazards displayed (2 errors)', 0, 1),
        ('RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)', 1, 1),
        ('check: it needs a Hopper GPU, not cpu', 2, 2),
    ],
)
def test_racecheck_reports_hazards(said, status, expected, monkeypatch, capsys):
    monkeypatch.setattr(racecheck.shutil, 'which', lambda _: '/bin/true')
    done = subprocess.CompletedProcess([], status, said, '')
    monkeypatch.setattr(racecheck.subprocess, 'run', lambda *_, **__: done)
    assert check.main(['--racecheck', '--cases', 'wkv, documents']) == expected
    text = capsys.readouterr().out
    assert ('2 hazards' in text) == ('2 hazards' in said)
