"""A/A and planted differences, in small: what says whether verdicts can be believed."""

import argparse
import math

import pytest

from effjax.core.command import run_command
from effjax.study import plan, store
from effjax.study.execute import Runner
from effjax.study.records import Cell
from experiments.aa import planted
from experiments.aa import run as aa

SEEDS, BUDGET = 2, 0.05  # eight steps of the workload's 160


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, repository):
    monkeypatch.chdir(repository)


@pytest.mark.ci
def test_an_arm_under_two_names_through_vmap(tmp_path):
    runner = Runner(tmp_path, plan.code_version(), batched=True, say=lambda _: None)
    assert aa.pairing(runner, SEEDS, BUDGET) == [0.0] * SEEDS
    found = aa.repeated(runner, 2, SEEDS, BUDGET, lanes=8)
    assert len(found) == 2
    gaps = [d for f in found for d in aa.differences(f)]
    assert len(gaps) == 2 * SEEDS and all(map(math.isfinite, gaps))
    assert all(gaps) and len(set(gaps)) == len(gaps)  # other initial values each
    # Of an untrained model's loss near ln 256 = 5.5: initial values move it by hundredths.
    assert max(map(abs, gaps)) < 0.5
    notes = [store._read(f) for f in tmp_path.rglob('summary.json')]
    # The first repetition's first arm has run before: its folder and config are the same.
    assert {note['batched']['lanes'] for note in notes} == {SEEDS, 2 * 2 * SEEDS - SEEDS}


@pytest.fixture
def made_up(monkeypatch):
    """Replaces runs by numbers; returns `set(value(cell), status)`."""

    def put(value, status='done'):
        def collect(job, out, metric):
            costs = {'model_flops': float(str(job.config['budget']).removesuffix('flops'))}
            done = value(job) if status == 'done' else None
            return Cell(
                job.arm, job.phase, job.seed, job.fraction, {}, status, 'it broke', done, costs,
                workdir=job.folder,
            )  # fmt: skip

        monkeypatch.setattr(store, 'collect', collect)
        monkeypatch.setattr(Runner, 'run', lambda self, groups: None)

    return put


def test_twins_that_differ_are_an_error(tmp_path, made_up, capsys):
    made_up(lambda job: 2.0 + (job.arm == 'twin') * 2.0**-20)
    assert run_command(aa.main, [f'--out={tmp_path}', '--seeds=2']) == 1
    err = capsys.readouterr().err
    assert err.startswith('error: the same arm with the same seeds differs by [') and '9.53' in err
    assert not (tmp_path / 'aa.json').exists()


def test_a_run_that_did_not_end_well_is_an_error(tmp_path, made_up, capsys):
    made_up(lambda job: 2.0, 'failed')
    assert run_command(aa.main, [f'--out={tmp_path}', '--seeds=2']) == 1
    assert 'seed_0 is failed, and a share over the rest would mislead: it broke' in (
        capsys.readouterr().err
    )


def test_too_many_calls_are_an_error(tmp_path, made_up, capsys):
    made_up(lambda job: 2.0 + (job.arm == 'other') * (1 + 0.01 * job.seed))
    argv = [f'--out={tmp_path}', '--seeds=2', '--repetitions=10']
    assert run_command(aa.main, argv) == 1
    assert '10 of 10 repetitions were called a difference, outside of 0 to 3' in (
        capsys.readouterr().err
    )
    assert (tmp_path / 'aa.json').exists()
    made_up(lambda job: 2.0 + (job.arm == 'other') * (-1) ** job.seed)
    assert run_command(aa.main, argv) == 0


def test_a_planted_handicap_is_found(tmp_path, made_up):
    full = planted.LM_TINY.budget * 0.5

    def loss(job):
        share = float(job.config['budget'].removesuffix('flops')) / full
        return 2.0 + 0.3 * share**-0.3 + 1e-4 * (job.seed * 7 % 5 + job.seed % 2 * share)

    made_up(loss)
    found = planted.handicap(argparse.Namespace(out=tmp_path, seeds=5, budget=0.5))
    assert found.verdict == 'loss'
    ratio = found.at_equal_quality['model_flops']
    assert ratio.ratio == pytest.approx(1.1, abs=0.005)  # noise of 1e-4 at a slope of 0.09
    assert ratio.low < 1.1 < ratio.high
    assert not any('whole step' in note for note in found.notes)  # both are charged the same
