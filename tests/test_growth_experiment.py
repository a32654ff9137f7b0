"""The study of growth: every way to grow ends with one model, is paid for, and trains."""

import pytest

from effjax import train
from effjax.core import config as config_lib
from effjax.core.errors import ConfigError
from effjax.study import pairs, preflight, spec
from effjax.training import setup
from effjax.training.runtime import Runtime
from experiments.growth.study import METHODS, arms, get_study
from experiments.growth_reuse.study import get_study as reuse_study
from experiments.growth_vit.study import get_study as vit_study


def load(repository, name):
    return config_lib.load(str(repository / 'configs' / name))


REUSED = ('ligo_reuse', 'inherit')


@pytest.mark.parametrize('size', ['', 'tiny'])
def test_all_ways_end_with_one_model(repository, size):
    scratch = load(repository, f'lm_growth.py:{size}' if size else 'lm_growth.py')
    end = f'-{size}' if size else ''
    for method in METHODS:
        config = config_lib.as_dict(load(repository, f'lm_growth.py:{method}{end}'))
        setup.check(config)
        assert config['model'] == config_lib.as_dict(scratch.model)
        assert config['budget'] == scratch.budget and config['stages']


def test_every_way_can_be_built(repository):
    """Checked as before a run: the operators can make these changes; nothing is trained."""
    params = set()
    for method in ('', *METHODS):
        name = f'lm_growth.py:{method}-tiny' if method else 'lm_growth.py:tiny'
        config = config_lib.as_dict(load(repository, name))
        config['model']['vocab_size'] = 257
        runtime = Runtime(config, with_data=False)
        params.add(runtime.params)
        assert not method or runtime.models[0].params < runtime.params
    assert len(params) == 1


@pytest.mark.ci
def test_from_small_models_that_are_there(repository, tmp_path, monkeypatch):
    """The small model, then the large one from it, by learned maps and by its teaching."""
    monkeypatch.chdir(tmp_path)
    short = ['budget=1e9flops', 'evals.valid.batches=1', 'log.progress=False']
    for size in ('small', 'quarter'):
        config = config_lib.load(str(repository / 'configs' / f'lm_growth.py:{size}-tiny'), short)
        train.run(config, f'runs/lm_growth/{size}-tiny')
    short[0] = 'budget=4e9flops'
    for method, name in (('ligo_reuse', 'init_from'), ('inherit', 'teacher')):
        config = config_lib.load(str(repository / 'configs' / f'lm_growth.py:{method}-tiny'), short)
        if method == 'ligo_reuse':
            config.stages = ({**config.stages[0], 'grow': {'kind': 'ligo', 'steps': 1}},)
        ledger = train.run(config, method).summary['ledger']
        assert ledger['sources'][name]['charged'] is False
        assert 2e9 < ledger['model_flops'] < 6e9
    # A study may hold them beside scratch: a taught model is judged by the task that it learns.
    config = str(repository / 'configs' / 'lm_growth.py')
    arms = (spec.Arm('scratch'), *(spec.Arm(n, config=f'{config}:{n}-tiny') for n in REUSED))
    facts = preflight.examine(
        spec.Study('x', f'{config}:tiny', arms, budget=4e11, tune_key='', fractions=(1.0,))
    )
    assert 'init_from' in facts['ligo_reuse'].inputs and 'teacher' in facts['inherit'].inputs
    assert not {'init_from', 'teacher'} & set(facts['scratch'].inputs)


# The others are rows of `effjax.methods`.
@pytest.mark.ci
@pytest.mark.parametrize('method', ['gstack', 'append', 'midas', 'aki', 'lemon', 'msg'])
def test_a_way_trains(repository, tmp_path, method):
    config = pairs.tiny(load(repository, f'lm_growth.py:{method}'))
    done = train.run(config, tmp_path)
    assert done.summary['final_step'] == config['steps']
    assert len(done.summary['ledger']['stages']) == len(config['stages'])


def test_the_studies_are_well_formed(repository, monkeypatch):
    monkeypatch.chdir(repository)
    for study in (get_study(), vit_study(), reuse_study()):
        spec.check(study)
        assert study.arms[0].name == 'scratch'
        for arm in study.arms[1:]:
            variant = arm.config.partition(':')[2]
            config = load(repository, f'{study.config.removeprefix("configs/")}:{variant}')
            assert config.stages or config.task.kind == 'distillation'
    assert [arm.config for arm in arms(['stack'], 'tiny')] == [
        'configs/lm_growth.py:tiny', 'configs/lm_growth.py:stack-tiny'
    ]  # fmt: skip


@pytest.mark.parametrize('variant', ['stak', 'stack-huge', '-tiny', 'tiny-tiny'])
def test_other_variants_are_refused(repository, variant):
    with pytest.raises(ConfigError, match=rf"no variant '{variant}'; it has stack, gstack"):
        load(repository, f'lm_growth.py:{variant}')
