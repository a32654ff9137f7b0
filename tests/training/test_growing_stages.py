"""Stages that grow the model: resumed on both sides, the same on a mesh, charged, refused."""

import json

import jax
import numpy as np
import pytest

from effjax import generate, train
from effjax.core import trees
from effjax.core.errors import CheckpointError, ConfigError
from effjax.training import setup
from effjax.training.dryrun import dry_run
from effjax.training.runtime import Runtime

SMALL = {'layers': 1}
WIDE = {
    'width': 32, 'mixer': {'kind': 'attention', 'heads': 4}, 'ffn': {'kind': 'swiglu', 'hidden': 64}
}  # fmt: skip
# One layer, two, then twice the width: with half of the steps at the end.
STAGES = (
    {'name': 'one', 'model': SMALL, 'steps': 2},
    {'name': 'two', 'grow': 'stack', 'steps': 2},
    {'name': 'wide', 'model': WIDE, 'grow': {'kind': 'staged', 'moments': 'grow'}, 'steps': 2},
)


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
    return [(row['step'], row['stage'], row['loss']) for row in rows(workdir)]


def test_each_stage_has_its_model_and_its_cost(tiny, tmp_path):
    run = train.run(tiny('log.every_steps=1', stages=STAGES), tmp_path)
    assert [stage for _, stage, _ in losses(tmp_path)] == [0, 0, 1, 1, 2, 2]
    ledger = run.summary['ledger']
    assert list(ledger['stages']) == ['one', 'two', 'wide']
    one, two, wide = (entry['model_flops'] for entry in ledger['stages'].values())
    assert one < two < wide
    assert ledger['forward']['growth'] > 0  # what transitions compute is in the run's FLOPs
    runtime = Runtime(tiny(stages=STAGES))
    assert run.summary['params'] == runtime.params == runtime.models[2].params
    assert runtime.models[0].params < runtime.models[1].params < runtime.models[2].params


@pytest.mark.ci
@pytest.mark.parametrize('step', [1, 2, 4])
def test_a_signal_on_either_side_of_a_transition(tiny, tmp_path, stop_after, step):
    config = tiny(stages=STAGES)
    train.run(config, tmp_path / 'whole')
    stop_after(step)
    first = train.run(config, tmp_path / 'cut')
    assert first.stopped_by == 'SIGTERM' and not first.summary['complete']
    assert generate.load(tmp_path / 'cut').step == first.summary['final_step']
    done = train.run(config, tmp_path / 'cut')
    assert losses(done.workdir) == losses(tmp_path / 'whole')


def test_a_function_that_is_kept(tiny, tmp_path):
    """The loss of the first step behind an exact transition is what it would have been."""
    stages = ({'share': 0.5}, {'share': 0.5, 'model': WIDE, 'grow': 'staged'})
    plain = train.run(tiny(), tmp_path / 'plain')
    grown = train.run(tiny(stages=stages), tmp_path / 'grown')
    before, after = rows(plain.workdir), rows(grown.workdir)
    assert before[2]['loss'] == after[2]['loss']
    # float32, another order of sums
    np.testing.assert_allclose(after[3]['loss'], before[3]['loss'], rtol=1e-5)


@pytest.mark.ci
def test_scanned_and_unrolled_are_the_same(tiny, tmp_path):
    for how in ('scan', 'unroll'):
        train.run(tiny(f'execution.layers={how}', stages=STAGES), tmp_path / how)
    got, expected = (np.array(losses(tmp_path / how)) for how in ('scan', 'unroll'))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.mesh
def test_the_same_on_a_mesh(tiny, tmp_path):
    config = tiny('mesh.data=2', 'mesh.fsdp=4', stages=STAGES)
    train.run(config, tmp_path / 'mesh')
    train.run(tiny('mesh.data=1', stages=STAGES), tmp_path / 'one')
    got, expected = (np.array(losses(tmp_path / name)) for name in ('mesh', 'one'))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    runtime = Runtime(config)
    kernel = trees.flatten(runtime.shardings['params'])['body/segment_0/slot_0/ffn/up/kernel']
    assert 'fsdp' in str(kernel.spec)


@pytest.mark.ci
def test_a_run_ends_with_its_model_though_nothing_is_left_for_it(tiny, tmp_path):
    """The first stage overshoots into a last one of less than half a step."""
    stages = ({'share': 0.99, 'model': SMALL}, {'share': 0.01, 'grow': 'stack'})
    done = train.run(tiny('steps=0', 'budget=500tokens', stages=stages), tmp_path)
    assert done.summary['final_step'] == 2
    assert generate.load(tmp_path).step == 2
    assert done.summary['eval']['valid']['loss'] > 0


def test_grown_moments_need_an_optimizer_that_keeps_them(tiny):
    stages = (
        {'share': 0.5, 'model': SMALL},
        {'share': 0.5, 'grow': 'stack', 'optimizer': {'momentum': 0.9}},
    )
    optimizer = {'kind': 'sgd', 'momentum': 0.0}
    with pytest.raises(
        ConfigError, match=r'stages\.1\.optimizer keeps another state than the stage'
    ):
        Runtime(tiny(stages=stages, optimizer=optimizer))
    anew = ({**stages[0]}, {**stages[1], 'grow': {'kind': 'stack', 'moments': 'reset'}})
    assert Runtime(tiny(stages=anew, optimizer=optimizer)).transitions


def test_dry_run_shows_stages(tiny):
    text = dry_run(tiny(stages=STAGES))
    assert '  one ' in text and '33.3 % of the run' in text
    assert 'grown by stack (does not keep the function; moments grown)' in text
    assert 'grown by staged (keeps the function; moments grown)' in text


def test_shares_may_be_percentages(tiny):
    stages = [{**s, 'budget': b} for s, b in zip(STAGES, ('12.5%', '17.5 %', '70%'), strict=True)]
    stages = tuple({k: v for k, v in s.items() if k != 'steps'} for s in stages)
    runtime = Runtime(tiny('steps=40', stages=stages))
    assert [stage.end for stage in runtime.stages] == [5, 12, 40]


@pytest.mark.parametrize(
    ('stages', 'message'),
    [
        (({'share': 1.0, 'grow': 'stack'},), r'stages\.0\.grow: no stage comes before it'),
        (
            ({'share': 0.5, 'model': SMALL}, {'share': 0.5}),
            r'stages\.1 changes the model without saying how',
        ),
        (
            ({'share': 0.5}, {'share': 0.5, 'grow': 'stack'}),
            r'stages\.1\.grow: the model is that of the stage before',
        ),
        (
            ({'share': 0.5, 'model': SMALL}, {'share': 0.5, 'grow': 'stak'}),
            r"unknown growth operator 'stak' at .*Did you mean 'stack'",
        ),
        (
            ({'share': 0.5, 'model': SMALL}, {'share': 0.5, 'grow': {'kind': 'stack', 'x': 1}}),
            r"stages\.1\.grow\.x: growth operator 'stack' takes no 'x'",
        ),
        (
            ({'share': 0.5, 'model': SMALL}, {'share': 0.5, 'grow': {'moments': 'grow'}}),
            r'stages\.1\.grow names no operator',
        ),
        (
            (
                {'share': 0.5, 'model': SMALL},
                {'share': 0.5, 'grow': {'kind': 'stack', 'moments': 'halve'}},
            ),
            r"stages\.1\.grow\.moments must be 'grow' or 'reset', got 'halve'",
        ),
        (
            ({'share': 0.5}, {'share': 0.5, 'model': SMALL, 'grow': 'stack'}),
            r'stages\.1\.grow: .*goes from 2 to 1',
        ),
        (
            ({'share': 0.5}, {'share': 0.5, 'model': {'layers': 3}, 'grow': 'stack'}),
            r'stages\.1\.grow: ',
        ),
        (
            ({'share': 0.5}, {'share': 0.5, 'model': {'kind': 'encoder'}, 'grow': 'stack'}),
            r'stages\.1\.model\.kind: a stage may change the sizes',
        ),
        (
            ({'budget': '1e9tokens', 'model': SMALL}, {'share': 0.5, 'grow': 'stack'}),
            r"stages\.0\.budget is a part of the run's, such as '12.5%', not '1e9tokens'",
        ),
        (
            ({'budget': '20%', 'model': SMALL}, {'budget': '70%', 'grow': 'stack'}),
            'make shares add up to 1',
        ),
    ],
)
def test_mistakes_are_said_before_anything_trains(tiny, stages, message):
    with pytest.raises(ConfigError, match=message):
        config = tiny(stages=stages)
        setup.check(config)
        Runtime(config)


@pytest.mark.ci
def test_other_growth_is_another_run(tiny, tmp_path):
    train.run(tiny(stages=STAGES), tmp_path)
    other = (*STAGES[:1], {**STAGES[1], 'grow': 'interpolate'}, STAGES[2])
    with pytest.raises(CheckpointError, match=r"stages\.1\.grow: 'stack' there, 'interpolate'"):
        train.run(tiny(stages=other), tmp_path)
    jax.clear_caches()
