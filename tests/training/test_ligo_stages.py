"""The phase that learns LiGO's maps: a stage that trains, is charged, killed and resumed as any."""

import json

import jax
import numpy as np
import pytest

from effjax import generate, growth, parallel, train
from effjax.core import config as config_lib
from effjax.core import trees
from effjax.core.errors import CheckpointError, ConfigError
from effjax.costs.reference import shape_of
from effjax.growth.depth import Stack
from effjax.training import setup, stages
from effjax.training.checkpoints import read_manifest
from effjax.training.dryrun import dry_run
from effjax.training.runtime import Runtime

LARGE = {
    'layers': 2,
    'width': 32,
    'mixer': {'kind': 'attention', 'heads': 4},
    'ffn': {'kind': 'swiglu', 'hidden': 64},
}
LIGO = {'kind': 'ligo', 'steps': 2, 'lr': 1e-2}
SMALL = {'name': 'small', 'model': {'layers': 1}, 'steps': 2}
# Two steps small, two of learning, two large.
STAGES = (SMALL, {'name': 'big', 'model': LARGE, 'grow': LIGO, 'steps': 4})


def shares(first, grow, model=LARGE):
    return (
        {'name': 'small', 'model': {'layers': 1}, 'share': first},
        {'name': 'big', 'model': model, 'grow': grow, 'share': 1 - first},
    )


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def losses(workdir):
    return [(row['step'], row['stage'], row['loss']) for row in rows(workdir)]


class Phase:
    """A run just before its learning phase."""

    def __init__(self, config):
        self.runtime = Runtime(config)
        self.stage = self.runtime.stages[1]
        with self:
            self.state = self.runtime.initial_state(1)

    def __enter__(self):
        self._context = parallel.mesh_context(self.runtime.mesh, self.runtime.rules)
        return self._context.__enter__()

    def __exit__(self, *args):
        return self._context.__exit__(*args)

    def batch(self):
        loader = self.runtime.loader(self.stage, None)
        try:
            return next(loader)[0]
        finally:
            loader.close()


def test_learning_makes_a_better_large_model_and_leaves_the_small_one_alone(tiny):
    phase = Phase(tiny(stages=STAGES, ema=0.9))
    small = jax.tree.map(np.asarray, phase.state['frozen']['small'])
    assert trees.flatten(small)['embedding/table'].shape[1] == 16
    assert set(phase.state['params']) == {'depth', 'width'} and not phase.state['ema']
    state, found = phase.state, []
    with phase:
        batch = phase.batch()
        step = phase.runtime.compile(phase.stage, batch)
        for _ in range(20):
            state, metrics = step(state, batch, 1e-2, 0)
            found.append(float(metrics[step.names.index('loss')]))
        make, _ = phase.runtime.transition(phase.runtime.stages[2])
    jax.tree.map(np.testing.assert_array_equal, state['frozen']['small'], small)
    assert found[-1] < found[0] - 0.05  # of the large model that the initial maps make
    large = make(state)
    # What an evaluation within the phase judges is the model that the phase leads to.
    judged = phase.runtime.eval_params(state, 1)
    jax.tree.map(np.testing.assert_array_equal, judged, large['params'])
    assert not large['frozen'] and int(large['step']) == int(state['step'])
    jax.tree.map(np.testing.assert_array_equal, large['ema']['params'], large['params'])
    assert not any(np.any(x) for x in jax.tree.leaves(large['optimizer']))


def test_before_learning_it_is_stacking_where_only_the_depth_grows(tiny):
    ligo = {**LIGO, 'depth': 'stackbert'}
    phase = Phase(tiny(stages=(SMALL, {'name': 'big', 'grow': ligo, 'steps': 4})))
    change = phase.runtime.transitions[1].change
    small = {
        **phase.state, 'params': phase.state['frozen']['small'], 'frozen': {}, 'optimizer': {}
    }  # fmt: skip
    stacked = growth.transform(small, change, Stack())['params']
    seen = phase.runtime.eval_params(phase.state, 1)
    jax.tree.map(np.testing.assert_array_equal, seen, stacked)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_the_phase_is_part_of_the_budget_and_lasts_its_steps(tiny, tmp_path):
    """Counted in tokens: 8 steps of 256, of which a quarter small, 3 of learning."""
    grow = {**LIGO, 'steps': 3}
    config = tiny(
        'log.every_steps=1', steps=0, budget='2048tokens', stages=shares(0.25, grow), evals={}
    )
    run = train.run(config, tmp_path)
    assert [stage for _, stage, _ in losses(tmp_path)] == [0, 0, 1, 1, 1, 2, 2, 2]
    assert [row['lr'] for row in rows(tmp_path)[2:5]] == [1e-2] * 3
    ledger, runtime = run.summary['ledger'], Runtime(config)
    assert list(ledger['stages']) == ['small', 'big:maps', 'big']
    assert [entry['tokens'] for entry in ledger['stages'].values()] == [512, 768, 768]
    maps, big = (runtime.costs(runtime.stages[i]) for i in (1, 2))
    assert set(maps) - set(big) == {'growth'}
    # Three times the large model's forward pass and three times what makes its weights; the
    # phase's stage is also charged what leads to it.
    step = sum(cost.train_flops for cost in maps.values())
    assert ledger['parts']['growth'] == 3 * round(maps['growth'].train_flops) > 0
    charged = ledger['stages']['big:maps']['model_flops']
    assert 3 * step <= charged < 3.1 * step
    assert ledger['forward']['growth'] >= maps['growth'].model_flops
    assert run.summary['params'] == runtime.params == runtime.models[1].params


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_a_signal_in_the_phase_and_on_either_side(tiny, tmp_path, stop_after):
    config = tiny('log.every_steps=1', stages=STAGES)
    train.run(config, tmp_path / 'whole')
    whole = losses(tmp_path / 'whole')
    assert [stage for _, stage, _ in whole] == [0, 0, 1, 1, 2, 2]
    for step in (1, 2, 3, 4):
        cut = tmp_path / str(step)
        stop_after(step)
        first = train.run(config, cut)
        assert first.stopped_by == 'SIGTERM' and not first.summary['complete']
        assert generate.load(cut).step == first.summary['final_step']
        names = read_manifest(cut / 'checkpoints')['state']
        stage = whole[first.summary['final_step'] - 1][1]
        assert any(name.startswith('frozen/small/') for name in names) == (stage == 1)
        assert any(name.startswith('params/width/') for name in names) == (stage == 1)
        done = train.run(config, cut)
        assert losses(done.workdir) == whole
        totals = done.summary['ledger']
        assert [entry['steps'] for entry in totals['stages'].values()] == [2, 2, 2]
    other = (SMALL, {**STAGES[1], 'grow': {**LIGO, 'steps': 1}})
    with pytest.raises(CheckpointError, match=r'stages\.1\.grow\.steps: 2 there, 1 here'):
        train.run(tiny('log.every_steps=1', stages=other), cut)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_half_precision_average_and_microbatches(tiny, tmp_path):
    config = tiny(
        'log.every_steps=1', 'precision.kind=fp16', stages=STAGES, ema=0.9, accumulate=2,
        clip_norm=1.0, optimizer={'kind': 'muon'},
    )  # fmt: skip
    train.run(config, tmp_path)
    found = rows(tmp_path)
    assert all(np.isfinite(row['loss']) for row in found)
    assert all('loss_scale' in row for row in found)
    runtime = Runtime(config)
    one = Runtime(tiny(stages=STAGES))
    twice = [r.costs(r.stages[1])['growth'].model_flops for r in (runtime, one)]
    assert twice[0] == 2 * twice[1]  # each microbatch makes the weights


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_a_phase_as_long_as_its_stage_still_leads_to_the_large_model(tiny, tmp_path):
    """Hardware FLOPs of a step are not known beforehand; the phase goes on until it is done."""
    small = Runtime(tiny(stages=STAGES))
    step = sum(cost.train_flops for cost in small.costs(small.stages[0]).values())
    config = tiny(
        'log.every_steps=1', steps=0, budget=f'{3 * step:.0f}hwflops', evals={},
        stages=shares(0.6, {**LIGO, 'steps': 3}),
    )  # fmt: skip
    run = train.run(config, tmp_path)
    assert [stage for _, stage, _ in losses(tmp_path)].count(1) == 3
    names = read_manifest(tmp_path / 'checkpoints')['state']
    assert not any(name.startswith('frozen/') for name in names)
    assert run.summary['complete']


@pytest.mark.mesh
def test_the_same_on_a_mesh(tiny, tmp_path):
    config = tiny('log.every_steps=1', 'mesh.data=2', 'mesh.fsdp=4', stages=STAGES)
    train.run(config, tmp_path / 'mesh')
    train.run(tiny('log.every_steps=1', 'mesh.data=1', stages=STAGES), tmp_path / 'one')
    got, expected = (np.array(losses(tmp_path / name)) for name in ('mesh', 'one'))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    shardings = trees.flatten(Runtime(config).models[1].shardings)
    assert 'fsdp' in str(shardings['params/width/embed'].spec)
    assert 'fsdp' in str(shardings['frozen/small/embedding/table'].spec)


@pytest.mark.ci
@pytest.mark.usefixtures('quick_compile')
def test_a_vision_transformer(repository, tmp_path):
    """LiGO's other claim, DeiT-S to DeiT-B, at the size of the digits: 10, 20 and 10 steps."""
    sizes = ('width=16', 'layers=1', 'mixer.heads=2')
    config = config_lib.load(
        str(repository / 'configs' / 'digits_vit.py'),
        ['budget=1280examples', 'batch_size=32', 'log.progress=false', 'log.tensorboard=false',
         'log.every_steps=1', 'evals.valid={}', *(f'model.{size}' for size in sizes)],
    )  # fmt: skip
    large = {'width': 32, 'layers': 2, 'mixer': {'kind': 'attention', 'heads': 4}}
    config.stages = (
        {'name': 'small', 'share': 0.25},
        {'name': 'big', 'share': 0.75, 'model': large, 'grow': {**LIGO, 'steps': 20}},
    )
    run = train.run(config, tmp_path)
    found = [row['loss'] for row in rows(tmp_path) if row['stage'] == 1]
    assert len(found) == 20 and np.mean(found[-4:]) < np.mean(found[:4])
    assert run.summary['ledger']['stages']['big:maps']['examples'] == 640
    assert run.summary['eval']['valid']['examples'] == 385


def test_dry_run_shows_the_phase(tiny):
    text = dry_run(tiny(stages=STAGES))
    assert 'big:maps' in text and '    2 steps, ' in text
    assert (
        'grown by the maps of ligo, which 2 steps of AdamW at 0.01 learn (small weights frozen)'
    ) in text
    assert 'grown by the learned maps of ligo (does not keep the function' in text


def test_plan(tiny):
    small, maps, big = stages.plan(tiny(stages=STAGES))
    assert [s.index for s in (small, maps, big)] == [0, 1, 2]
    assert (maps.start, maps.end, maps.limit, maps.maps) == (2, 4, 2, 'learn')
    assert (big.start, big.end, big.limit, big.maps) == (4, 6, 0, 'use')
    assert maps.where == big.where == 'config.stages.1'
    assert maps.config['optimizer'] == {'kind': 'adamw', 'weight_decay': 0.0}
    # The paper's phase unless told otherwise, and none where it is told so.
    short = (SMALL, {**STAGES[1], 'grow': 'ligo', 'steps': 104})
    assert stages.plan(tiny(steps=106, stages=short))[1].limit == 100
    none = (SMALL, {**STAGES[1], 'grow': {'kind': 'ligo', 'steps': 0}})
    assert [s.maps for s in stages.plan(tiny(stages=none))] == ['', '']
    # Its step is another one than the large model's, for tables of reference time too.
    assert shape_of(maps.config) != shape_of({**big.config, 'optimizer': maps.config['optimizer']})


@pytest.mark.parametrize(
    ('grow', 'message'),
    [
        ({'steps': -1}, r'stages\.1\.grow\.steps must be the whole number of steps .* not -1'),
        ({'steps': 1.5}, r'stages\.1\.grow\.steps must be the whole number of steps .* not 1\.5'),
        ({'lr': 0}, r'stages\.1\.grow\.lr must be the positive learning rate .* not 0'),
        ({'lr': -1e-3}, r'stages\.1\.grow\.lr must be the positive learning rate'),
        ({'lr': 'big'}, r"stages\.1\.grow\.lr must be the positive learning rate .* not 'big'"),
        (
            {'steps': 4},
            r"stages\.1\.grow\.steps: 4 steps that learn LiGO's maps take 4 steps, but they and "
            r'the stage behind them last 4 together; give it fewer',
        ),
        ({'moments': 'grow'}, r"stages\.1\.grow\.moments: 'ligo' grows no moments"),
        ({'kind': 'stack'}, r"stages\.1\.grow\.(lr|steps): growth operator 'stack' takes no"),
        ({'depth': 'half'}, r"stages\.1\.grow\.depth: expected one of 'stackbert'"),
    ],
)
def test_mistakes_are_said_before_anything_trains(tiny, grow, message):
    with pytest.raises(ConfigError, match=message):
        setup.check(tiny(stages=(SMALL, {**STAGES[1], 'grow': {**LIGO, **grow}})))


def test_a_phase_too_long_for_its_tokens(tiny):
    config = tiny(steps=0, budget='2048tokens', stages=shares(0.25, {**LIGO, 'steps': 6}))
    with pytest.raises(
        ConfigError, match='6 steps that learn .* take 1536 tokens, but .* last 1536'
    ):
        Runtime(config)


def test_two_stages_of_one_name(tiny):
    twice = tuple({'name': 'one', 'share': 0.5} for _ in range(2))
    with pytest.raises(ConfigError, match=r"stages\.1\.name: another stage is called 'one' too"):
        setup.check(tiny(stages=twice))
