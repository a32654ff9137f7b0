"""The workloads of the studies: what they cost, what they are judged on, and that they train."""

import functools
import gzip
import itertools
import math
import struct

import numpy as np
import pytest

from effjax import train
from effjax.core.config import load
from effjax.core.cost import total
from effjax.core.errors import ConfigError
from effjax.study import spec
from effjax.training.runtime import Runtime
from effjax.training.setup import check
from experiments.workloads import LM10M, WORKLOADS

ARMS = (spec.Arm('base'), spec.Arm('gelu', ('model.ffn.kind=gelu',)))
workloads = pytest.mark.parametrize('workload', WORKLOADS.values(), ids=list(WORKLOADS))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, repository) -> None:
    monkeypatch.chdir(repository)


@pytest.fixture(scope='module')
def stand_ins(tmp_path_factory) -> dict[str, list[str]]:
    """Name -> overrides: data of the form of what is not in the repository."""
    root = tmp_path_factory.mktemp('stand_ins')
    text = root / 'input.txt'
    text.write_text(''.join(chr(32 + i % 65) for i in range(20_000)))
    draw = np.random.default_rng(0)
    for prefix, count in (('train', 20), ('t10k', 10)):
        for name, shape in (('images-idx3', (count, 28, 28)), ('labels-idx1', (count,))):
            draws = draw.integers(0, 256, shape) if len(shape) > 1 else np.arange(count) % 10
            head = bytes([0, 0, 8, len(shape)]) + struct.pack(f'>{len(shape)}I', *shape)
            file = root / f'{prefix}-{name}-ubyte.gz'
            file.write_bytes(gzip.compress(head + draws.astype(np.uint8).tobytes()))
    return {'shakespeare_char': [f'data.path={text}'], 'fashion_vit': [f'data.path={root}']}


@pytest.fixture(scope='module')
def build(stand_ins):
    """Returns `build(workload) -> Runtime`, made once for all tests."""

    @functools.cache
    def make(name: str) -> Runtime:
        config = WORKLOADS[name].load(stand_ins.get(name, ()))
        check(config)
        return Runtime(config)

    return make


def flops_a_step(runtime: Runtime) -> float:
    return 3 * total(runtime.costs(runtime.stages[0]).values()).model_flops


@workloads
def test_it_builds_and_its_budget_is_what_it_says(workload, build):
    runtime = build(workload.name)
    assert abs(workload.budget / flops_a_step(runtime) - workload.steps) < 1
    (held_out,) = runtime.evaluations(runtime.stages[0])
    assert held_out.name == workload.metric.partition('.')[0]
    schedule = runtime.config['schedule']
    assert schedule.get('final', 0.0) == 0  # each run decays to zero at its budget
    assert schedule['kind'] in ('linear', 'cosine')


@workloads
def test_evaluating_costs_below_a_twentieth(workload, build):
    runtime = build(workload.name)
    (held_out,) = runtime.evaluations(runtime.stages[0])
    # The stand-ins are smaller than what they stand for: 111,540 characters and 10,000 images.
    sizes = {'shakespeare_char': math.ceil(111_540 / 256 / 64), 'fashion_vit': 40}
    batches = sizes.get(workload.name, len(held_out.source))
    every = held_out.every_steps or held_out.every_share * workload.steps
    # A batch of evaluation is a forward pass, a third of a step.
    assert batches / 3 / every < 0.05


@workloads
def test_tuning_can_find_a_better_value_on_both_sides(workload):
    grid = workload.grid
    assert len(grid) >= 3
    ratios = [b / a for a, b in itertools.pairwise(grid)]
    assert min(ratios) > 1
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)
    assert grid[0] < load(workload.config, workload.overrides).schedule.peak < grid[-1]


@workloads
def test_it_makes_a_study(workload):
    study = workload.study('ffn', ARMS, overrides=('ema=0.9',), fractions=(1.0,))
    spec.check(study)
    assert (study.config, study.budget, study.grid) == (
        workload.config,
        workload.budget,
        workload.grid,
    )
    assert study.overrides == (*workload.overrides, 'ema=0.9')
    assert study.fractions == (1.0,)
    assert study.margin == workload.margin > 0
    assert study.scale and workload.note


@pytest.mark.parametrize('name', ['lm10m', 'lm_tiny'])
def test_documents_do_not_keep_a_language_model_from_vmap(name, build):
    # cuDNN's forms with documents have no batching rule: kernels/attention/cudnn.py.
    runtime = build(name)
    sampler = runtime.sampler(runtime.stages[0])
    assert 'segment_ids' not in sampler.batch(sampler.initial())


def test_the_language_model_sees_its_text_a_few_times(build):
    runtime = build('lm10m')
    seen = LM10M.steps * runtime.config['batch_size'] * runtime.config['seq_len']
    assert seen == pytest.approx(15.3e6, rel=0.01)
    assert runtime.params == pytest.approx(10.7e6, rel=0.01)
    # Another Python has another library, of a size like this one's.
    assert 1 < seen / runtime.dataset.describe()['train']['bytes'] < 6


@pytest.mark.parametrize('name', ['lm_tiny', 'digits_vit'])
def test_it_trains(name, tmp_path):
    workload = WORKLOADS[name]
    quiet = ('log.progress=false', 'log.tensorboard=false', 'checkpoint.background=false')
    run = train.run(workload.load([*quiet, 'steps=2', 'evals.valid.batches=1']), tmp_path)
    evaluation, metric = workload.metric.split('.')
    assert math.isfinite(run.summary['eval'][evaluation][metric])


def test_an_unknown_variant():
    with pytest.raises(ConfigError, match=r"lm10m.py has no variant 'huge'; it has tiny, or give"):
        load('configs/lm10m.py:huge')
