"""Running a study: what is missing runs, what is done stays, foreign results are refused."""

import dataclasses
import json

import pytest

from effjax.core.errors import StudyError, TrainingError
from effjax.study import compare as studies
from effjax.study import execute, plan, preflight, records, store
from effjax.study.records import Cell, analysis_from_json
from effjax.study.spec import Arm, Study

RESOLVED = {'mesh': {}, 'stages': [], 'log': {'wandb': ''}}
FACTS = preflight.Facts(1000, 1e6, 100, 'same', {}, RESOLVED)


@pytest.fixture
def study():
    return Study(
        name='fake',
        config='configs/lm.py',
        arms=(Arm('base'), Arm('new', ('model.width=32',))),
        axis='steps',
        budget=200.0,
        seeds=(0, 1, 2),
        fractions=(0.5, 1.0),
        grid=(1e-3, 2e-3, 4e-3),
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training by a formula; returns the list of folders that were trained."""
    done = []

    def train(config, workdir):
        done.append(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        steps, peak = config['steps'], config['schedule']['peak']
        width = config['model']['width']
        loss = 5 - 0.1 * (width == 32) + 30 / steps + abs(peak - 2e-3) * 10
        loss += 0.01 * config['seed'] % 7 + 1e-3 * (config['seed'] * width % 5)
        costs = {
            'steps': steps, 'tokens': 10 * steps, 'tokens_computed': 10 * steps,
            'examples': steps, 'model_flops': 1e6 * steps, 'hardware_flops': None,
            'optimizer_flops': 5, 'reference_seconds': None,
        }  # fmt: skip
        kinds = ('compile', 'train', 'eval', 'checkpoint', 'data', 'other')
        clock = dict.fromkeys(kinds, 1.0)
        summary = {
            'eval': {'valid': {'loss': loss}}, 'ledger': costs, 'params': 1000, 'joules': None,
            'clock': {**clock, 'data': 0.01, 'device_seconds': dict(clock)}, 'complete': True,
            'environment': {'device': 'cpu', 'backend': 'cpu', 'jax': '0'}, 'memory': {},
            'data': {'source': 'made up'},
        }  # fmt: skip
        (workdir / 'summary.json').write_text(json.dumps(summary))
        row = {'step': steps, 'tokens': 10 * steps, 'eval': summary['eval']}
        (workdir / 'metrics.jsonl').write_text(json.dumps(row) + '\n{"cut')
        return summary, None

    monkeypatch.setattr('effjax.training.session.train', train)
    monkeypatch.setattr(execute, 'share_programs', lambda: None)
    monkeypatch.setattr(preflight, 'examine', lambda study: {arm.name: FACTS for arm in study.arms})
    monkeypatch.chdir(plan.pathlib.Path(__file__).parents[2])
    return done


def run(study, folder, **options):
    lines = []
    given = studies.Options(probe=False, **options)
    study = dataclasses.replace(study, batched=False)
    return studies.compare(study, folder, given, say=lines.append), lines


def test_a_study_runs_tunes_and_judges(study, trained, tmp_path):
    found, lines = run(study, tmp_path)
    assert len(trained) == 2 * 3 + 2 * 2 * 3
    assert found.arms['new']['tuning'].chosen == 2e-3
    assert not found.arms['new']['tuning'].edge
    assert found.comparisons[0].verdict == 'win'
    assert [arm['commands'] for arm in found.arms.values()] == [
        [
            'python -m effjax.train --config=configs/lm.py '
            f'{change}--config.schedule.peak=0.002 --config.seed=0 --config.steps=200'
        ]
        for change in ('', '--config.model.width=32 ')
    ]
    assert found.scale == '1.000 k parameters, 2.000 k tokens of made up'
    assert lines[0].startswith('fake: 18 runs: 2 arms x 3 seeds x 2 budgets')
    assert analysis_from_json(json.loads((tmp_path / 'analysis.json').read_text())) == found
    assert (tmp_path / 'report.html').exists()
    assert (tmp_path / 'report.md').read_text().startswith(found.comparisons[0].sentence[:20])


def test_the_same_command_runs_nothing_again(study, trained, tmp_path):
    first, _ = run(study, tmp_path)
    count = len(trained)
    again, _ = run(study, tmp_path)
    assert len(trained) == count
    assert again == first


def test_a_killed_study_goes_on_with_what_is_missing(study, trained, tmp_path, monkeypatch):
    whole, _ = run(study, tmp_path / 'whole')
    train = execute.run_jobs.__globals__['store'].begin
    count = 0

    def killed(*args):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt  # as a signal between two runs
        train(*args)

    monkeypatch.setattr(store, 'begin', killed)
    with pytest.raises(KeyboardInterrupt):
        run(study, tmp_path / 'cut')
    monkeypatch.setattr(store, 'begin', train)
    before = len(trained)
    found, _ = run(study, tmp_path / 'cut')
    assert len(trained) - before == 18 - 8
    assert found.comparisons == whole.comparisons


def test_a_run_cut_in_the_middle_is_run_again(study, trained, tmp_path):
    run(study, tmp_path)
    note = next((tmp_path / 'runs' / 'new' / 'final').rglob('cell.json'))
    told = json.loads(note.read_text())
    note.write_text(json.dumps({**told, 'status': 'running'}))
    before = len(trained)
    run(study, tmp_path)
    assert trained[before:] == [note.parent]


def test_results_of_another_config_are_refused(study, trained, tmp_path):
    run(study, tmp_path)
    arms = (Arm('base'), Arm('new', ('model.width=64',)))
    with pytest.raises(StudyError, match=r'holds the result of another config.*another --out'):
        run(dataclasses.replace(study, arms=arms), tmp_path)


@pytest.mark.ci
def test_results_of_another_code_version_are_refused_or_told(study, trained, tmp_path, monkeypatch):
    run(study, tmp_path)
    monkeypatch.setattr(plan, 'code_version', lambda: 'other')
    with pytest.raises(StudyError, match=r'another version of the code .*--any_code'):
        run(study, tmp_path)
    found, _ = run(dataclasses.replace(study, seeds=(0, 1, 2, 3)), tmp_path, any_code=True)
    assert any('made by 2 versions of the code' in note for note in found.notes)


def test_a_run_that_goes_on_keeps_the_versions_of_its_code(study, repository, tmp_path):
    job = plan.final(study, study.baseline, {})[0].jobs[0]
    store.begin(job, tmp_path, 'one')
    store.begin(job, tmp_path, 'two')  # killed before its first checkpoint: begins again
    assert store.codes_of(job, tmp_path) == ['two']
    (tmp_path / job.folder / 'checkpoints' / '10').mkdir(parents=True)
    store.begin(job, tmp_path, 'three')
    store.end(job, tmp_path, 'three', 'done')
    assert store.codes_of(job, tmp_path) == ['two', 'three']
    assert store.note(job, tmp_path)['code'] == 'three'


@pytest.mark.ci
@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('data', 'was made before the training data changed: stdlib holds something else now'),
        ('evaluation valid', 'was made before the held-out data changed: stdlib holds'),
        ('reference', 'was made before the table of reference time changed: table.json holds'),
    ],
)
def test_results_of_other_content_are_refused(study, trained, tmp_path, monkeypatch, key, message):
    def holds(digest):
        inputs = {'data': 'a', 'evaluation valid': 'b', 'reference': 'c', key: digest}
        fact = dataclasses.replace(FACTS, inputs=inputs)
        monkeypatch.setattr(
            preflight, 'examine', lambda study: dict.fromkeys(('base', 'new'), fact)
        )

    study = dataclasses.replace(study, overrides=('reference=table.json',))
    holds('old')
    run(study, tmp_path)
    note = json.loads(next(tmp_path.rglob('cell.json')).read_text())
    assert note['inputs'][key] == 'old'
    holds('new')
    with pytest.raises(StudyError, match=message) as refused:
        run(study, tmp_path, any_code=True)
    assert 'digest old then, new now' in str(refused.value) and '--out' in str(refused.value)


def test_notes_of_before_name_no_content_and_are_taken(study, trained, tmp_path, monkeypatch):
    first, _ = run(study, tmp_path)
    for file in tmp_path.rglob('cell.json'):
        old = json.loads(file.read_text())
        del old['codes'], old['inputs']
        file.write_text(json.dumps(old))
    fact = dataclasses.replace(FACTS, inputs={'data': 'a'})
    monkeypatch.setattr(preflight, 'examine', lambda study: dict.fromkeys(('base', 'new'), fact))
    count = len(trained)
    assert run(study, tmp_path)[0] == first and len(trained) == count


def test_runs_judged_on_different_data_are_not_reported(study, trained, tmp_path):
    run(study, tmp_path)
    for arm in ('base', 'new'):
        for file in (tmp_path / 'runs' / arm).rglob('cell.json'):
            told = json.loads(file.read_text())
            file.write_text(json.dumps({**told, 'inputs': {'evaluation valid': arm}}))
    with pytest.raises(StudyError, match=r'were judged on different held-out data.*another --out'):
        studies.report(study, tmp_path)


def test_more_seeds_run_only_what_is_new(study, trained, tmp_path):
    run(study, tmp_path)
    before = len(trained)
    run(dataclasses.replace(study, seeds=(0, 1, 2, 3)), tmp_path)
    assert len(trained) - before == 2 * 2


def test_failures_are_noted_and_the_rest_goes_on(study, trained, tmp_path, monkeypatch):
    whole = execute._run_one.__globals__['store']
    assert whole is store
    import effjax.training.session as session

    train = session.train

    def some_fail(config, workdir):
        if config['model']['width'] == 32 and config['seed'] == 1:
            raise TrainingError('the loss is not finite at step 3')
        if config['model']['width'] == 32 and config['seed'] == 2:
            raise RuntimeError('broken\non the device')
        return train(config, workdir)

    monkeypatch.setattr(session, 'train', some_fail)
    found, lines = run(study, tmp_path)
    states = {(c.seed, c.status) for c in found.cells if c.arm == 'new' and c.phase == 'final'}
    assert states == {(0, 'done'), (1, 'diverged'), (2, 'failed')}
    assert found.comparisons[0].verdict == 'failed'
    assert 'RuntimeError: broken on the device (traceback in' in str([c.error for c in found.cells])
    assert any('diverged: the loss is not finite' in line for line in lines)
    monkeypatch.setattr(session, 'train', train)
    assert run(study, tmp_path)[0].comparisons[0].verdict == 'failed'  # not retried unasked
    assert run(study, tmp_path, retry_failed=True)[0].comparisons[0].verdict == 'win'


def test_a_failed_run_keeps_its_traceback(study, trained, tmp_path, monkeypatch):
    import effjax.training.session as session

    train = session.train

    def fail(config, workdir):
        if config['model']['width'] == 32 and config['seed'] == 1 and config['steps'] == 200:
            raise KeyError('nowhere')
        return train(config, workdir)

    monkeypatch.setattr(session, 'train', fail)
    found, lines = run(study, tmp_path)
    (cell,) = (c for c in found.cells if c.status == 'failed')
    assert cell.error == f"KeyError: 'nowhere' (traceback in {cell.workdir}/error.txt)"
    assert f'    seed 1 failed: {cell.error}' in lines
    trace = (tmp_path / cell.workdir / 'error.txt').read_text()
    assert trace.startswith('Traceback') and "raise KeyError('nowhere')" in trace
    monkeypatch.setattr(session, 'train', train)
    run(study, tmp_path, retry_failed=True)
    assert not list(tmp_path.rglob('error.txt'))


@pytest.mark.ci
def test_runs_that_fail_alike_stop_the_study(study, trained, tmp_path, monkeypatch):
    import effjax.training.session as session

    def fail(config, workdir):
        tried.append(workdir)
        raise RuntimeError(f'no such device at 0x{config["seed"]}')

    train, tried = session.train, []
    monkeypatch.setattr(session, 'train', fail)
    message = r'^3 times in a row runs failed alike: RuntimeError: no such device.*--retry_failed'
    with pytest.raises(StudyError, match=message):
        run(study, tmp_path)
    assert len(tried) == 3
    monkeypatch.setattr(session, 'train', train)
    assert run(study, tmp_path)[0].arms['base']['tuning'] is None  # they stay, unasked
    assert run(study, tmp_path, retry_failed=True)[0].comparisons[0].verdict == 'win'


@pytest.mark.ci
@pytest.mark.parametrize('kind', ['other', 'between', 'diverged'])
def test_errors_that_differ_or_runs_between_stop_nothing(
    study, trained, tmp_path, monkeypatch, kind
):
    import effjax.training.session as session

    train, count = session.train, iter(range(100))

    def fail(config, workdir):
        i = next(count)
        if kind == 'between' and i % 3 == 2:
            return train(config, workdir)
        if kind == 'diverged':
            raise TrainingError('the loss is not finite')
        raise RuntimeError(f'error {"ab"[i % 2] if kind == "other" else ""}')

    monkeypatch.setattr(session, 'train', fail)
    run(study, tmp_path)
    assert next(count) == 18


@pytest.mark.parametrize('what', ['RESOURCE_EXHAUSTED: Out of memory allocating', 'bug'])
def test_a_group_too_large_for_memory_is_run_one_by_one(
    study, trained, tmp_path, monkeypatch, what
):
    asked = []

    def run_batched(configs, folders):
        asked.append(len(configs))
        raise RuntimeError(what)

    monkeypatch.setattr('effjax.training.batched.run_batched', run_batched)
    lines: list[str] = []
    study = dataclasses.replace(study, batched=True, tune_key='', fractions=(1.0,))
    found = studies.compare(study, tmp_path, studies.Options(probe=False), say=lines.append)
    assert asked == [3, 3]
    remark = 'a group of 3 did not fit into memory: run by itself'
    if what == 'bug':
        assert trained == [] and found.comparisons[0].verdict == 'failed'
        assert {c.error for c in found.cells} == {
            f'RuntimeError: bug (traceback in {c.workdir}/error.txt)' for c in found.cells
        }
        return
    assert len(trained) == 6 and found.comparisons[0].verdict == 'win'
    assert f'    seed 2: {remark}' in lines
    assert f'6 runs: {remark}.' in found.notes


def test_an_arm_whose_tuning_fails_is_shown(study, trained, tmp_path, monkeypatch):
    import effjax.training.session as session

    train = session.train

    def fail(config, workdir):
        if config['model']['width'] == 32:
            raise TrainingError('not finite')
        return train(config, workdir)

    monkeypatch.setattr(session, 'train', fail)
    found, _ = run(study, tmp_path)
    assert found.arms['new']['tuning'] is None
    assert any('no value of its grid ended well' in n for n in found.comparisons[0].notes)


@pytest.mark.parametrize('axis', ['seconds', 'joules', 'hardware_flops'])
def test_a_budget_that_only_running_tells_is_checked_by_the_probes(study, axis):
    timed = dataclasses.replace(study, axis=axis, budget=100.0, fractions=(0.5, 1.0))
    probe = Cell('base', 'probe', 0, 0.05, {}, 'done', costs={'steps': 20.0, axis: 5.0})
    unknown = dataclasses.replace(FACTS, steps=None)
    facts = {'base': unknown, 'new': dataclasses.replace(unknown, step_flops=1.5e6)}
    preflight.reach(timed, facts, [])  # nothing has run
    preflight.reach(timed, dict.fromkeys(facts, unknown), [probe])  # 400 steps, 100 for tuning
    preflight.reach(dataclasses.replace(timed, least_steps=66), facts, [probe])
    with pytest.raises(StudyError, match=r"arm 'new' cannot.* about 267 of its steps \(67 in the"):
        preflight.reach(dataclasses.replace(timed, least_steps=70), facts, [probe])
    slow = dataclasses.replace(probe, costs={'steps': 2.0, axis: 5.0})
    with pytest.raises(StudyError, match=r"'base' cannot .* about 40 of its steps \(10 in the"):
        preflight.reach(timed, facts, [slow])


def test_stages_are_batched_unless_each_run_has_its_own(study):
    def batched(batched=None, **config) -> bool:
        facts = {'base': dataclasses.replace(FACTS, resolved={**RESOLVED, **config})}
        return preflight.batched(dataclasses.replace(study, batched=batched), facts)

    assert batched(stages=[{'share': 0.5}, {'share': 0.5, 'grow': 'stack'}])
    until = [{'share': 0.5, 'until': {'slope': -0.1}}, {'share': 0.5}]
    source = {'run': 'there', 'charge': False}
    assert not batched(stages=until) and not batched(init_from=source)
    with pytest.raises(StudyError, match="'base': until ends a stage by its own run's loss; use"):
        batched(True, stages=until)
    with pytest.raises(StudyError, match='begin from fresh values, not from init_from; use'):
        batched(True, stages=[{'share': 1.0, 'init_from': source}])


def test_too_small_a_budget_in_seconds_stops_after_the_probes(
    study, trained, tmp_path, monkeypatch
):
    import effjax.training.session as session

    train, facts = session.train, dataclasses.replace(FACTS, steps=None)
    monkeypatch.setattr(session, 'train', lambda c, w: train({**c, 'steps': 2}, w))  # in a second
    monkeypatch.setattr(preflight, 'examine', lambda study: {a.name: facts for a in study.arms})
    timed = dataclasses.replace(study, axis='seconds', budget=100.0, batched=False)
    with pytest.raises(StudyError, match=r"arm 'base' cannot reach the budget: 100 training time"):
        studies.compare(timed, tmp_path, studies.Options(), say=lambda _: None)
    assert len(trained) == plan.PROBES


def test_probes_of_another_budget_or_code_are_made_again(study, trained, tmp_path, monkeypatch):
    def probed(study):
        options, before = studies.Options(), len(trained)
        monkeypatch.setattr(plan, 'tuning', lambda study: [])  # as killed after the probes
        monkeypatch.setattr(studies, '_finals', lambda study, cells: [])
        with monkeypatch.context() as only:
            only.setattr(studies, 'report', lambda *args: None)
            studies.compare(study, tmp_path, options, say=lambda line: None)
        return len(trained) - before

    study = dataclasses.replace(study, batched=False, tune_key='', budget=2000.0)
    assert probed(study) == plan.PROBES
    assert probed(study) == 0
    assert probed(dataclasses.replace(study, budget=4000.0)) == plan.PROBES
    monkeypatch.setattr(plan, 'code_version', lambda: 'other')
    assert probed(dataclasses.replace(study, budget=4000.0)) == plan.PROBES


def test_only_judged_runs_are_evaluated_on_their_way(study, repository, trained, tmp_path):
    overrides = ("evals={'valid': {'every_share': 0.1}, 'test': {'every_steps': 5}}",)
    study = dataclasses.replace(study, overrides=overrides)
    final = plan.final(study, study.baseline, {})[-1].jobs[0]
    assert final.trained is final.config and final.config['evals']['valid']['every_share'] == 0.1
    for group in (plan.probes(study), *plan.tuning(study)):
        for job in group.jobs:
            assert all(
                block['every_share'] == block['every_steps'] == 0
                for block in job.trained['evals'].values()
            )
            assert {**job.trained, 'evals': job.config['evals']} == job.config
            # A stored result stays one of this study: nothing but the curve differs.
            assert job.config['evals'] == final.config['evals']


@pytest.mark.parametrize(
    ('axis', 'seconds'),
    [('seconds', 600.0), ('joules', 3.0), ('model_flops', 0.6), ('hardware_flops', 0.3),
     ('tokens', 0.4), ('reference_seconds', 0.4)],
)  # fmt: skip
def test_the_time_of_a_run_is_told_for_every_budget(study, axis, seconds):
    costs = {'seconds': 2.0, 'joules': 400.0, 'model_flops': 2e3, 'hardware_flops': 4e3}
    done = [records.Cell('base', 'probe', 0, 0.05, {}, 'done', value=1.0, costs=costs)]
    fact = dataclasses.replace(FACTS, steps=4, step_flops=100.0)
    one = dataclasses.replace(study, axis=axis, budget=600.0)
    assert studies._training_seconds(one, fact, done) == pytest.approx(seconds)
    assert studies._training_seconds(one, fact, []) is None


def test_the_time_of_evaluations_is_told_by_their_number(study, repository, monkeypatch):
    monkeypatch.chdir(repository)
    costs = {'compile_seconds': 6.0, 'eval_seconds': 4.0}
    cells = [
        records.Cell('base', 'probe', i, 0.05, {}, 'done', costs=costs, curve=[{}] * 2,
                     environment={'batched': 3})
        for i in range(2)
    ]  # fmt: skip
    assert studies._overheads(cells) == (18.0, 6.0)
    assert studies._overheads([]) == (0.0, 0.0)
    some = dataclasses.replace(study, overrides=("evals={'valid': {'every_share': 0.25}}",))
    fact = dataclasses.replace(FACTS, steps=200)
    (final, _), tuning = plan.final(some, some.baseline, {}), plan.tuning(some)
    assert studies._evaluations(some, fact, final.jobs[0]) == 4
    assert studies._evaluations(some, fact, tuning[0].jobs[0]) == 1
    steps = dataclasses.replace(study, overrides=("evals={'valid': {'every_steps': 10}}",))
    half = plan.final(steps, steps.baseline, {})[0].jobs[0]
    assert studies._evaluations(steps, fact, half) == 10


def test_a_report_of_nothing_says_so(study, trained, tmp_path):
    with pytest.raises(StudyError, match='holds no finished run of fake; run the study first'):
        studies.report(study, tmp_path)


def test_a_signal_stops_the_study(study, trained, tmp_path, monkeypatch):
    monkeypatch.setattr('effjax.training.session.train', lambda c, w: ({}, 'SIGTERM'))
    with pytest.raises(execute.Stopped, match='stopped by SIGTERM; the same command goes on'):
        run(study, tmp_path)


def test_equal_seeds_pair_and_tuning_draws_its_own(study, repository, monkeypatch):
    monkeypatch.chdir(repository)
    base, new = (plan.final(study, arm, {})[-1].jobs for arm in study.arms)
    assert [j.config['seed'] for j in base] == [j.config['seed'] for j in new] == [0, 1, 2]
    assert all(j.config['init_seed'] == -1 for j in (*base, *new))
    moved = plan.final(study, Arm('other', init_offset=5), {})[-1].jobs
    assert [j.config['init_seed'] for j in moved] == [5, 6, 7]
    tuned = {j.config['seed'] for g in plan.tuning(study) for j in g.jobs}
    assert not tuned & {0, 1, 2}
    assert {j.config['steps'] for g in plan.final(study, study.baseline, {}) for j in g.jobs} == {
        100, 200,
    }  # fmt: skip


def test_a_digest_follows_what_makes_the_numbers(study, repository, monkeypatch):
    monkeypatch.chdir(repository)
    job = plan.final(study, study.baseline, {})[0].jobs[0]
    named = dataclasses.replace(job, config={**job.config, 'name': 'x', 'mesh': {'data': 2}})
    wider = dataclasses.replace(job, config={**job.config, 'clip_norm': 0.5})
    assert named.digest == job.digest != wider.digest
