"""A signal stops a study at any moment, even one whose exception gets lost on its way."""

import json
import signal

import pytest

from effjax.core.errors import StudyError
from effjax.core.signals import Stop
from effjax.study import execute, plan, preflight, stopping, store
from effjax.study.spec import Arm, Study
from effjax.study.stopping import Leaving, Stopped


def term() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def job(repository, monkeypatch):
    monkeypatch.chdir(repository)
    study = Study('s', 'configs/lm.py', (Arm('a'), Arm('b')), 'steps', 100.0, tune_key='')
    return plan.final(study, study.baseline, {})[-1].jobs[0]


@pytest.fixture
def trained(monkeypatch):
    """Returns `set(function)` that puts a function in the place of training."""
    monkeypatch.setattr(execute, 'share_programs', lambda: None)
    return lambda train: monkeypatch.setattr('effjax.training.session.train', train)


def state(job, folder) -> str:
    return json.loads((folder / job.folder / store.FILE).read_text())['status']


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_a_signal_outside_of_runs_breaks_off_what_is_done(name, capfd):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped, match=f'^stopped by {name}; the same command goes on.$'), Leaving():
        signal.raise_signal(signal.Signals[name])
        pytest.fail('it went on')
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert f'{name}: stopping. A second signal leaves at once.' in capfd.readouterr().err


class _Dying:
    def __del__(self) -> None:
        term()  # Python prints and drops what a destructor raises


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_signal_that_a_destructor_swallowed_still_stops():
    with pytest.raises(Stopped, match='stopped by SIGTERM'), Leaving():
        _Dying()
        assert stopping.requested() == 'SIGTERM'
        stopping.check()
        pytest.fail('it went on')
    with pytest.raises(Stopped), Leaving():
        _Dying()  # nothing checks: the end of the block does


def test_a_block_within_another_stops_both():
    with pytest.raises(Stopped, match='by SIGINT'), Leaving():
        with pytest.raises(Stopped), Leaving():
            signal.raise_signal(signal.SIGINT)
        stopping.check()
        pytest.fail('it went on')


def test_a_run_that_a_signal_broke_has_not_failed(job, trained, tmp_path):
    def train(config, workdir):
        with Stop():  # as a run's own
            term()
            raise RuntimeError('cut off')

    trained(train)
    with pytest.raises(Stopped, match='stopped by SIGTERM'), Leaving():
        execute.run_jobs([job], tmp_path, 'code', batched=False)
    assert state(job, tmp_path) == 'running'


@pytest.mark.parametrize('count', [1, 2])
def test_a_signal_after_the_last_step_keeps_the_run_and_stops_the_study(
    job, trained, monkeypatch, tmp_path, count
):
    def train(config, workdir):
        with Stop():
            term()
        return {'complete': True}, None

    trained(train)
    monkeypatch.setattr(
        'effjax.training.batched.run_batched',
        lambda configs, folders: [train(c, f)[0] for c, f in zip(configs, folders, strict=True)],
    )
    jobs = [job, *([plan.dataclasses.replace(job, folder='other')] if count > 1 else [])]
    monkeypatch.setattr('os._exit', lambda code: None)  # two runs get a signal each
    with pytest.raises(Stopped), Leaving():
        execute.run_jobs(jobs, tmp_path, 'code', batched=count > 1)
    assert [state(j, tmp_path) for j in jobs] == ['done'] * count


def test_a_study_called_from_python_stops_too(monkeypatch, tmp_path):
    from effjax.study.compare import compare

    def examine(study):
        try:
            term()
        except BaseException as error:  # as a library may that turns it into its own
            raise StudyError('something else') from error

    monkeypatch.setattr(preflight, 'examine', examine)
    study = Study('s', 'configs/lm.py', (Arm('a'), Arm('b')), 'steps', 100.0, tune_key='')
    with pytest.raises(Stopped, match='stopped by SIGTERM'):
        compare(study, tmp_path)
