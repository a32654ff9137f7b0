"""The main job whole: a run, its files, resuming, stages, budgets, and mistakes in one line."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from effjax import train
from effjax.core.config import as_dict
from effjax.core.errors import CheckpointError, ConfigError, DataError, TrainingError
from effjax.training.loop import Trainer
from effjax.training.runtime import Runtime


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    return [(row['step'], row['loss']) for row in rows(workdir)]


def test_a_run_leaves_its_files(tiny, tmp_path):
    run = train.run(tiny('evals.valid.every_steps=3'), tmp_path / 'run')
    found = {path.name for path in run.workdir.iterdir()}
    assert {'config.json', 'metrics.jsonl', 'summary.json', 'checkpoints', 'report.html'} <= found
    lines = rows(run.workdir)
    assert [row['step'] for row in lines] == [1, 2, 3, 4, 5, 6]
    assert {'loss', 'tokens', 'model_flops', 'hardware_flops', 'seconds', 'lr'} <= set(lines[0])
    assert lines[-1]['tokens'] == 6 * 8 * 32
    assert [row['step'] for row in lines if 'eval' in row] == [3, 6]
    assert lines[-1]['loss'] < lines[0]['loss']
    summary = json.loads((run.workdir / 'summary.json').read_text())
    assert summary['final_step'] == 6 and summary['complete']
    assert summary['eval']['valid'] == lines[-1]['eval']['valid']
    assert summary['ledger']['model_flops'] == lines[-1]['model_flops']
    assert summary['ledger']['hardware_flops'] >= summary['ledger']['model_flops']
    assert summary['ledger']['eval']['passes'] == 2
    assert summary['params'] > 0 and summary['environment']['jax']
    assert summary['execution']['kernels']['attention']
    saved = json.loads((run.workdir / 'config.json').read_text())
    assert saved['model']['vocab_size'] == 257  # what only the data knew


def test_a_signal_saves_and_the_same_command_goes_on(tiny, tmp_path, stop_after):
    whole = train.run(tiny(), tmp_path / 'whole')
    stop_after(3)
    first = train.run(tiny(), tmp_path / 'cut')
    assert first.stopped_by == 'SIGTERM'
    assert 3 <= first.summary['final_step'] < 6 and not first.summary['complete']
    second = train.run(tiny(), tmp_path / 'cut')
    assert second.stopped_by is None and second.summary['final_step'] == 6
    # Bit for bit: the same numbers as without the interruption, each step once.
    assert losses(second.workdir) == losses(whole.workdir)
    assert second.summary['eval'] == whole.summary['eval']
    for key in ('steps', 'tokens', 'model_flops', 'hardware_flops', 'parts'):
        assert second.summary['ledger'][key] == whole.summary['ledger'][key]


@pytest.mark.ci
def test_lost_steps_are_done_again_and_booked_as_waste(tiny, tmp_path, monkeypatch):
    whole = train.run(tiny(), tmp_path / 'whole')
    config = tiny('checkpoint.every_steps=2')
    record = Trainer._record

    def crash(self, flight, *args):
        record(self, flight, *args)
        if flight.row['step'] == 5:
            self._write_row()
            self.writer.flush()
            raise MemoryError('killed')

    monkeypatch.setattr(Trainer, '_record', crash)
    with pytest.raises(MemoryError):
        train.run(config, tmp_path / 'cut')
    monkeypatch.setattr(Trainer, '_record', record)
    assert [step for step, _ in losses(tmp_path / 'cut')] == [1, 2, 3, 4, 5]
    done = train.run(config, tmp_path / 'cut')
    assert losses(done.workdir) == losses(whole.workdir)
    wasted = done.summary['ledger']['wasted']
    assert wasted['steps'] == 1 and wasted['model_flops'] > 0


@pytest.mark.ci
def test_waste_adds_up_over_kills_between_two_checkpoints(tiny, tmp_path, monkeypatch):
    config, record = tiny('checkpoint.every_steps=4', 'evals={}'), Trainer._record

    def killed_at(step):
        def crash(self, flight, *args):
            record(self, flight, *args)
            if flight.row['step'] == step:
                self._write_row()
                self.writer.flush()
                raise MemoryError('killed')

        monkeypatch.setattr(Trainer, '_record', crash)
        with pytest.raises(MemoryError):
            train.run(config, tmp_path)

    killed_at(2)  # before the first checkpoint
    killed_at(5)
    killed_at(6)
    monkeypatch.setattr(Trainer, '_record', record)
    done = train.run(config, tmp_path)
    wasted = done.summary['ledger']['wasted']
    assert wasted['steps'] == 2 + 1 + 2 and wasted['tokens'] == 5 * 8 * 32
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.ci
@pytest.mark.parametrize(('evaluation', 'step'), [(2, 3), (4, 6)])  # in the middle, at the end
def test_evaluations_that_a_signal_cut_short_are_made_up_for(
    tiny, tmp_path, monkeypatch, evaluation, step
):
    config = tiny("evals={'a': {'every_steps': 3}, 'b': {'every_steps': 3}}", 'log.every_steps=2')
    whole = train.run(config, tmp_path / 'whole')
    compile_eval, begun = Runtime.compile_eval, []

    def interrupted(self, one, index):
        begun.append(one.name)
        if len(begun) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return compile_eval(self, one, index)

    monkeypatch.setattr(Runtime, 'compile_eval', interrupted)
    first = train.run(config, tmp_path / 'cut')
    assert first.stopped_by == 'SIGTERM' and first.summary['final_step'] == step
    assert set(rows(first.workdir)[-1]['eval']) == {'a'}
    done = train.run(config, tmp_path / 'cut')
    assert [(r['step'], r.get('eval')) for r in rows(done.workdir)] == [
        (r['step'], r.get('eval')) for r in rows(whole.workdir)
    ]
    assert done.summary['eval'] == whole.summary['eval']
    assert done.summary['ledger']['eval'] == whole.summary['ledger']['eval']


def test_running_a_finished_run_again_changes_nothing(tiny, tmp_path, monkeypatch):
    first = train.run(tiny(), tmp_path)
    before = losses(tmp_path)
    monkeypatch.setattr('effjax.kernels.choice._by_op', {})  # as in another process
    again = train.run(tiny(), tmp_path)
    assert losses(tmp_path) == before
    for key in ('eval', 'ledger', 'params'):
        assert again.summary[key] == first.summary[key]
    # Nothing was compiled this time: what is said of it is what had run.
    assert json.dumps(again.summary['execution']) == json.dumps(first.summary['execution'])
    assert again.summary['memory']['compiled'] == first.summary['memory']['compiled'] is not None
    # Another evaluation is made up for, at the same step.
    judged = train.run(tiny(evals={'valid': {}, 'train': {'split': 'train'}}), tmp_path)
    assert set(judged.summary['eval']) == {'valid', 'train'}
    assert losses(tmp_path) == before
    # A longer run goes on from there.
    more = train.run(tiny('steps=8'), tmp_path)
    assert more.summary['final_step'] == 8 and losses(tmp_path)[:5] == before[:5]


def test_another_config_is_refused(tiny, tmp_path):
    train.run(tiny(), tmp_path)
    with pytest.raises(CheckpointError) as error:
        train.run(tiny('model.width=32'), tmp_path)
    assert 'does not fit the checkpoints' in str(error.value)
    assert 'expected (2, 2, 8, 16)' in str(error.value) and '--workdir' in str(error.value)
    with pytest.raises(CheckpointError) as error:
        train.run(tiny('seed=7'), tmp_path)
    assert 'seed: 0 there, 7 here' in str(error.value)


@pytest.mark.ci
def test_stages_change_shapes_and_keep_the_state(tiny, tmp_path, stop_after):
    config = tiny(
        stages=(
            {'share': 0.5, 'seq_len': 16, 'batch_size': 16},
            {'share': 0.5, 'schedule': {'kind': 'linear', 'peak': 5e-3}},
        )
    )
    whole = train.run(config, tmp_path / 'whole')
    lines = rows(whole.workdir)
    assert [row['stage'] for row in lines] == [0, 0, 0, 1, 1, 1]
    assert list(whole.summary['ledger']['stages']) == ['stage_0', 'stage_1']
    assert lines[3]['lr'] > lines[5]['lr']
    # A resume in the second stage, and one exactly between the two.
    for cut in (3, 4):
        stop_after(cut)
        train.run(config, tmp_path / f'cut{cut}')
        done = train.run(config, tmp_path / f'cut{cut}')
        assert losses(done.workdir) == losses(whole.workdir)


@pytest.mark.ci
@pytest.mark.parametrize(
    ('budget', 'unit', 'amount'),
    [
        ('1536tokens', 'tokens', 1536),
        ('48examples', 'examples', 48),
        ('2e7flops', 'model_flops', 2e7),
    ],
)
def test_budgets_end_at_the_nearest_step(tiny, tmp_path, budget, unit, amount):
    run = train.run(tiny(f'budget={budget}', 'evals={}'), tmp_path)
    ledger, last = run.summary['ledger'], rows(tmp_path)[-1]
    step = ledger[unit] / ledger['steps']
    assert abs(ledger[unit] - amount) <= step / 2
    # Linear to zero: half a step before the end, the rate is half a step's share of the peak.
    assert last['lr'] < 1e-2 * 1.2 * step / amount


def test_a_budget_in_seconds_counts_training_only(tiny, tmp_path):
    run = train.run(tiny('budget=0.3s'), tmp_path)
    clock = run.summary['clock']
    assert run.summary['final_step'] > 3
    assert clock['train'] + clock['data'] < clock['train'] + clock['data'] + clock['compile']
    assert rows(tmp_path)[-1]['lr'] < 2e-3


def test_a_loss_that_is_not_finite_stops_and_names_the_samples(tiny, tmp_path):
    config = tiny('checkpoint.every_steps=2', 'schedule.peak=1e30', 'clip_norm=0', 'evals={}')
    with pytest.raises(TrainingError) as error:
        train.run(config, tmp_path)
    text = str(error.value)
    assert 'not finite at step' in text and 'samples' in text and 'nothing was overwritten' in text


def test_fp16_skips_and_counts_overflows(tiny, tmp_path):
    run = train.run(
        tiny("precision={'kind': 'fp16', 'initial': 1e9}", 'steps=12', 'evals={}'), tmp_path
    )
    lines = rows(tmp_path)
    assert run.summary['ledger']['skipped'] == sum(row['skipped'] for row in lines) > 0
    assert lines[-1]['loss_scale'] < lines[0]['loss_scale']
    assert np.isfinite(lines[-1]['loss'])


def test_ema_is_what_is_judged(tiny, tmp_path):
    plain = train.run(tiny(), tmp_path / 'plain').summary
    averaged = train.run(tiny('ema=0.9'), tmp_path / 'ema').summary
    assert losses(tmp_path / 'plain') == losses(tmp_path / 'ema')
    assert averaged['eval']['valid']['loss'] != plain['eval']['valid']['loss']


@pytest.mark.parametrize(
    ('overrides', 'error', 'message'),
    [
        (['model.mixer.kind=retnett'], ConfigError, "unknown mixer 'retnett'"),
        (['model.mixer.haeds=4'], ConfigError, "Did you mean 'heads'?"),
        (['model.mixer.heads=3'], ConfigError, 'heads'),
        (['optimizer.kind=adamv'], ConfigError, "Did you mean 'adamw'?"),
        (['optimizer.b3=0.9'], ConfigError, "takes no 'b3'"),
        (['schedule.peak=-1.0'], ConfigError, 'peak'),
        (['data.path=/nowhere/at/all'], DataError, '/nowhere/at/all'),
        (['data.kind=txt'], ConfigError, "Did you mean 'text'?"),
        (['mesh.fsdp=64', 'mesh.data=1'], Exception, 'needs 64 devices'),
        (['model.max_len=16'], ConfigError, '16'),
        (['model.vocab_size=100'], ConfigError, 'smaller than the tokenizer, which has 257 ids'),
        (['model.vocab_size=500'], ConfigError, 'larger than the 257 ids of the tokenizer'),
        (['task.kind=classification'], ConfigError, 'reads images'),
        (['evals.valid.every=3'], ConfigError, 'unknown key config.evals.valid.every'),
        (
            ['evals.valid.split=tset'],
            DataError,
            "config.evals.valid.split: the data has no split 'tset'",
        ),
        (['log.wandb=x'], ConfigError, 'wandb'),
        (['task.z_loss=-1.0'], ConfigError, 'config.task.z_loss must not be negative'),
        (['finish.sample_tokens=-1'], ConfigError, 'config.finish.sample_tokens'),
    ],
)
def test_mistakes_stop_before_anything_compiles(
    tiny, tmp_path, monkeypatch, overrides, error, message
):
    monkeypatch.setattr(
        'effjax.training.runtime.compile_train', lambda *a, **k: pytest.fail('it compiled')
    )
    with pytest.raises(error) as caught:
        train.run(tiny(*overrides), tmp_path)
    assert message in str(caught.value)


def test_an_unwritable_folder(tiny, tmp_path):
    file = tmp_path / 'file'
    file.write_text('')
    with pytest.raises(ConfigError, match='cannot write to the work folder'):
        train.run(tiny(), file / 'run')


def command(*args: str, **kw) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, '-m', 'effjax.train', *args], capture_output=True, text=True, **kw
    )


@pytest.mark.process
def test_the_command_says_one_line(repository, tmp_path):
    config = str(repository / 'configs' / 'quickstart.py')
    bad = command(f'--config={config}', '--config.modle.width=3')
    assert bad.returncode == 1 and bad.stdout == ''
    assert bad.stderr == "error: unknown key config.modle. Did you mean 'model'?\n"
    shown = command(f'--config={config}', '--config.modle.width=3', '--traceback')
    assert shown.returncode == 1 and 'Traceback' in shown.stderr
    printed = command(f'--config={config}', '--config.seed=5', '--print_config')
    assert json.loads(printed.stdout)['seed'] == 5
    unknown = command(f'--config={config}', '--wrokdir=x')
    assert "Did you mean '--workdir'?" in unknown.stderr


def write_config(tmp_path: pathlib.Path, words: pathlib.Path, steps: int) -> pathlib.Path:
    file = tmp_path / 'small.py'
    file.write_text(
        f"""
from effjax.core.config import defaults

def get_config():
    config = defaults()
    config.steps = {steps}
    config.batch_size = 8
    config.seq_len = 32
    config.data = dict(kind='text', path={str(words)!r}, tokenizer=dict(kind='byte'))
    config.model = dict(kind='decoder', width=16, layers=2, mixer=dict(kind='attention', heads=2),
                        ffn=dict(kind='swiglu', hidden=32), dropout=0.1)
    config.schedule = dict(kind='linear', peak=1e-2)
    config.precision.kind = 'fp32'
    config.checkpoint.every_steps = 20
    config.log.tensorboard = False
    config.evals.valid = dict(every_steps=50)
    return config
"""
    )
    return file


def killed_after(command_line: list[str], workdir: pathlib.Path, step: int) -> None:
    """Starts a run and kills it with SIGKILL as soon as its metrics show a step."""
    import time

    process = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = workdir / 'checkpoints'
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        steps = [int(p.name) for p in file.glob('*') if p.name.isdigit()] if file.exists() else []
        if steps and max(steps) >= step:
            break
        time.sleep(0.002)
    process.kill()
    process.wait()


@pytest.mark.process
def test_kill_at_random_moments_and_resume_is_bit_exact(words, tmp_path):
    config = write_config(tmp_path, words, 400)
    whole = command(f'--config={config}', f'--workdir={tmp_path}/whole')
    assert whole.returncode == 0, whole.stderr
    cut = tmp_path / 'cut'
    line = [sys.executable, '-m', 'effjax.train', f'--config={config}', f'--workdir={cut}']
    for step in (40, 200):  # twice in one run: before and during its middle
        killed_after(line, cut, step)
    done = command(*line[3:])
    assert done.returncode == 0, done.stderr
    assert 'resumed from step' in done.stdout + done.stderr
    assert losses(cut) == losses(tmp_path / 'whole')
    summary = json.loads((cut / 'summary.json').read_text())
    assert summary['eval'] == json.loads((tmp_path / 'whole' / 'summary.json').read_text())['eval']


@pytest.mark.parametrize('on_error', ['continue', 'stop'])
def test_a_save_that_fails(tiny, tmp_path, monkeypatch, on_error):
    from effjax.training.checkpoints import Checkpointer

    save, failed = Checkpointer.save, []

    def fail_once(self, step, *args, **kw):
        if not failed:
            failed.append(step)
            raise CheckpointError('the checkpoint could not be written: no space left.')
        save(self, step, *args, **kw)

    monkeypatch.setattr(Checkpointer, 'save', fail_once)
    config = tiny('checkpoint.every_steps=2', f'checkpoint.on_error={on_error}')
    if on_error == 'stop':
        with pytest.raises(CheckpointError, match='no space left'):
            train.run(config, tmp_path)
        return
    done = train.run(config, tmp_path)
    assert failed == [2] and done.summary['final_step'] == 6
    assert 'no space left' in done.summary['warnings'][0]
    assert (tmp_path / 'checkpoints' / '6').is_dir()


def test_a_stage_may_not_change_the_tokenizer(tiny, tmp_path):
    config = tiny(stages=({'share': 0.5}, {'share': 0.5, 'data': {'tokenizer': {'kind': 'char'}}}))
    with pytest.raises(ConfigError, match=r'config.stages.1.data'):
        train.run(config, tmp_path)


def test_a_stage_may_not_change_the_form_of_the_optimizers_state(tiny):
    def staged(**settings):
        return as_dict(tiny(stages=({'share': 0.5}, {'share': 0.5, 'optimizer': settings})))

    message = r'config\.stages\.1\.optimizer changes the form .* is bfloat16, expected float32'
    with pytest.raises(ConfigError, match=message):
        Runtime(staged(mu_dtype='bfloat16'))
    Runtime(staged(b2=0.9, nesterov=True))  # what is not stored may change


def test_run_picks_a_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = train.run(tiny('steps=1', 'evals={}'))
    assert run.workdir.parent.name == 'runs' and run.workdir.name.startswith('tiny-')


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(tiny, tmp_path, capfd):
    config = tiny('checkpoint.every_steps=2', 'steps=4')
    first = train.run(config, tmp_path)
    newest = tmp_path / 'checkpoints' / '4' / 'state'
    file = max((f for f in newest.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = losses(tmp_path)
    again = train.run(config, tmp_path)
    assert 'warning: checkpoint not used: step 4' in capfd.readouterr().err
    assert 'step 4' in again.summary['warnings'][0]
    assert losses(tmp_path) == before and again.summary['eval'] == first.summary['eval']
    assert again.summary['ledger']['wasted']['steps'] == 2


def test_the_very_first_step_may_fail(tiny, tmp_path):
    with pytest.raises(TrainingError) as error:
        train.run(tiny('task.z_loss=1e38'), tmp_path)
    text = str(error.value)
    assert 'not finite at step 1 ' in text and 'text@' in text and 'no checkpoint yet' in text


def test_the_last_row_has_its_evaluation_though_a_save_is_due(tiny, tmp_path):
    train.run(tiny('checkpoint.every_steps=2', 'steps=4'), tmp_path)
    assert 'eval' in rows(tmp_path)[-1]


@pytest.mark.ci
def test_sequences_may_grow_between_stages(tiny, tmp_path):
    config = tiny('seq_len=16', stages=({'share': 0.5}, {'share': 0.5, 'seq_len': 32}))
    done = train.run(config, tmp_path)
    tokens = [row['tokens'] for row in rows(tmp_path)]
    assert tokens == [128, 256, 384, 640, 896, 1152]
    assert done.summary['ledger']['eval']['tokens'] % 32 == 0


@pytest.mark.ci
def test_what_may_change_on_resume_is_told(tiny, tmp_path, words, capfd):
    stages = ({'share': 0.5}, {'share': 0.5, 'batch_size': 16})
    train.run(tiny(stages=stages), tmp_path)
    same = f'{words.parent}/./{words.name}'
    done = train.run(tiny(f'data.path={same}', 'steps=8', 'schedule.peak=0.1'), tmp_path)
    assert done.summary['final_step'] == 8
    told = capfd.readouterr().err
    assert 'warning: resumed with another setting: schedule.peak: 0.01 there, 0.1 here' in told
    assert 'absl' not in told


def test_a_compiler_option_that_is_not_there(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r'config.execution.compiler_options.*foo'):
        train.run(tiny('execution.compiler_options.foo=1'), tmp_path)
