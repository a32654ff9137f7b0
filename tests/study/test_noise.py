"""The noise floor: what it is measured on, what it says, and for whom a stored one counts."""

import argparse
import dataclasses
import json
import math
import re

import pytest

from effjax.core.errors import StudyError
from effjax.study import compare as studies
from effjax.study import lock, spec
from effjax.study.records import Analysis, Cell, to_json
from effjax.study.spec import Arm
from experiments.noise_floor import run as noise
from experiments.workloads import DIGITS_VIT, LM_TINY

GPU = {'device': 'NVIDIA H200', 'jax': '0', 'finished': '2026-01-02T03:04:05'}
BASE = Arm('base')
ARMS = (BASE, Arm('gelu', ('model.ffn.kind=gelu',)))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, repository):
    monkeypatch.chdir(repository)


def cells(arm='base', slope=-0.3, failed=None, seeds=(0, 1, 2)):
    return [
        Cell(
            arm, 'final', s, f, {}, 'failed' if (s, f) == failed else 'done', '',
            None if (s, f) == failed else 2 + slope * math.log(f) + 0.01 * (s + f) % 0.007,
            {'seconds': 1.0}, [], GPU,
        )
        for s in seeds for f in (0.6, 0.8, 1.0)
    ]  # fmt: skip


def stored(folder, *, arms=ARMS, code='c', **changes):
    """Writes what a study on the workload leaves, judged or not."""
    study = dataclasses.replace(LM_TINY.study('s', arms), **changes)
    analysis = Analysis(
        name='s', question='', metric=study.metric, lower_is_better=True, margin=0.0,
        axis=study.axis, budget=study.budget, fractions=[1.0], seeds=[0, 1, 2], baseline='base',
        arms={}, comparisons=[], cells=[c for a in arms for c in cells(a.name)], device='',
        date='', code=code, scale='', commands=[], notes=[],
    )  # fmt: skip
    (folder / 'study.json').write_text(json.dumps(spec.to_json(study)))
    (folder / 'analysis.json').write_text(json.dumps(to_json(analysis)))
    return folder


def test_the_runs_of_a_study_on_the_workload_serve(tmp_path):
    found, code = noise.of_study(LM_TINY, stored(tmp_path), 'base')
    assert code == 'c' and len(found) == 9
    entry = noise.floor(LM_TINY, found, code)
    assert entry['slope'] == pytest.approx(-0.3, abs=0.1)
    assert entry['finds']['3']['speedup'] > 1
    same = Arm('same', ("model.ffn={'kind': 'swiglu', 'hidden': 171}",))
    tuned = stored(tmp_path, arms=(BASE, Arm('peak', ('schedule.peak=0.5',)), same))
    assert noise.of_study(LM_TINY, tuned, 'peak')  # the tuned key is the study's to choose


@pytest.mark.parametrize(
    ('arm', 'changes', 'message'),
    [
        ('other', {}, r"has no arm 'other'; give --arm, one of base, gelu"),
        ('gelu', {}, r"'gelu' of .* is not the baseline of workload 'lm_tiny'.* model.ffn.kind"),
        ('base', {'budget': 5.0}, r"has the budget 5.0, and workload 'lm_tiny' has 2"),
        ('base', {'metric': 'valid.accuracy'}, r"has the metric valid.accuracy, and workload"),
        ('base', {'overrides': ('batch_size=4',)}, r'they differ in batch_size'),
        ('base', {'config': 'configs/lm10m.py'}, r'they differ in .*model.width'),
        ('base', {'code': 'a+b'}, r'made by several versions of the code \(a\+b\)'),
    ],
)  # fmt: skip
def test_runs_of_something_else_are_refused(tmp_path, arm, changes, message):
    with pytest.raises(StudyError, match=message) as said:
        noise.of_study(LM_TINY, stored(tmp_path, **changes), arm)
    assert '\n' not in str(said.value)


def test_a_folder_without_findings_is_refused(tmp_path, capsys):
    from effjax.core.command import run_command

    argv = ['--workload=lm_tiny', f'--cells={tmp_path}', '--arm=base']
    assert run_command(noise.main, argv) == 1
    assert 'holds no findings of a study' in capsys.readouterr().err


def test_a_run_that_did_not_end_well_leaves_no_noise():
    with pytest.raises(StudyError, match='seed 1 at the full budget is failed'):
        noise.floor(LM_TINY, cells(failed=(1, 1.0)), 'c')
    assert noise.floor(LM_TINY, cells(failed=(1, 0.6)), 'c')['seeds'] == 3
    with pytest.raises(StudyError, match=r'1 runs at the full budget have no spread'):
        noise.floor(LM_TINY, cells(seeds=(0,)), 'c')


def test_a_metric_that_gets_worse_with_budget_has_no_speed_up():
    entry = noise.floor(LM_TINY, cells(slope=0.3), 'c')
    assert entry['slope'] is None
    assert entry['finds']['3']['speedup'] is None
    higher = dataclasses.replace(LM_TINY, metric='valid.accuracy')
    assert noise.floor(higher, cells(slope=0.3), 'c')['slope'] > 0


def entry_of(workload, **changes):
    entry = {**noise.floor(workload, cells(), 'c'), **changes}
    return json.dumps({'workloads': [entry]})


@pytest.mark.parametrize(
    ('overrides', 'said'),
    [
        ((), r'noise floor 0\.\d+, stored\), which is a speed-up of'),
        (('data.path=here.txt',), r'stored\), which is'),
        (("model.ffn={'kind': 'gelu'}",), r'stored for a baseline that differs in model.ffn\)'),
        (('batch_size=4',), 'not known before something has run'),
        (("evals.valid={'batches': 1}",), 'not known before something has run'),
    ],
)
def test_stored_noise_is_that_of_this_baseline(tmp_path, monkeypatch, overrides, said):
    file = tmp_path / 'noise.json'
    file.write_text(entry_of(LM_TINY))
    monkeypatch.setattr(studies, 'NOISE', file)
    study = LM_TINY.study('s', (BASE, Arm('new')), overrides=overrides)
    assert re.search(said, studies._smallest(study, []))
    moved = LM_TINY.study('s', (Arm('base', overrides), Arm('new')))
    assert re.search(said, studies._smallest(moved, []))
    assert 'not known' in studies._smallest(DIGITS_VIT.study('d', (BASE, Arm('new'))), [])


def test_a_stored_slope_of_the_wrong_sign_gives_no_speed_up(tmp_path, monkeypatch):
    file = tmp_path / 'noise.json'
    monkeypatch.setattr(studies, 'NOISE', file)
    file.write_text(entry_of(LM_TINY, slope=0.3))
    found = studies._smallest(LM_TINY.study('s', (BASE, Arm('new'))), [])
    assert found.endswith('stored)')


def test_one_process_at_a_time_measures_in_a_folder(tmp_path):
    args = argparse.Namespace(out=tmp_path, path=None, seeds=2, fractions=[1.0])
    with lock.held(tmp_path), pytest.raises(StudyError, match='is in use by process'):
        noise.measure(LM_TINY, args)
    assert [f.name for f in tmp_path.iterdir()] == []
