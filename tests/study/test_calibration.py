"""Calibration: how steps are timed (with a fake clock), and the command on real tiny steps."""

import json

import jax
import pytest

import effjax.train
from effjax import calibrate
from effjax.core.command import run_command
from effjax.core.errors import ConfigError, DeviceError, StudyError
from effjax.costs import reference
from effjax.costs.reference import Entry, Table, describe, shape_of
from effjax.study import calibration
from effjax.training.runtime import Runtime

SHAPE = {
    'model': {'kind': 'decoder', 'layers': 2, 'width': 8}, 'task': {'kind': 'next_token'},
    'precision': {'kind': 'fp32'}, 'optimizer': {'kind': 'sgd'}, 'accumulate': 1, 'batch_size': 4,
    'seq_len': 16, 'stream': False, 'execution': {}, 'clip': False, 'ema': False,
}  # fmt: skip


class Fake:
    """A step that moves a clock by what a function of its count says."""

    def __init__(self, name, bench, seconds, held=1, extra=1):
        self.name, self.bench, self.seconds = name, bench, seconds
        self.held, self.extra = held, extra
        self.shape = SHAPE
        self.count, self.is_open = 0, False

    def open(self):
        assert not self.is_open
        self.is_open, self.count = True, 0
        self.bench.log.append(f'+{self.name}')
        open_cases = [c for c in self.bench.cases if c.is_open]
        self.bench.most = max(self.bench.most, sum(c.held for c in open_cases))

    def step(self):
        assert self.is_open
        self.bench.now += self.seconds(self.bench.steps, self.count)
        self.bench.steps += 1
        self.count += 1
        self.bench.log.append(self.name)

    def close(self):
        self.is_open = False


class Bench:
    """A clock and the cases that move it."""

    def __init__(self):
        self.now, self.steps, self.most = 0.0, 0, 0
        self.log, self.cases, self.said = [], [], []

    def add(self, name, seconds, **memory):
        self.cases.append(
            Fake(name, self, seconds if callable(seconds) else lambda *_: seconds, **memory)
        )

    def time(self, steps=30, rounds=2, limit=None):
        return calibration.time_cases(
            self.cases,
            steps=steps,
            rounds=rounds,
            limit=limit,
            timer=lambda: self.now,
            say=self.said.append,
        )


@pytest.fixture
def bench():
    return Bench()


def test_steps_are_timed_in_turns_after_a_warm_up(bench):
    # The first steps of each case are slow: none of them is counted.
    for name, seconds in (('A', 1.0), ('B', 2.0), ('C', 3.0)):
        bench.add(name, lambda _, count, s=seconds: s if count >= 5 else 100.0)
    entries = bench.time(steps=30)
    assert [e.seconds for e in entries] == [1.0, 2.0, 3.0]
    assert [e.repeats for e in entries] == [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]
    assert all(e.spread == 0 for e in entries)
    assert bench.log == ['+A', '+B', '+C', *'ABC' * (5 + 30) * 2]
    assert not bench.said and not any(c.is_open for c in bench.cases)


def test_a_median_leaves_single_slow_steps_out(bench):
    bench.add('A', lambda steps, _: 50.0 if steps % 7 == 0 else 1.0)
    (entry,) = bench.time()
    assert entry.seconds == 1.0 and entry.disagreement == 0


def test_a_drift_of_the_device_meets_all_alike(bench):
    """Clocks that slow by 2 % over the run: the two cases keep their ratio."""
    for name, seconds in (('A', 1.0), ('B', 2.0)):
        bench.add(name, lambda steps, _, s=seconds: s * (1 + 0.02 * steps / 140))
    one, other = bench.time()
    assert other.seconds / one.seconds == pytest.approx(2.0, rel=1e-3)


def test_what_does_not_fit_together_takes_turns_by_round(bench):
    for name, held in (('A', 3), ('B', 3), ('C', 6)):
        bench.add(name, 1.0, held=held, extra=2)
    entries = bench.time(steps=15, limit=9)
    assert [e.seconds for e in entries] == [1.0, 1.0, 1.0]
    assert bench.most == 6
    one_round = ['+A', '+B', *'AB' * 20, '+C', *'C' * 20]
    assert bench.log == one_round * 2


def test_one_that_is_too_large_alone_is_still_tried(bench):
    for name in 'AB':
        bench.add(name, 1.0, held=10)
    assert len(bench.time(limit=5)) == 2


def test_what_does_not_repeat_is_measured_once_more(bench):
    bench.add('A', 1.0)
    bench.add('B', lambda steps, _: 2.0 if steps < 70 else 2.2)  # disturbed in the second round
    one, other = bench.time()
    assert bench.said == ['1 of 2 did not repeat; measuring them once more']
    assert other.repeats == pytest.approx((2.2, 2.2)) and one.repeats == (1.0, 1.0)
    assert bench.log[-70:] == ['B'] * 70


def test_what_does_not_repeat_twice_is_refused_with_the_figures(bench):
    bench.add('A', lambda steps, _: 1.0 + steps / 100)
    with pytest.raises(StudyError) as error:
        bench.time()
    assert str(error.value) == (
        'decoder of 2 layers, width 8, batch 4 x 16, fp32, sgd does not repeat within 3%: medians '
        'of rounds were 1195, 1545 ms, and 1895, 2245 ms when measured again; stop what else runs '
        'on this machine, or give more --steps.'
    )
    assert not any(c.is_open for c in bench.cases)


def test_an_error_closes_what_is_open(bench):
    def fails(*_):
        raise RuntimeError('lost')

    bench.add('A', 1.0)
    bench.add('B', fails)
    with pytest.raises(RuntimeError, match='lost'):
        bench.time()
    assert not any(c.is_open for c in bench.cases)


def test_memory_that_runs_out_is_one_sentence(bench):
    def fails(*_):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory, 3 GiB')

    bench.add('A', fails)
    with pytest.raises(DeviceError, match=r'decoder of 2 layers, .* does not fit into the memory'):
        bench.time()


# ---- what is measured --------------------------------------------------------------------------


def test_conditions_say_where_and_how(tiny):
    found = calibration.conditions([tiny()])
    assert set(found) == set(reference.CONDITIONS)
    assert found['backend'] == 'cpu' and found['device'] != 'cpu' and 'cores' in found['device']
    assert found['steps'] == 30 and found['mesh'] == {}


@pytest.mark.parametrize(
    ('steps', 'rounds'), [(30, 1), (14, 2), (0, 2)]
)  # fmt: skip
def test_too_few_steps_or_rounds(tiny, steps, rounds):
    with pytest.raises(ConfigError, match='are too few: a median takes at least 30 steps'):
        calibration.measure([tiny()], steps=steps, rounds=rounds)


def test_configs_share_a_mesh(tiny):
    with pytest.raises(ConfigError, match=r'differ in config\.mesh; a table has one'):
        calibration.measure([tiny(), tiny('mesh.data=1')])
    with pytest.raises(ConfigError, match='there is no config to measure'):
        calibration.measure([])


class Idle:
    """A compiled step's stand-in: what is compiled and timed is not what this test is about."""

    def __init__(self, runtime, stage):
        self.shape, self.held, self.extra = shape_of(stage.config), 0, 0
        assert stage.config['reference'] == '' and stage.config['model']['vocab_size'] > 0

    def open(self):
        pass

    step = close = open


def clock(seconds):
    """Returns a timer by which every step takes the same time."""
    ticks = iter(range(10**9))
    return lambda: seconds * next(ticks)


def test_every_stage_is_measured_and_every_shape_once(tiny, monkeypatch):
    monkeypatch.setattr(calibration, 'TrainStep', Idle)
    staged = tiny(
        stages=({'share': 0.5, 'batch_size': 4, 'seq_len': 16}, {'share': 0.5}),
        reference='elsewhere.json',
    )
    table = calibration.measure([tiny(), staged, tiny('seed=3')], timer=clock(0.5))
    assert [(e.shape['batch_size'], e.shape['seq_len']) for e in table.entries] == [
        (8, 32),
        (4, 16),
    ]
    assert {e.seconds for e in table.entries} == {0.5}


def test_times_that_are_not_monotone_are_refused(tiny, monkeypatch):
    monkeypatch.setattr(calibration, 'TrainStep', Idle)
    monkeypatch.setattr(
        calibration,
        'time_cases',
        lambda cases, **_: [Entry(c.shape, 1 / c.shape['batch_size'], (1, 1), 0) for c in cases],
    )
    with pytest.raises(ConfigError, match='the measured table'):
        calibration.measure([tiny(), tiny('batch_size=16')])


def test_the_real_step_of_a_config(tiny):
    """Compiled as training does, on the batches of training."""
    runtime = Runtime(tiny())
    step = calibration.TrainStep(runtime, runtime.stages[0])
    assert step.held > 0 and step.extra > 0
    step.open()
    for _ in range(6):  # more than there are batches
        step.step()
    assert int(step._state['step']) == 6
    step.close()
    assert step._state is None


# ---- the command -------------------------------------------------------------------------------

_CONFIG = """
from effjax.core.config import defaults

def get_config():
    config = defaults()
    config.update(steps=6, batch_size=8, seq_len=32)
    config.data = dict(kind='text', path={path!r}, tokenizer=dict(kind='byte'))
    config.model = dict(kind='decoder', width=16, layers=1,
                        mixer=dict(kind='attention', heads=2), ffn=dict(kind='swiglu', hidden=32))
    config.precision = dict(kind='fp32')
    config.log.progress = config.log.tensorboard = False
    return config
"""


@pytest.fixture
def file(tmp_path, words):
    """A config file of a tiny decoder."""
    path = tmp_path / 'config.py'
    path.write_text(_CONFIG.format(path=str(words)))
    return path


@pytest.fixture
def fake_steps(monkeypatch):
    """No step is compiled; one takes as many seconds as its model has layers."""

    def time_cases(cases, **_):
        layers = [float(c.shape['model']['layers']) for c in cases]
        return [Entry(c.shape, n, (n, n), 0.01) for c, n in zip(cases, layers, strict=True)]

    monkeypatch.setattr(calibration, 'TrainStep', Idle)
    monkeypatch.setattr(calibration, 'time_cases', time_cases)


def run(*argv):
    return run_command(calibrate.main, [str(a) for a in argv])


def test_the_command_measures_every_combination(file, fake_steps, tmp_path, capsys):
    out = tmp_path / 'tables' / 'here.json'
    varied = ['--vary', 'model.layers=1,2', '--vary=batch_size=8,16']
    assert run(f'--config={file}', *varied, f'--out={out}', '--config.seq_len=16') == 0
    shown = capsys.readouterr()
    table = Table.load(out)
    sizes = [(e.shape['model']['layers'], e.shape['batch_size']) for e in table.entries]
    assert sizes == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert {e.shape['seq_len'] for e in table.entries} == {16}
    saved = json.loads(out.read_text())
    assert saved['version'] == 1 and saved['made'] and saved['steps'] == 30
    lines = shown.out.splitlines()
    assert lines[0].startswith(table.conditions['device']) and '2 x 30 steps' in lines[0]
    assert lines[1].split()[:3] == ['model.kind', 'model.layers', 'model.width']
    assert ' '.join(lines[2].split()) == 'decoder 1 16 8 16 fp32 1000 0.00% 1.00%'
    assert '4 entries: monotone in depth, width, length and batch' in shown.out

    # Again with another depth: added to what is there.
    assert run(f'--config={file}', '--vary=model.layers=2,3', f'--out={out}') == 0
    assert len(Table.load(out).entries) == 6
    assert run('--check', out) == 0 and run('--list', out) == 0
    assert '6 entries: monotone' in capsys.readouterr().out


def test_a_refused_table_can_be_listed(file, fake_steps, tmp_path, capsys):
    out = tmp_path / 'here.json'
    assert run(f'--config={file}', '--vary=model.layers=1,2', f'--out={out}') == 0
    saved = json.loads(out.read_text())
    saved['entries'][1].update(seconds=0.2, repeats=[0.2, 0.2])
    out.write_text(json.dumps(saved))
    capsys.readouterr()
    assert run('--check', out) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'is not monotone: decoder of 2 layers' in error
    assert run('--list', out) == 0
    assert '200' in capsys.readouterr().out
    assert run(f'--config={file}', f'--out={out}') == 1  # nor is anything added to it
    assert json.loads(out.read_text()) == saved


def test_a_table_of_another_device_is_left_alone(file, fake_steps, tmp_path, capsys):
    out = tmp_path / 'here.json'
    assert run(f'--config={file}', f'--out={out}') == 0
    saved = {**json.loads(out.read_text()), 'device': 'Abacus 9000'}
    out.write_text(json.dumps(saved))
    capsys.readouterr()
    assert run(f'--config={file}', f'--out={out}') == 1
    error = capsys.readouterr().err
    assert "was measured with device 'Abacus 9000', this is " in error and error.count('\n') == 1
    assert json.loads(out.read_text()) == saved


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'give --config and --out to measure'),
        (['--config=none.py', '--out=x'], "no config file 'none.py'"),
        (['--check=none.json'], 'cannot read reference table none.json'),
        (['--list=none.json'], 'cannot read reference table none.json'),
        (['--config={file}', '--out=x', '--vary=model.layers'], "'model.layers' lacks a value"),
        (['--config={file}', '--out=x', '--vary=model.layers=1,'], 'lacks a value'),
        (['--config={file}', '--out=x', '--vary=batchsize=1'], 'unknown key config.batchsize'),
        (['--config={file}', '--out=x', '--rounds=1'], 'are too few'),
        (['--config={file}', '--out=x', '--step=3'], "unknown argument '--step=3'"),
        (['--config={file}', '--out={file}/x.json'], 'cannot write the table'),
    ],
)
def test_faults_are_one_line(file, fake_steps, capsys, argv, message):
    assert run(*(a.format(file=file) for a in argv)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('error: ') and message in error


# ---- charging a run ----------------------------------------------------------------------------


def table_for(config, path, *seconds_and_config):
    """Writes a hand-made table: seconds of a step of each config."""
    entries = []
    for seconds, other in ((0.25, config), *seconds_and_config):
        entries.append(
            Entry(shape_of(Runtime(other).stages[0].config), seconds, (seconds,) * 2, 0.01)
        )
    found = calibration.conditions([config])
    calibration.save(Table({**found, 'device': 'Abacus 9000'}, '2026-01-02', tuple(entries)), path)
    return f'reference={path}'


def test_a_run_ends_with_its_budget_of_reference_time(tiny, tmp_path):
    path = tmp_path / 'table.json'
    override = table_for(tiny(), path)
    done = effjax.train.run(tiny(override, 'budget=2ref_s'), tmp_path / 'run')
    assert done.summary['ledger']['steps'] == 8
    assert done.summary['ledger']['reference_seconds'] == 2.0
    rows = [json.loads(x) for x in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [r['reference_seconds'] for r in rows if 'reference_seconds' in r][:3] == [
        0.25,
        0.5,
        0.75,
    ]


def test_a_run_that_the_table_does_not_cover_does_not_start(tiny, tmp_path):
    override = table_for(tiny(), tmp_path / 'table.json')
    later = ({'share': 0.5}, {'share': 0.5, 'batch_size': 4})
    config = tiny(override, 'budget=2ref_s', stages=later)
    with pytest.raises(ConfigError) as error:
        effjax.train.run(config, tmp_path / 'run')
    shape = describe({**shape_of(Runtime(tiny()).stages[0].config), 'batch_size': 4})
    assert f'(Abacus 9000) does not cover {shape}' in str(error.value)
    assert 'batch_size 8 instead of 4 (0.25 s)' in str(error.value)
    rows = tmp_path / 'run' / 'metrics.jsonl'
    assert not rows.exists() or not rows.read_text()


@pytest.mark.ci
def test_a_real_table_charges_a_real_run(file, tmp_path, capsys, monkeypatch):
    # This machine is shared: what is looked at here is not how well it repeats.
    monkeypatch.setattr(reference, 'TOLERANCE', 1e9)
    out = tmp_path / 'here.json'
    assert run(f'--config={file}', '--vary=model.layers=1,2', '--steps=15', f'--out={out}') == 0
    table = Table.load(out)
    assert all(0 < e.seconds < 5 for e in table.entries)
    assert 'compiling decoder of 2 layers' in capsys.readouterr().err
    (config,) = calibrate.configs([str(file)], [], ['model.layers=2', f'reference={out}'])
    done = effjax.train.run(config, tmp_path / 'run')
    charged = done.summary['ledger']['reference_seconds']
    assert charged == pytest.approx(6 * table.entries[1].seconds)
