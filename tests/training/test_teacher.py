"""A run with a teacher: charged, resumed without its folder, refused before anything compiles."""

import json
import os
import pathlib
import shutil
import signal

import chex
import numpy as np
import pytest

from effjax import generate, train
from effjax.core.cost import total
from effjax.core.errors import CheckpointError, ConfigError
from effjax.training import setup
from effjax.training.batched import run_batched
from effjax.training.dryrun import dry_run
from effjax.training.loop import Trainer
from effjax.training.runtime import Runtime

SMALL = {
    'kind': 'decoder', 'width': 8, 'layers': 1, 'mixer': {'kind': 'attention', 'heads': 1},
    'ffn': {'kind': 'swiglu', 'hidden': 16},
}  # fmt: skip
RUNS: dict[str, pathlib.Path] = {}


@pytest.fixture
def teacher(tiny, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished run with a moving average, the same for all tests."""
    if 'one' not in RUNS:
        config = tiny('steps=2', 'ema=0.5', model=SMALL, evals={})
        RUNS['one'] = train.run(config, tmp_path_factory.mktemp('teachers') / 'one').workdir
    return RUNS['one']


def student(tiny, run, *overrides, charge=False, stages=(), **options):
    task = {'kind': 'distillation', 'teacher': {'run': str(run), 'charge': charge}, **options}
    return tiny('steps=4', *overrides, task=task, evals={}, stages=stages)


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
    return [(row['step'], row['loss'], row.get('alpha')) for row in rows(workdir)]


def changed(teacher, folder, file, change):
    """Copies a run and changes one of its small files."""
    shutil.copytree(teacher, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_charged_until_it_is_not_needed(tiny, teacher, tmp_path):
    """Two steps with the teacher, then two that are a plain run's; its weights are those judged."""
    config = student(tiny, teacher, alpha=0.5, until=0.7)
    trainer = Trainer(config, tmp_path / 'run')
    assert trainer.run() is None
    found = rows(tmp_path / 'run')
    np.testing.assert_allclose(
        [row.get('alpha', 0.0) for row in found],
        [0.5 * (1 - 0.25 / 0.7), 0.5 * (1 - 0.5 / 0.7), 0, 0],
        rtol=1e-5,
    )
    runtime, ledger = trainer.runtime, trainer.ledger.totals()
    stage = runtime.stages[0]
    plain = sum(c.train_flops for c in runtime.costs(stage).values())
    forward = total(runtime.task.inner.cost(runtime.frozen['teacher'].model, 8, 32).values())
    assert ledger['parts']['teacher'] == 2 * forward.model_flops
    assert ledger['model_flops'] == 4 * plain + 2 * forward.model_flops
    executed = np.diff([0, *(row['hardware_flops'] for row in found)])
    assert executed[0] == executed[1] > executed[2] == executed[3]
    assert found[1]['model_flops'] - found[0]['model_flops'] == runtime.step_flops(stage)
    judged = generate.load(teacher).arrays  # the average
    chex.assert_trees_all_equal(trainer.state['frozen']['teacher'], judged)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_resumed_without_the_teachers_folder(tiny, teacher, tmp_path, monkeypatch):
    shutil.copytree(teacher, tmp_path / 'teacher')
    config = student(tiny, tmp_path / 'teacher', charge=True, until=0.8)
    whole = train.run(config, tmp_path / 'whole').summary
    record = Trainer._record

    def wrapped(self, flight, *args):
        record(self, flight, *args)
        if flight.row['step'] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, '_record', wrapped)
        first = train.run(config, tmp_path / 'cut')
    assert first.stopped_by == 'SIGTERM' and first.summary['final_step'] < 4
    shutil.rmtree(tmp_path / 'teacher')
    done = train.run(config, tmp_path / 'cut').summary
    assert losses(tmp_path / 'cut') == losses(tmp_path / 'whole')
    for key in ('ledger', 'teacher'):
        assert done[key] == whole[key]
    assert done['teacher']['charge'] and done['teacher']['step'] == 2
    used = json.loads((teacher / 'summary.json').read_text())['ledger']
    entry = done['ledger']['sources']['teacher']
    for key in ('model_flops', 'hardware_flops', 'tokens', 'examples'):
        assert entry[key] == used[key] == done['teacher']['used'][key]
    assert entry['charged'] and done['ledger']['steps'] == 4
    assert generate.load(tmp_path / 'cut').step == 4
    with pytest.raises(ConfigError, match='holds no run'):  # a new run needs it
        train.run(config, tmp_path / 'new')
    other = student(tiny, tmp_path / 'teacher', charge=True, until=0.9)
    with pytest.raises(CheckpointError, match=r'task\.until: 0\.8 there, 0\.9 here'):
        train.run(other, tmp_path / 'cut')


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_without_alpha_it_is_the_plain_run(tiny, teacher, tmp_path):
    ours = Trainer(student(tiny, teacher, 'batch_size=4', alpha=0.0), tmp_path / 'ours')
    plain = Trainer(tiny('steps=4', 'batch_size=4', evals={}), tmp_path / 'plain')
    ours.run(), plain.run()
    chex.assert_trees_all_equal(ours.state['params'], plain.state['params'])
    assert losses(tmp_path / 'ours') == losses(tmp_path / 'plain')
    # The teacher is noted, and not counted.
    assert ours.ledger.totals() | {'sources': {}} == plain.ledger.totals()


def test_what_its_training_cost_counts_where_that_is_asked(tiny, teacher, tmp_path):
    used = json.loads((teacher / 'summary.json').read_text())['ledger']
    spec = f'budget={3 * used["model_flops"]}flops'
    for charge, expected in ((True, used['model_flops']), (False, 0)):
        config = student(tiny, teacher, spec, 'steps=0', charge=charge)
        trainer = Trainer(config, tmp_path / str(charge))
        assert trainer.ledger.model_flops == expected
        assert trainer.ledger.steps == 0 and trainer.ledger.computed == (0, 0)
        assert trainer.runtime.config['task']['teacher']['used']['tokens'] == used['tokens']


def test_the_run_may_name_the_seed_and_dry_run_shows_the_teacher(tiny, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / 'seed7')
    config = student(tiny, tmp_path / 'seed{seed}', 'seed=7')
    assert Runtime(config).config['task']['teacher']['run'] == str(tmp_path / 'seed7')
    assert 'and of the teacher, forward alone, ' in dry_run(config)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_handed_on_across_stages_that_grow(tiny, teacher, tmp_path):
    stages = (
        {'share': 0.5, 'model': {'layers': 1}},
        {'share': 0.5, 'grow': 'stack'},
    )
    trainer = Trainer(student(tiny, teacher, stages=stages), tmp_path)
    trainer.run()
    assert [row['stage'] for row in rows(tmp_path)] == [0, 0, 1, 1]
    judged = generate.load(teacher).arrays
    chex.assert_trees_all_equal(trainer.state['frozen']['teacher'], judged)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_lanes_have_their_own_teachers(tiny, teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / 'teacher0')
    other = tiny('steps=2', 'ema=0.5', 'seed=1', model=SMALL, evals={})
    train.run(other, tmp_path / 'teacher1')
    runs = tmp_path / 'teacher{seed}'
    configs = [student(tiny, runs, f'seed={s}', charge=True, until=0.7) for s in (0, 1)]
    lanes = run_batched(configs, [tmp_path / f'lane{s}' for s in (0, 1)])
    alone = train.run(configs[1], tmp_path / 'alone').summary
    assert lanes[1]['ledger'] == alone['ledger'] and lanes[1]['teacher'] == alone['teacher']
    assert lanes[0]['teacher'] != lanes[1]['teacher']
    got, expected = ([row['loss'] for row in rows(tmp_path / name)] for name in ('lane1', 'alone'))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.mesh
def test_the_same_on_a_mesh(tiny, teacher, tmp_path):
    for name, mesh in (('mesh', ('mesh.data=2', 'mesh.fsdp=4')), ('one', ('mesh.data=1',))):
        train.run(student(tiny, teacher, 'model.layers=1', *mesh), tmp_path / name)
    got, expected = ([row['loss'] for row in rows(tmp_path / name)] for name in ('mesh', 'one'))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_a_teacher_that_has_changed_since_is_refused(tiny, teacher, tmp_path):
    folder = changed(teacher, tmp_path / 'x', 'config.json', lambda c: None)
    runtime = Runtime(student(tiny, folder))
    shutil.rmtree(folder)
    wide = tiny('steps=2', model={**SMALL, 'width': 16}, evals={})
    train.run(wide, folder)
    with pytest.raises(CheckpointError, match='is not the one that this run was begun with'):
        runtime.initial_state()


def set_in(*path):
    """Returns a change: the last of `path` is the value, what stands before it the keys."""
    *keys, last, value = path

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ('file', 'change', 'options', 'message'),
    [
        (
            'summary.json', set_in('complete', False), (),
            'is not finished; go on with it by its own command',
        ),
        (
            'summary.json', set_in('data', 'tokenizer', 'digest', '0'), (),
            'had another tokenizer, by which the same ids mean another text',
        ),
        (
            'config.json', set_in('model', 'vocab_size', 300), (),
            'has vocab_size 300, but this one has 257',
        ),
        (
            'config.json', set_in('model', 'kind', 'encoder'), (),
            "holds a 'encoder', but task 'next_token' takes a 'decoder'",
        ),
        (
            'config.json', set_in('seq_len', 16), (),
            r'takes rows of 16 tokens, but this run has config\.seq_len 32',
        ),
        ('config.json', set_in('seed', 0), ('steps=0', 'budget=500tokens'),
         'the teacher used 512 tokens, and the first stage ends at 500'),
        ('config.json', set_in('seed', 0), ('steps=0', 'budget=9s'),
         'what the teacher used is not known in seconds'),
        ('config.json', set_in('seed', 0), ('reference=x.json',),
         "a table of reference time knows no teacher's forward pass"),
    ],
)  # fmt: skip
def test_refused(tiny, teacher, tmp_path, file, change, options, message):
    folder = changed(teacher, tmp_path / 'x', file, change)
    with pytest.raises(ConfigError, match=message):
        Runtime(student(tiny, folder, *options, charge=True))


def test_refused_without_a_run_or_a_checkpoint(tiny, teacher, tmp_path):
    with pytest.raises(ConfigError, match=r'teacher\.run: .* holds no run \(no config\.json\)'):
        Runtime(student(tiny, tmp_path / 'none'))
    folder = changed(teacher, tmp_path / 'x', 'config.json', lambda c: None)
    for file in (folder / 'checkpoints').rglob('*'):
        if file.is_file() and 'd/' in file.as_posix():
            file.write_bytes(b'damaged')
    with pytest.raises(ConfigError, match='has no valid checkpoint; train it again'):
        Runtime(student(tiny, folder))
    with pytest.raises(ConfigError, match=r'task\.task\.kind|reads images'):
        setup.check(student(tiny, teacher, task={'kind': 'classification'}))
    with pytest.raises(ConfigError, match='temperature: expected float'):
        setup.check(student(tiny, teacher, temperature='hot'))
