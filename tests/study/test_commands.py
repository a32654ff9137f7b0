"""Commands that a report names: they make what it says, and name no folder of a machine."""

import json
import pathlib
import shlex

import pytest

from effjax.core.config import as_dict, load
from effjax.study import card, commands, plan
from effjax.study.spec import Arm, Study


@pytest.mark.parametrize(
    ('argv', 'kept'),
    [
        (['--study=x', '--report_only', '--publish=x', '--traceback'], ['--study=x']),
        (['--publish', 'experiments/x', '--study=x', '--retry_failed'], ['--study=x']),
        (['--study=x', '--any_code', '--workers=4', '--out=o'], '--study=x --workers=4 --out=o'),
        (['--change', 'a=1 b={}'], ['--change', "'a=1 b={}'"]),
        (["--change=a={'b': 'c'}"], ["\"--change=a={'b': 'c'}\""]),
        (["--change=a='$x'"], [shlex.quote("--change=a='$x'")]),
    ],
)
def test_what_concerns_one_call_is_not_noted(argv, kept):
    words = ' '.join(kept) if isinstance(kept, list) else kept
    assert commands.noted(argv) == f'python -m effjax.compare {words}'


@pytest.mark.parametrize('arm', ['base', 'wide', 'other'])
@pytest.mark.parametrize(('axis', 'budget'), [('steps', 300.0), ('model_flops', 1e12)])
def test_the_command_of_an_arm_is_the_config_of_its_run(repository, monkeypatch, arm, axis, budget):
    monkeypatch.chdir(repository)
    study = Study(
        'mine',
        'configs/lm.py',
        (
            Arm('base'),
            Arm('wide', ("model.ffn={'kind': 'gelu'}", 'batch_size=64'), init_offset=5),
            Arm('other', ('model.width=32',), config='configs/lm10m.py:tiny'),
        ),
        axis=axis,
        budget=budget,
        overrides=("data={'kind': 'text', 'path': 'a folder/it.txt'}", 'evals.valid.batches=2'),
    )
    job = plan.final(study, study.arm(arm), {'schedule.peak': 3e-4})[-1].jobs[1]
    python, _, module, *words = shlex.split(commands.of_arm(study, job))
    assert (python, module) == ('python', 'effjax.train')
    file, *given = (w.removeprefix('--config').removeprefix('.') for w in words)
    config = as_dict(load(file.removeprefix('='), given))
    assert plan.identity(config) == plan.identity(job.config)


def test_paths_are_shown_without_their_folders(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = pathlib.Path.cwd().as_posix()
    said = {
        f'--out={here}/runs/x --data=/srv/store/my.txt': '--out=runs/x --data=my.txt',
        "data={'path': '/home/me/a b.txt'}": "data={'path': 'a b.txt'}",
        'no space left on /dev/shm.': 'no space left on shm.',
        f'({here}/a.py: line 3)': '(a.py: line 3)',
        '--xla_dump_to=/tmp/dump,--a=1': '--xla_dump_to=dump,--a=1',
        'tokens/s and 3/4, https://host.org/a/b, runs/a/final, ~/x': None,
    }
    for text, shown in said.items():
        assert commands.shown([text, {'a': (text, 3, None)}]) == [
            shown or text,
            {'a': [shown or text, 3, None]},
        ]


def test_nothing_published_names_a_folder_of_the_machine(make_analysis, tmp_path):
    study = make_analysis(commands=['python -m effjax.compare --study=/srv/me/s --out=/scratch/o'])
    study.arms['gelu']['changes'] = ['data.path=/srv/me/my.txt']
    path = card.publish(study, tmp_path)
    for text in (path.read_text(), (tmp_path / card.REPORT).read_text()):
        assert '/srv' not in text and '/scratch' not in text
        assert '--study=s --out=o' in text and 'data.path=my.txt' in text
    assert json.loads(path.read_text())['name'] == study.name
