"""A run that begins from another run's checkpoint: its weights, its cost, and what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from effjax import generate, train
from effjax.core import trees
from effjax.core.errors import CheckpointError, ConfigError
from effjax.training import resume, setup, sources
from effjax.training.dryrun import dry_run
from effjax.training.runtime import Runtime


def rows(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def source(tmp_path_factory, words):
    """A finished run of one layer, 6 steps of 8 x 32 bytes."""
    folder = tmp_path_factory.mktemp('source') / 'run-0'
    return folder, words


@pytest.fixture
def small(tiny, source):
    """Trains the source once, and returns its folder."""
    folder, _ = source
    if not folder.exists():
        train.run(tiny('model.layers=1'), folder)
    return folder


def begin(folder, **more):
    return {'run': str(folder), 'charge': False, **more}


def test_the_weights_are_those_of_the_run(tiny, small, tmp_path):
    config = tiny(
        'model.layers=1',
        'steps=1',
        init_from=begin(small),
        schedule={'kind': 'constant', 'peak': 1e-9},
    )
    train.run(config, tmp_path / 'next')
    theirs = generate.load(small).arrays['params']
    ours = generate.load(tmp_path / 'next').arrays['params']
    for name, x in trees.flatten(theirs).items():
        # One step at a learning rate of 1e-9.
        np.testing.assert_allclose(trees.flatten(ours)[name], x, atol=1e-8, err_msg=name)


def test_the_optimizer_may_go_on(tiny, small, tmp_path):
    """As one run of 6 + 2 steps, on other data."""
    runtime = Runtime(tiny('model.layers=1', init_from=begin(small, optimizer='keep')))
    from effjax import parallel

    with parallel.mesh_context(runtime.mesh, runtime.rules):
        kept = runtime.source_state()
    counts = [x for name, x in trees.flatten(kept['optimizer']).items() if 'count' in name]
    assert counts and all(int(x) == 6 for x in counts) and int(kept['step']) == 0


@pytest.mark.parametrize('charge', [True, False])
def test_its_cost_counts_or_is_free(tiny, small, tmp_path, charge):
    spent = json.loads((small / 'summary.json').read_text())['ledger']
    config = tiny(
        'steps=0', 'model.layers=1', f'budget={2 * spent["tokens"]}tokens',
        init_from=begin(small, charge=charge),
    )  # fmt: skip
    done = train.run(config, tmp_path)
    ledger = done.summary['ledger']
    assert ledger['tokens'] == 2 * spent['tokens']
    assert ledger['steps'] == (6 if charge else 12)
    assert ledger['sources']['init_from']['tokens'] == spent['tokens']
    assert ledger['sources']['init_from']['charged'] is charge
    assert ledger['model_flops'] == 2 * spent['model_flops']
    # The schedule is this run's own, from its first step to its last.
    rates = [row['lr'] for row in rows(tmp_path)]
    assert rates[0] < 1e-2 and max(rates) > 0.8e-2 and rates[-1] < 2e-3


def test_it_may_grow(tiny, small, tmp_path):
    stages = ({'share': 1.0, 'grow': 'stack'},)
    config = tiny('steps=3', stages=stages, init_from=begin(small))
    done = train.run(config, tmp_path)
    assert done.summary['params'] == Runtime(config).params
    assert done.summary['ledger']['forward'] == {'growth': 0}  # copies are no arithmetic
    assert rows(tmp_path)[0]['loss'] < rows(small)[0]['loss'] - 0.5  # than a new model's
    text = dry_run(config)
    assert 'begins from step 6 of' in text and 'that are free' in text
    assert 'grown by stack (does not keep the function; moments grown)' in text


@pytest.mark.ci
def test_maps_may_be_learned_from_it(tiny, small, tmp_path):
    """LiGO on a finished model, whose cost is free: the papers' case."""
    stages = ({'name': 'big', 'share': 1.0, 'grow': {'kind': 'ligo', 'steps': 2}},)
    done = train.run(tiny('steps=4', stages=stages, init_from=begin(small)), tmp_path)
    assert [row['stage'] for row in rows(tmp_path)] == [0, 0, 1, 1]
    assert list(done.summary['ledger']['stages']) == ['big:maps', 'big']


@pytest.mark.ci
def test_a_run_that_goes_on_does_not_need_it(tiny, source, small, tmp_path):
    other = tmp_path / 'source'
    shutil.copytree(small, other)
    config = tiny('model.layers=1', 'steps=8', 'checkpoint.every_steps=2', init_from=begin(other))
    train.run(config, tmp_path / 'whole')
    cut = shutil.copytree(tmp_path / 'whole', tmp_path / 'cut')
    for step in ('8', '6'):
        shutil.rmtree(cut / 'checkpoints' / step, ignore_errors=True)
    assert (cut / 'checkpoints').exists()
    shutil.rmtree(other)
    config = tiny('model.layers=1', 'steps=10', init_from=begin(other))
    done = train.run(config, tmp_path / 'whole')  # two steps more
    assert done.summary['final_step'] == 10
    assert done.summary['ledger']['sources']['init_from']['steps'] == 6


def test_the_folder_may_name_the_seed(tiny, small):
    folder = str(small).replace('run-0', 'run-{seed}')
    assert Runtime(tiny('model.layers=1', init_from=begin(folder))).source.folder == small


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ({'run': 'nowhere', 'charge': True}, r'init_from\.charge: a run counted in steps cannot'),
        ({'run': 'nowhere'}, r'init_from must say whether what the run has cost counts'),
        ({'charge': False}, r'init_from\.run must name the folder of a run'),
        ({'run': 'x', 'charge': 'no'}, r"init_from\.charge must be bool, got 'no'"),
        ({'run': 'x', 'charge': False, 'steps': 3}, r'unknown key config\.init_from\.steps'),
        (
            {'run': 'x', 'charge': False, 'optimizer': 'grow'},
            r"init_from\.optimizer must be 'reset' or 'keep', got 'grow'",
        ),
    ],
)
def test_blocks_that_are_refused(tiny, block, message):
    with pytest.raises(ConfigError, match=message):
        setup.check(tiny(init_from=block))


def test_runs_that_are_refused(tiny, small, tmp_path):
    def refused(message, *overrides, **changes):
        with pytest.raises(ConfigError, match=message):
            Runtime(tiny(*overrides, **{'init_from': begin(small), **changes}))

    refused(r'init_from\.run: .*nowhere holds no run', init_from=begin(tmp_path / 'nowhere'))
    refused(r'init_from\.run: no valid checkpoint of step 5', init_from=begin(small, step=5))
    refused(r'the model of .* is another one: .*kernel', 'model.layers=2')
    other = {**tiny().model.to_dict(), 'layers': 1, 'norm': {'kind': 'layernorm'}}
    refused(r'config\.model\.norm.* is .* there, .* here', model=other)
    refused(
        r'has used 1536 tokens, and the first stage ends at 1000',
        'steps=0', 'budget=1000tokens', 'model.layers=1', init_from=begin(small, charge=True),
    )  # fmt: skip
    refused(
        r'init_from: .* was trained with another tokenizer',
        'model.layers=1',
        data={**tiny().data.to_dict(), 'tokenizer': {'kind': 'char'}},
    )


def test_a_cost_that_is_not_known_cannot_be_charged(tiny, small):
    source = Runtime(tiny('model.layers=1', init_from=begin(small))).source
    unknown = dataclasses.replace(
        source, charge=True, totals={**source.totals, 'hardware_flops': None}
    )
    with pytest.raises(ConfigError, match=r'has used is not known in hardware_flops'):
        sources.check_charge(unknown, 'hardware_flops', 1e15)
    sources.check_charge(unknown, 'tokens', 1e15)
    with pytest.raises(ConfigError, match=r'has used 1600 tokens, and the first stage ends at'):
        sources.check_charge(unknown, 'tokens', 1600.0, 64.0)


def test_tables_of_positions_keep_their_length(tiny, small, tmp_path):
    model = {**tiny().model.to_dict(), 'layers': 1, 'positions': {'kind': 'learned'}}
    train.run(tiny('steps=1', model=model), tmp_path / 'source')
    with pytest.raises(
        ConfigError, match=r'positions.* is \(32, 16\), but \(16, 16\) for the rows'
    ):
        Runtime(tiny('seq_len=16', model=model, init_from=begin(tmp_path / 'source')))


@pytest.mark.parametrize(
    'grow', [{'kind': 'ligo', 'steps': 0}, {'kind': 'stack', 'moments': 'reset'}]
)
def test_moments_that_are_made_anew_cannot_be_kept(tiny, small, grow):
    stages = ({'share': 1.0, 'grow': grow},)
    with pytest.raises(
        ConfigError, match=r"init_from\.optimizer: 'keep' goes on with moments that"
    ):
        setup.check(tiny(stages=stages, init_from=begin(small, optimizer='keep')))


def test_another_source_is_another_run(tiny, small):
    one, other = (
        resume.manifest(
            tiny(stages=[{'share': 1.0, 'init_from': begin(small, charge=charge)}]).to_dict(), {}, 0
        )
        for charge in (True, False)
    )
    with pytest.raises(CheckpointError, match=r'init_from\.charge: True there, False here'):
        resume.check_config(one['config'], other['config'], 'runs/x')


def test_only_the_first_stage_begins(tiny, small):
    stages = ({'share': 0.5}, {'share': 0.5, 'init_from': begin(small)})
    with pytest.raises(ConfigError, match=r'stages\.1\.init_from: only the first stage can begin'):
        setup.check(tiny(stages=stages))
