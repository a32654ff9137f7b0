"""Batched runs: each lane is the run that it would be by itself, in numbers, charges and files."""

import json
import operator
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from effjax import report, train
from effjax.core import trees
from effjax.core.errors import CheckpointError, ConfigError
from effjax.costs import StepCost
from effjax.kernels import target
from effjax.training import runtime as runtime_lib
from effjax.training.batched import Group, LaneRuntime, check_batchable, run_batched
from effjax.training.files import plain

# Products over a batch of lanes may be added up in another order than one by one (float32, 6
# digits and more), which a few steps of a tiny model hardly enlarge.
CLOSE = 1e-5
TIMES = ('seconds', 'tokens_per_second')


SMALL = ('model.layers=1', 'model.ffn.hidden=16')
SMALL_MODEL = {
    'width': 8, 'layers': 1, 'mixer': {'kind': 'attention', 'heads': 1},
    'ffn': {'kind': 'swiglu', 'hidden': 16},
}  # fmt: skip

# One layer, two in other batches and with a schedule of its own, then twice the width.
STAGES = (
    {'name': 'one', 'model': SMALL_MODEL, 'share': 0.2},
    {'name': 'two', 'model': {**SMALL_MODEL, 'layers': 2}, 'grow': 'stack', 'share': 0.08,
     'batch_size': 4, 'seq_len': 16, 'schedule': {'final': 0.5}},
    {'name': 'wide', 'grow': 'staged', 'share': 0.72},
)  # fmt: skip


def rows(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def summary(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / 'summary.json').read_text())


def without_times(row: dict) -> dict:
    return {k: float('nan') if v is None else v for k, v in row.items() if k not in TIMES}


def assert_close(ours: dict[str, dict], theirs: dict[str, dict]) -> None:
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=CLOSE, nan_ok=True), name
    assert ours.keys() == theirs.keys()


def assert_same_run(lane: pathlib.Path, alone: pathlib.Path) -> None:
    """Asserts the same files, rows, evaluations and, exactly, the same ledger."""
    ours, theirs = rows(lane), rows(alone)
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a.pop('eval', {}), b.pop('eval', {}))
        assert_close({'row': without_times(a)}, {'row': without_times(b)})
    ours, theirs = summary(lane), summary(alone)
    assert set(ours) == {*theirs, 'batched'}
    for key in ('ledger', 'complete', 'final_step', 'params', 'data', 'environment', 'warnings'):
        assert ours[key] == theirs[key], key
    assert_close(ours['eval'], theirs['eval'])
    assert (lane / 'config.json').read_text() == (alone / 'config.json').read_text()
    assert {f.name for f in alone.iterdir()} - {f.name for f in lane.iterdir()} == {'checkpoints'}


def test_lanes_are_the_runs_they_would_be_alone(tiny, tmp_path, monkeypatch):
    compiled, compile_train = [], runtime_lib.compile_train

    def counted(*args, **options):
        compiled.append(options['lanes'])
        return compile_train(*args, **options)

    monkeypatch.setattr(runtime_lib, 'compile_train', counted)
    lanes = {
        'zero': (),
        'one': ('seed=1',),
        'two': ('seed=2',),
        'slow': ('seed=1', 'init_seed=5', 'schedule.peak=3e-3', 'name=slow'),
        'wild': ('schedule.peak=1e30',),
    }
    configs = [tiny('evals.valid.every_steps=3', *changes) for changes in lanes.values()]
    (tmp_path / 'one').mkdir()  # an earlier attempt, which is replaced
    (tmp_path / 'one' / 'metrics.jsonl').write_text('{"step": 77}\n')
    began = time.perf_counter()
    out = run_batched(configs, [tmp_path / name for name in lanes], report.write)
    wall = time.perf_counter() - began
    assert compiled == [5]
    assert plain(out) == [summary(tmp_path / name) for name in lanes]

    for name, config in zip(lanes, configs, strict=True):
        if name != 'wild':
            train.run(config, tmp_path / 'alone' / name)
            assert_same_run(tmp_path / name, tmp_path / 'alone' / name)
            assert (tmp_path / name / 'report.html').stat().st_size > 1000
    first = [rows(tmp_path / name)[0]['loss'] for name in ('zero', 'one', 'two', 'slow')]
    assert len(set(first)) == 4
    # Lanes share the clock: together they are charged no more than passed.
    times = [sum(s['clock'][k] for k in s['clock'] if k != 'device_seconds') for s in out]
    assert 0.3 * wall < sum(times) < wall
    assert all(s['batched'] == {'lanes': 5} for s in out)

    # The diverging lane ends alone, with a row of the step that went wrong, and says why.
    wild, last = out[-1], rows(tmp_path / 'wild')[-1]
    assert not wild['complete'] and wild['final_step'] == last['step'] < 6
    assert wild['error'].startswith(
        f'the loss or its gradient is not finite at step {last["step"]}'
    )
    assert 'samples' in wild['error'] and last['skipped'] == 1
    assert f'ended after {last["step"]} steps: ' in (tmp_path / 'wild' / 'report.html').read_text()
    assert wild['ledger']['skipped'] == 1 and wild['eval'] == {}
    assert times[-1] < times[0]


@pytest.mark.ci
def test_lanes_grow_as_the_runs_would_alone(tiny, tmp_path, quick_compile):
    lanes = {
        'zero': (),
        'slow': ('seed=1', 'init_seed=5', 'schedule.peak=3e-3'),
        'wild': ('schedule.peak=1e30',),
    }
    # Model FLOPs, in which growing counts too: two steps a stage.
    same = ('steps=0', 'budget=43.5e6flops', 'evals.valid.every_steps=3', 'evals.valid.batches=1')
    configs = [tiny(*same, *changes, stages=STAGES) for changes in lanes.values()]
    out = run_batched(configs, [tmp_path / name for name in lanes], report.write)
    train.run(configs[1], tmp_path / 'alone')
    assert_same_run(tmp_path / 'slow', tmp_path / 'alone')
    found = rows(tmp_path / 'slow')
    assert [row['stage'] for row in found] == [0, 0, 1, 1, 2, 2]
    assert ['eval' in row for row in found] == [False, False, True, False, False, True]
    assert out[0]['ledger']['forward']['growth'] > 0
    assert out[0]['params'] == LaneRuntime(configs).models[2].params

    # What ended in the first stage stays ended: no rows, charges or memory of later ones.
    wild = out[-1]
    assert not wild['complete'] and wild['final_step'] == rows(tmp_path / 'wild')[-1]['step'] == 2
    assert list(wild['ledger']['stages']) == ['one'] and wild['ledger']['forward'] == {}
    assert wild['memory']['compiled']['total'] < out[0]['memory']['compiled']['total']


@pytest.mark.ci
def test_lanes_see_their_parameters_by_a_view(tiny, tmp_path, quick_compile):
    """Masks that rise, then maps that are learned, as the runs alone; a lane by a lane's seed."""

    def sized(hidden, **more):
        return {**more, 'ffn': {'kind': 'swiglu', 'hidden': hidden}}

    ligo, msg = {'kind': 'ligo', 'steps': 2}, {'kind': 'msg', 'ramp': 1.0}
    stages = (
        {'name': 'one', 'model': sized(16, layers=1), 'steps': 2},
        {'name': 'two', 'model': sized(32), 'grow': msg, 'steps': 2},
        {'name': 'three', 'model': sized(64), 'grow': ligo, 'steps': 4},
    )
    configs = [
        tiny(f'seed={seed}', 'steps=8', 'evals.valid.every_steps=3', stages=stages)
        for seed in (0, 1)
    ]
    run_batched(configs, [tmp_path / 'zero', tmp_path / 'one'], report.write)
    train.run(configs[1], tmp_path / 'alone')
    assert_same_run(tmp_path / 'one', tmp_path / 'alone')
    assert [row['stage'] for row in rows(tmp_path / 'zero')] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_each_lane_grows_with_its_own_seed(tiny):
    same = ('steps=100', 'init_seed=7')
    configs = [tiny(f'seed={seed}', *same, stages=STAGES) for seed in (0, 1, 1)]

    def grown(runtime: runtime_lib.Runtime) -> tuple[dict, StepCost]:
        grow, cost = runtime.transition(runtime.stages[2])
        return grow(runtime.initial_state(1)), cost

    all_lanes, cost = grown(LaneRuntime(configs))
    lanes = [jax.tree.map(operator.itemgetter(i), all_lanes) for i in range(3)]
    alone, its_cost = grown(runtime_lib.Runtime(configs[1]))
    assert cost == its_cost
    for lane in lanes[1:]:
        jax.tree.map(np.testing.assert_array_equal, lane, alone)
    up = [trees.flatten(lane['params'])['body/segment_0/slot_0/ffn/up/kernel'] for lane in lanes]
    assert not np.array_equal(up[0], up[1])


@pytest.mark.ci
@pytest.mark.parametrize(
    'changes',
    [
        ('ema=0.9', 'optimizer.kind=muon', 'accumulate=2', 'model.dropout=0.1'),
        ("precision={'kind': 'fp16', 'initial': 1e9}", 'steps=9', 'log.every_steps=2'),
    ],
    ids=['ema-muon-accumulate', 'fp16'],
)
def test_what_a_state_may_hold(tiny, tmp_path, changes):
    configs = [tiny(*SMALL, *changes), tiny(*SMALL, *changes, 'seed=3', 'schedule.peak=2e-2')]
    out = run_batched(configs, [tmp_path / 'a', tmp_path / 'b'], report.write)
    assert [s['complete'] for s in out] == [True, True]
    alone = train.run(configs[1], tmp_path / 'alone')
    assert_same_run(tmp_path / 'b', tmp_path / 'alone')
    assert bool(alone.summary['ledger']['skipped']) == ('precision' in changes[0])


def test_a_signal_leaves_no_summaries(tiny, tmp_path, monkeypatch, capfd):
    record = Group._record

    def wrapped(self, flight, *args):
        record(self, flight, *args)
        if flight.row['step'] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Group, '_record', wrapped)
    small = (*SMALL, 'evals={}')
    configs = [tiny(*small), tiny(*small, 'seed=1')]
    folders = [tmp_path / 'a', tmp_path / 'b']
    folders[0].mkdir()
    (folders[0] / 'summary.json').write_text('{"complete": true}')
    out = run_batched(configs, folders)
    assert [s['stopped_by'] for s in out] == ['SIGTERM'] * 2
    assert not any(s['complete'] for s in out)
    assert not any((f / 'summary.json').exists() for f in folders)
    assert 'batched runs keep no checkpoints and begin again' in capfd.readouterr().err
    monkeypatch.undo()
    assert all(s['complete'] and s['final_step'] == 6 for s in run_batched(configs, folders))
    assert [row['step'] for row in rows(folders[0])] == [1, 2, 3, 4, 5, 6]


def test_when_all_lanes_are_lost_it_ends(tiny, tmp_path):
    wild = (*SMALL, 'evals={}', 'schedule.peak=1e30', 'steps=100000')
    configs = [tiny(*wild), tiny(*wild, 'seed=1')]
    out = run_batched(configs, [tmp_path / 'a', tmp_path / 'b'])
    assert all(not s['complete'] and s['final_step'] < 10 and s['error'] for s in out)


def test_documents_take_an_attention_that_can_be_batched(tiny):
    def attention(*changes: str) -> str | None:
        with target('gpu'):
            runtime = LaneRuntime([tiny(*changes), tiny(*changes, 'seed=1')])
        assert runtime.stages[0].config['execution']['attention'] is None
        return runtime.configs[1]['execution']['attention']

    assert attention() == 'xla'
    assert attention('data.packing=stream') is None
    later = "stages=({'share': 0.5}, {'share': 0.5, 'data': {'packing': 'pack'}})"
    assert attention('data.packing=stream', later) == 'xla'
    assert LaneRuntime([tiny()]).config['execution']['attention'] is None
    with pytest.raises(ConfigError, match="'cudnn' cannot keep documents apart in batched runs"):
        LaneRuntime([tiny('execution.attention=cudnn')])


@pytest.mark.parametrize(
    ('first', 'second', 'message'),
    [
        ([], ['optimizer.b1=0.8'], 'run 1 has another config.optimizer.b1 than run 0'),
        ([], ['steps=7'], 'run 1 has another config.steps than run 0'),
        (['mesh.data=1'], ['mesh.data=-1'], 'run 1 has another config.mesh.data than run 0'),
        (["init_from={'run': 'there', 'charge': False}"], None, 'config.init_from names a run'),
        (
            ["stages=({'share': 0.5, 'until': {'slope': -0.1}}, {'share': 0.5})"],
            None,
            "config.stages.0.until ends a stage by its own run's loss",
        ),
        (['steps=0', 'budget=5s'], None, 'config.budget counts seconds, which batched runs share'),
        (['steps=0', 'budget=5J'], None, 'config.budget counts joules, which batched runs share'),
        (['log.wandb=there'], None, 'config.log.wandb follows one run at a time'),
        ([], ['schedule.peak=-1'], 'config.schedule.peak must be above 0'),
    ],
)
def test_what_cannot_be_batched_is_refused(tiny, first, second, message):
    configs = [tiny(*first), tiny(*(first if second is None else second), 'seed=1')]
    with pytest.raises(ConfigError) as error:
        check_batchable(configs)
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_mesh_of_several_devices_is_refused(tiny, monkeypatch):
    class Mesh:
        size = 8

    monkeypatch.setattr('effjax.training.batched.parallel.make_mesh', lambda block: Mesh())
    with pytest.raises(ConfigError, match='share one device, but config.mesh spans 8'):
        check_batchable([tiny()])


def test_folders_that_cannot_be(tiny, tmp_path):
    with pytest.raises(ConfigError, match='at least one config'):
        run_batched([], [])
    with pytest.raises(ConfigError, match='2 batched runs need as many different work folders'):
        run_batched([tiny(), tiny('seed=1')], [tmp_path, tmp_path])
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'config.json').write_text(json.dumps({'seed': 9}))
    with pytest.raises(CheckpointError, match='belongs to another config'):
        run_batched([tiny(), tiny('seed=1')], [tmp_path / 'a', tmp_path / 'b'])


def test_the_first_state_is_bit_by_bit_that_of_a_run(tiny):
    configs = [tiny(*SMALL, 'seed=4'), tiny(*SMALL, 'seed=1', 'init_seed=7')]
    both = LaneRuntime(configs).initial_state()
    for i, config in enumerate(configs):
        alone = runtime_lib.Runtime(config).initial_state()
        lane = jax.tree.map(operator.itemgetter(i), both)
        jax.tree.map(np.testing.assert_array_equal, lane, alone)
