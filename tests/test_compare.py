"""The command that settles a comparison: mistakes in one line, runs, kills, resumes."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from effjax import compare
from effjax.core.command import run_command
from effjax.core.errors import StudyError
from effjax.study import lock, plan, preflight, store
from effjax.study.records import Analysis, analysis_from_json

# Numbers of a comparison that do not depend on a clock: the same whenever the runs are the same.
EXACT = ('steps', 'tokens', 'tokens_computed', 'examples', 'model_flops', 'hardware_flops')


@pytest.fixture(scope='module')
def baseline(words, tmp_path_factory) -> str:
    """A config file of a model that trains in a moment; its variant has a hopeless peak."""
    file = tmp_path_factory.mktemp('baseline') / 'small.py'
    file.write_text(
        f"""
from effjax.core.config import defaults

def get_config(variant=''):
    config = defaults()
    config.steps = 40
    config.batch_size = 8
    config.seq_len = 32
    config.data = dict(kind='text', path={str(words)!r}, tokenizer=dict(kind='byte'))
    config.model = dict(kind='decoder', width=16, layers=1, mixer=dict(kind='attention', heads=2),
                        ffn=dict(kind='swiglu', hidden=32))
    config.schedule = dict(kind='linear', peak=1e-5 if variant == 'slow' else 1e-2, warmup=0.1)
    config.precision.kind = 'fp32'
    config.checkpoint.background = False
    config.evals.valid = dict(batches=2)
    return config
"""
    )
    return str(file)


@pytest.fixture
def flags(baseline):
    """Returns `make(*more) -> argv` of a study that runs as little as it can; later flags win."""

    def make(*more: str) -> list[str]:
        given = '' if any(m.startswith('--baseline') for m in more) else baseline
        return [
            *([f'--baseline={given}', '--change', 'clip_norm=0.5'] if given else []),
            *('--budget=40steps', '--seeds=2', '--tune_key=', '--fractions=1', '--no_probe'),
            '--least_steps=10',
            *more,
        ]

    return make


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Returns `run(argv) -> the one line` of a command that must fail and leave nothing behind."""
    monkeypatch.chdir(tmp_path)

    def run(argv: list[str]) -> str:
        assert run_command(compare.main, argv) == 1
        out, err = capsys.readouterr()
        assert out == '' and err.startswith('error: ') and err.count('\n') == 1, err
        assert list(tmp_path.iterdir()) == []
        return err

    return run


def study_of(argv: list[str]):
    return compare._from_flags(*compare._parse(argv))


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        ([], 'give either --study=FILE or --baseline=FILE'),
        (['--study=x', '--baseline=y'], 'give either --study=FILE or --baseline=FILE'),
        (['--baseline=y', '--budgets=3'], "unknown argument '--budgets=3'"),
        (['--baseline=y', '--budgets=3'], "Did you mean '--budget'?"),
        (['--baseline=y', '--margin=abc'], "argument --margin: invalid float value: 'abc'"),
        (['--baseline=y', '--batched=maybe'], "invalid choice: 'maybe'"),
        (['--baseline=y', '--workers=0'], '--workers must be at least 1, got 0'),
        (['--baseline=nowhere.py', '--budget=20m'], "no config file 'nowhere.py'"),
        (['--study=x', '--change', 'a=1'], '--change and --data go with --baseline'),
        (['--study=nowhere'], "no study 'nowhere'"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(refused, argv, message):
    assert message in refused(argv)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--budget=lots'], "budget 'lots' is not a number with a unit"),
        (['--budget='], 'give the budget of a run: --budget=20m'),
        (['--seeds=1'], 'one seed has no interval'),
        (['--seeds=x'], "--seeds is a count or numbers with commas, got 'x'"),
        (['--seeds=3,3'], 'seeds must differ'),
        (['--least_steps=0'], 'least_steps must be at least 1, got 0'),
        (['--fractions=0.5'], 'fractions must rise to 1'),
        (['--fractions=a,1'], "--fractions takes numbers with commas, got 'a,1'"),
        (['--margin=nan'], 'the margin must be a number from 0 on, got nan'),
        (['--metric=loss'], 'must be EVALUATION.METRIC'),
        (['--tune_key=schedule.peak', '--grid=1e-3,1e-2'], 'needs at least 3 values'),
        (['--tune_key=schedule.kind'], 'has no number to make a tuning grid of; give --grid'),
        (['--change', 'model.width'], "change 'model.width' has no value"),
        (['--change', 'clip_norm=0.5'], "two arms are called 'clip_norm-0.5'"),
        (['--change', 'steps=80'], "arm 'steps-80' sets config.steps, which a study sets"),
        (['--config.seed=3'], 'the study sets config.seed, which a study sets for each of its '),
        (['--change', 'modle.width=8'], "arm 'modle.width-8': unknown key config.modle"),
        (['--config.modle.width=8'], "unknown key config.modle. Did you mean 'model'?"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(refused, flags, more, message):
    assert message in refused(flags(*more))


@pytest.mark.parametrize(
    ('more', 'messages'),
    [
        (['--change', 'seq_len=16'], ["arm 'seq_len-16'", "than 'baseline'", 'other batches']),
        (['--change', 'data.valid_fraction=0.3'], ['valid_fraction-0.3', 'other batches']),
        (
            ['--budget=1e8hwflops'],
            ["arm 'baseline' cannot reach", 'hardware FLOPs are about', 'at least 10'],
        ),
        (
            ['--change', "evals.valid={'batches': 2, 'batch_size': 4}"],
            ['other batches', 'evals.<name>.batch_size'],
        ),
        (
            ['--change', "evals={'valid': 3} batch_size=16"],
            ['config.evals.valid must be a block, got 3'],
        ),
        (['--config.seq_len=100000'], ["arm 'baseline'", 'seq_len']),
        (['--budget=300tokens'], ["arm 'baseline' cannot reach the budget", 'at least 10']),
        (
            ['--budget=99steps', '--fractions=0.5,1', '--least_steps=50'],
            ["arm 'baseline' cannot reach", 'at least 50', 'allow fewer with --least_steps'],
        ),
        (['--change', 'model.layers=9', '--budget=1.7e8flops'], ["arm 'layers-9' cannot reach"]),
        (['--change', 'schedule.kind=constant'], ['kind-constant', 'ends at 100% of its peak']),
        (['--metric=valid.los'], ["no metric 'los'", 'perplexity', "Did you mean 'loss'?"]),
        (['--metric=valid.tokens'], ["less or more of 'valid.tokens' is better is not known"]),
        (['--budget=20ref_s'], ['reference time needs config.reference', 'effjax.calibrate']),
        (['--budget=20J'], ['joules needs a meter', 'count flops']),
        (['--workers=2', '--budget=20s'], ['--workers=2 on a CPU', 'training time', '--workers=1']),
        (['--batched=yes', '--budget=20s'], ['batched runs share the clock', '--batched=no']),
        (['--data=nothing.txt'], ["arm 'baseline'", "no file, folder or match for 'nothing.txt'"]),
        (
            ['--tune_key=schedule.peak', '--grid=-1,1,2'],
            ["arm 'baseline'", 'schedule.peak=-1 of its grid', 'peak'],
        ),
        (
            ['--tune_key=optimizer.weight_decay', '--grid=0,0.1,0.2', '--batched=yes'],
            ['tuning varies optimizer.weight_decay', '--batched=no'],
        ),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(refused, flags, monkeypatch, more, messages):
    monkeypatch.setattr(
        'effjax.training.runtime.compile_train', lambda *a, **k: pytest.fail('it compiled')
    )
    said = refused(flags(*more))
    for message in messages:
        assert message in said


@pytest.mark.parametrize('what', ['config', 'code'])
def test_stored_results_that_are_not_its_own(flags, tmp_path, capsys, what):
    argv = flags(f'--out={tmp_path}')
    study = study_of(argv)
    job = plan.final(study, study.arms[1], {})[0].jobs[0]
    if what == 'config':
        job = dataclasses.replace(job, config={**job.config, 'clip_norm': 0.25})
    code = 'another' if what == 'code' else plan.code_version()
    (tmp_path / job.folder).mkdir(parents=True)
    store.end(job, tmp_path, code, 'done')
    assert run_command(compare.main, argv) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    message = {'config': 'holds the result of another config', 'code': 'made by another version'}
    assert said.startswith('error: ') and message[what] in said and job.folder in said
    assert 'give another --out' in said
    assert not (tmp_path / 'study.json').exists()


@pytest.mark.ci
@pytest.mark.parametrize('split', ['training', 'held-out'])
def test_results_of_data_that_changed_are_refused(flags, words, tmp_path, capsys, split):
    sides = {'training': tmp_path / 'train', 'held-out': tmp_path / 'valid'}
    for i, folder in enumerate(sides.values()):
        folder.mkdir()
        for file in sorted(words.iterdir())[30 * i : 30 * (i + 1)]:
            (folder / file.name).write_text(file.read_text())
    data = {'kind': 'text', 'path': str(sides['training']), 'tokenizer': {'kind': 'byte'}}
    data['valid_path'] = str(sides['held-out'])
    out = tmp_path / 'out'
    argv = flags(f'--config.data={data!r}', f'--out={out}')
    study = study_of(argv)
    inputs = preflight.examine(study)['baseline'].inputs
    assert set(inputs) == {'data', 'evaluation valid'}
    job = plan.final(study, study.baseline, {})[0].jobs[0]
    store.begin(job, out, plan.code_version(), inputs)
    changed = sorted(sides[split].iterdir())[0]
    changed.write_text(changed.read_text() + ' the cat sees snow.')
    assert run_command(compare.main, argv) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f'error: {out / job.folder} was made before the training data changed')
    assert str(sides['training']) in said and 'give another --out' in said
    judged = inputs.pop('data') and preflight.examine(study)['baseline'].inputs['evaluation valid']
    assert (judged == inputs['evaluation valid']) == (split == 'training')
    if split == 'held-out':  # the batches that count have a digest of their own
        store.begin(job, out, plan.code_version(), inputs)
        assert run_command(compare.main, argv) == 1
        said = capsys.readouterr().err
        assert f'before the held-out data changed: {sides[split]} holds something else now' in said


def test_a_signal_before_any_run_leaves_in_one_line(refused, flags, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)

    def examine(study):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(preflight, 'examine', examine)
    assert 'stopped by SIGTERM; the same command goes on' in refused(flags())
    assert signal.getsignal(signal.SIGTERM) is handler


# ---- what it says without running --------------------------------------------------------------


def test_a_dry_run_says_what_would_run_and_runs_nothing(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = flags('--change', 'model.layers=2', '--fractions=0.5,1', '--seeds=3', '--dry_run')
    assert compare.main([*argv, '--tune_key=schedule.peak']) == 0
    said = capsys.readouterr().out
    assert '27 runs: 3 arms x 3 seeds x 2 budgets (50%, 100%), and 9 for tuning schedule.p' in said
    assert 'layers-2: model.layers=2; ' in said and 'parameters, ' in said
    assert said.count(', 40 steps') == 3
    assert 'FLOP a step' in said and 'not known before something has run' in said
    assert list(tmp_path.iterdir()) == []


def test_lists_of_studies_and_of_runs(flags, tmp_path, monkeypatch, capsys, repository):
    monkeypatch.chdir(repository)
    assert compare.main(['--list']) == 0
    assert 'experiments/gelu_swiglu: ' in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert compare.main(['--list']) == 0
    assert 'no studies' in capsys.readouterr().out
    assert compare.main(flags('--list')) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith('missing   final') for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_a_report_on_nothing_is_refused(refused, flags):
    assert 'holds no finished run of small-clip_norm-0.5; run the' in refused(
        flags('--report_only')
    )


def test_own_data_takes_the_place_of_the_baselines(flags, tmp_path):
    def data_of(path, *more):
        study = study_of(flags(f'--data={path}', *more))
        found = [plan.arm_config(study, arm)['data'] for arm in study.arms]
        assert found[0] == found[1]
        return found[0]

    text = {'kind': 'text', 'path': 'my.txt', 'tokenizer': {'kind': 'byte'}}
    assert data_of('my.txt') == text
    assert data_of('my.txt', '--config.data.packing=stream') == {**text, 'packing': 'stream'}
    assert data_of('my.txt', '--config.data.valid_fraction=0.2') == {**text, 'valid_fraction': 0.2}
    assert data_of('my.txt', '--config.data.tokenizer.kind=char')['tokenizer'] == {'kind': 'char'}
    assert data_of('my.jsonl')['kind'] == data_of('my.jsonl.gz')['kind'] == 'jsonl'
    assert data_of('my.parquet')['kind'] == 'parquet'
    folder = tmp_path / 'corpus'
    folder.mkdir()
    (folder / 'a.jsonl.gz').write_text('')
    assert data_of(folder)['kind'] == 'jsonl'
    (folder / 'a.txt').write_text('')
    assert data_of(folder)['kind'] == 'text'


def test_keys_of_the_config_reach_every_arm(flags):
    study = study_of(flags('--config.model.width=8', '--change', 'model.width=4'))
    widths = [plan.arm_config(study, arm)['model']['width'] for arm in study.arms]
    assert widths == [8, 8, 4]


def test_a_metric_brings_its_direction_and_its_evaluation(flags):
    assert study_of(flags()).minimised
    study = study_of(flags('--metric=test.accuracy'))
    assert not study.minimised
    assert plan.arm_config(study, study.baseline)['evals']['test']['batches'] == 32


@pytest.mark.ci
def test_an_arm_of_another_batch_size_is_judged_on_the_same_batches(flags, words):
    def evals(*change, base=()):
        study = study_of(flags(*base, *(f for c in change for f in ('--change', c))))
        facts = preflight.examine(study)
        assert len({f.evaluation for f in facts.values()}) == 1
        return [plan.arm_config(study, arm)['evals']['valid'] for arm in study.arms]

    plain = {'batches': 2}
    assert evals('batch_size=16') == [plain, plain, {**plain, 'batch_size': 8}]
    staged = "stages=[{'share': 0.5, 'batch_size': 4}, {'share': 0.5}]"
    assert evals(staged)[-1] == {**plain, 'batch_size': 8}
    own = evals(base=('--config.evals.valid.batch_size=4', '--change', 'batch_size=16'))
    assert own == [{**plain, 'batch_size': 4}] * 3
    study = dataclasses.replace(study_of(flags()), tune_key='batch_size', grid=(4, 8, 16))
    tuned = [job.config['evals']['valid'] for job in plan.tuning(study)[0].jobs]
    assert [block.get('batch_size', 8) for block in tuned] == [8, 8, 8]


def test_arms_of_different_tasks_are_refused(flags, monkeypatch):
    study = study_of(flags())
    resolved = [{'task': {'kind': kind}} for kind in ('next_token', 'recall')]
    facts = [preflight.Facts(1, 1.0, 40, 'same', {}, r) for r in resolved]
    monkeypatch.setattr(preflight, '_arm', lambda study, arm: facts[study.arms.index(arm)])
    with pytest.raises(StudyError, match=r"has the task 'recall' and 'baseline' 'next_token', so"):
        preflight.examine(study)


def test_a_grid_is_made_around_the_baselines_own_value(flags):
    assert study_of(flags('--tune_key=schedule.peak')).grid == (5e-3, 1e-2, 2e-2)
    given = study_of(flags('--tune_key=schedule.peak', '--grid=1,2,3,4'))
    assert given.grid == (1.0, 2.0, 3.0, 4.0)


def test_a_study_file_takes_flags(tmp_path, baseline):
    (tmp_path / 'study.py').write_text(
        'from effjax.study.spec import Arm, Study\n\n'
        'def get_study():\n'
        f'    return Study("mine", {baseline!r}, (Arm("a"), Arm("b")), budget=1e9, tune_key="")\n'
    )
    args, overrides = compare._parse(
        [f'--study={tmp_path}', '--budget=50steps', '--seeds=4,5', '--config.model.width=8']
    )
    study = compare._from_file(args, overrides)
    assert (study.axis, study.budget, study.seeds) == ('steps', 50.0, (4, 5))
    assert study.overrides == ('model.width=8',)


def test_another_metric_needs_a_margin_of_its_own(tmp_path, baseline):
    (tmp_path / 'study.py').write_text(
        'from effjax.study.spec import Arm, Study\n\n'
        'def get_study():\n'
        f'    return Study("mine", {baseline!r}, (Arm("a"), Arm("b")), budget=1e9, tune_key="",\n'
        '                 margin=0.005)\n'
    )

    def study(*flags):
        return compare._from_file(*compare._parse([f'--study={tmp_path}', *flags]))

    with pytest.raises(StudyError, match=r'0.005, was set for valid.loss.* give its --margin too'):
        study('--metric=valid.accuracy')
    found = study('--metric=valid.accuracy', '--margin=0.01')
    assert (found.margin, found.minimised) == (0.01, False)
    assert study('--metric=valid.loss').margin == 0.005


# ---- real runs ---------------------------------------------------------------------------------


def run(argv: list[str], out: pathlib.Path) -> Analysis:
    """Runs the command here; returns what it wrote."""
    assert run_command(compare.main, [*argv, f'--out={out}']) == 0
    return found(out)


def found(out: pathlib.Path) -> Analysis:
    return analysis_from_json(json.loads((out / 'analysis.json').read_text()))


def differences(analysis: Analysis) -> list[float]:
    return [b - a for c in analysis.comparisons for _, a, b in c.pairs]


def exact(analysis: Analysis) -> list[dict]:
    """Returns the comparisons without what a clock measured."""
    out = []
    for comparison in analysis.comparisons:
        told = dataclasses.asdict(comparison)
        told['notes'] = [n for n in told['notes'] if not n.startswith('No ratio of time')]
        for table in ('spent', 'at_equal_quality'):
            told[table] = {axis: told[table].get(axis) for axis in EXACT}
        out.append(told)
    return out


@pytest.mark.ci
def test_an_arm_against_itself_differs_by_exactly_zero(flags, baseline, tmp_path, capsys):
    # The same model under two names: 1.0 is the default.
    argv = [f'--baseline={baseline}', '--change', 'clip_norm=1.0', '--budget=20steps']
    argv = flags(*argv)
    both = [run([*argv, f'--batched={b}'], tmp_path / b) for b in ('no', 'yes')]
    for analysis in both:
        assert differences(analysis) == [0.0, 0.0]
        assert analysis.comparisons[0].verdict == 'equivalent'
        assert 'exactly the same loss' in analysis.comparisons[0].sentence
    assert 'clip_norm-1.0 gave exactly the same loss as baseline' in capsys.readouterr().out
    lanes = [c.environment['batched'] for analysis in both for c in analysis.cells]
    assert lanes == [0, 0, 0, 0, 2, 2, 2, 2]
    # Batched products add up in another order. Each rounding is 6e-8 of a number; twenty steps of
    # Adam, whose first updates are near the sign of a gradient, make a few hundred times that.
    values = [[c.value for c in analysis.cells] for analysis in both]
    np.testing.assert_allclose(*values, rtol=1e-4)
    for one, other in zip(*(a.cells for a in both), strict=True):
        assert {k: one.costs[k] for k in EXACT} == {k: other.costs[k] for k in EXACT}


@pytest.mark.ci
def test_runs_of_a_growing_arm_share_a_step(flags, baseline, tmp_path, quick_compile):
    narrow = {
        'width': 8, 'mixer': {'kind': 'attention', 'heads': 1},
        'ffn': {'kind': 'swiglu', 'hidden': 16},
    }  # fmt: skip
    stages = [{'share': 0.5, 'model': narrow}, {'share': 0.5, 'grow': 'staged'}]
    argv = flags(f'--baseline={baseline}', '--change', f'stages={stages}')
    found = run(argv, tmp_path)  # small enough to be batched unasked
    assert [cell.environment['batched'] for cell in found.cells] == [2] * 4
    assert all(c.status == 'done' and c.costs['steps'] == 40 for c in found.cells)
    ledgers = [json.loads((tmp_path / c.workdir / 'summary.json').read_text()) for c in found.cells]
    assert [list(s['ledger']['forward']) for s in ledgers] == [[], [], ['growth'], ['growth']]


@pytest.mark.ci
def test_a_planted_learning_rate_is_caught_by_tuning(flags, baseline, tmp_path, capsys):
    argv = [f'--baseline={baseline}:slow', '--change', 'schedule.peak=1e-2', '--seeds=3']
    argv = flags(*argv, '--batched=yes')
    untuned = run([*argv, '--seeds=3'], tmp_path / 'untuned')
    assert untuned.comparisons[0].verdict == 'win'
    assert 'Nothing was tuned' in capsys.readouterr().out
    grid = ['--tune_key=schedule.peak', '--grid=1e-3,1e-2,1e-1']
    tuned = run([*argv, '--seeds=3', *grid], tmp_path / 'tuned')
    assert differences(tuned) == [0.0, 0.0, 0.0]
    assert tuned.comparisons[0].verdict == 'equivalent'
    tunings = [arm['tuning'] for arm in tuned.arms.values()]
    assert tunings[0] == tunings[1] and tunings[0].chosen > 1e-3
    note = 'peak-1e-2 sets schedule.peak itself, which tuning sets for every arm alike.'
    assert f'note: {note}' in capsys.readouterr().out.replace('schedule.peak-1e-2', 'peak-1e-2')


STEPS = '--budget=300steps'
STOPPED = 'error: stopped by SIGTERM; the same command goes on.'


@pytest.fixture(scope='module')
def whole(baseline, tmp_path_factory) -> list[dict]:
    """The comparisons of a study that nothing disturbed."""
    out = tmp_path_factory.mktemp('whole')
    return exact(run(long_study(baseline), out))


def long_study(baseline: str) -> list[str]:
    given = ['--change', 'model.ffn.kind=gelu', STEPS, '--seeds=2', '--tune_key=', '--fractions=1']
    rows = '--config.log.every_steps=2'  # tests watch them to see a run under way
    return [f'--baseline={baseline}', *given, rows, '--no_probe', '--batched=no']


def command(argv: list[str], out: pathlib.Path) -> subprocess.Popen:
    line = [sys.executable, '-m', 'effjax.compare', *argv, f'--out={out}']
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def when_training(process: subprocess.Popen, out: pathlib.Path, runs: int) -> None:
    """Waits until as many runs have begun and the last of them has trained for some steps."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        files = [f for f in out.rglob('metrics.jsonl') if f.stat().st_size]
        if len(files) >= runs:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate()[1])


@pytest.mark.process
def test_a_study_survives_a_kill_and_a_signal(baseline, whole, tmp_path):
    argv = long_study(baseline)
    process = command(argv, tmp_path)
    when_training(process, tmp_path, 1)
    process.kill()
    process.communicate()
    assert not list(tmp_path.rglob('summary.json'))  # in the middle of the first run
    process = command(argv, tmp_path)
    when_training(process, tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert said.splitlines()[-1] == STOPPED
    assert 'Traceback' not in said
    assert not (tmp_path / 'analysis.json').exists()
    states = [json.loads(f.read_text())['status'] for f in tmp_path.rglob('cell.json')]
    done = states.count('done')  # the second run too, where the signal met its very end
    assert len(states) == 2 and 1 <= done <= 2
    process = command(argv, tmp_path)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert f'[1/{4 - done}]' in said and out.startswith(whole[0]['sentence'])
    assert exact(found(tmp_path)) == whole


@pytest.mark.process
@pytest.mark.parametrize('batched', ['no', 'yes'])
def test_a_signal_at_any_moment_is_obeyed(flags, tmp_path, capsys, batched):
    late = []  # signals that came when the command had ended
    old = signal.signal(signal.SIGTERM, lambda number, frame: late.append(number))
    argv = flags('--budget=20steps', f'--batched={batched}', '--config.evals.valid.batches=1')
    try:
        run(argv, tmp_path / 'first')  # compiles
        start = time.monotonic()
        whole = exact(run(argv, tmp_path / 'whole'))
        seconds = time.monotonic() - start
        for i in range(4):
            out, args = tmp_path / str(i), (os.getpid(), signal.SIGTERM)
            timer = threading.Timer(seconds * (i + 0.5) / 4, os.kill, args)
            timer.start()
            code = run_command(compare.main, [*argv, f'--out={out}'])
            timer.join()
            said = capsys.readouterr().err
            if late:
                late.clear()
                continue
            assert (code, said.splitlines()[-1]) == (1, STOPPED), said
        assert exact(run(argv, tmp_path / '2')) == whole
    finally:
        signal.signal(signal.SIGTERM, old)


@pytest.mark.process
def test_a_second_process_is_refused_and_workers_die_with_the_first(baseline, tmp_path):
    argv = [*long_study(baseline), '--workers=2', '--budget=30000steps']  # outlasts the test
    first = command(argv, tmp_path)
    when_training(first, tmp_path, 2)
    second = command(argv, tmp_path)
    said = second.communicate()[1].splitlines()[-1]
    assert second.returncode == 1
    assert said.startswith(f'error: {tmp_path} is in use by process {first.pid} on ')
    assert said.endswith('wait until it ends or stop it, or give another --out.')
    tasks = pathlib.Path(f'/proc/{first.pid}/task').glob('*/children')
    workers = [int(pid) for file in tasks for pid in file.read_text().split()]
    assert len(workers) == 2
    first.kill()
    first.communicate()
    deadline = time.monotonic() + 30
    while any(lock._began(pid) not in ('', 'ended') for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    states = {json.loads(f.read_text())['status'] for f in tmp_path.rglob('cell.json')}
    assert states == {'running'}


@pytest.mark.process
def test_runs_side_by_side_give_the_same_numbers(baseline, whole, tmp_path):
    process = command([*long_study(baseline), '--workers=2'], tmp_path)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert out.startswith(whole[0]['sentence'])
    assert exact(found(tmp_path)) == whole


@pytest.mark.process
def test_a_signal_stops_the_workers_too(baseline, tmp_path):
    process = command([*long_study(baseline), '--workers=2'], tmp_path)
    when_training(process, tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert said.splitlines()[-1] == STOPPED
    states = {json.loads(f.read_text())['status'] for f in tmp_path.rglob('cell.json')}
    assert states <= {'running', 'done'}
