"""Stages grown by 'msg': a mask that rises in training, evaluation and resumed runs alike."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from effjax import generate, parallel
from effjax.core import trees
from effjax.core.errors import ConfigError
from effjax.training import evaluate
from effjax.training.loop import Trainer
from effjax.training.runtime import Runtime

# To 16 units, 2 heads, 32 hidden units and 2 layers at once, then a stage that is not grown into.
SMALL = {
    'width': 8, 'layers': 1, 'mixer': {'kind': 'attention', 'heads': 1},
    'ffn': {'kind': 'swiglu', 'hidden': 24}, 'norm': {'kind': 'rmsnorm', 'eps': 2e-6},
}  # fmt: skip
STAGES = (
    {'name': 'small', 'model': SMALL, 'steps': 2},
    {'name': 'masked', 'grow': {'kind': 'msg', 'ramp': 0.8}, 'steps': 5},
    {'name': 'whole', 'steps': 1},
)
DOWN = 'body/segment_0/slot_0/ffn/down/kernel'


def judged_loss(runtime, state, index, share):
    """The loss of a state's evaluation when a share of the stage is done."""
    (evaluation,) = runtime.evaluations(runtime.stages[index])
    params = runtime.eval_params(state, index, (0.5, share))
    step, put = runtime.compile_eval(evaluation, index), runtime.putter(evaluation.batch_size)
    return evaluate.run(evaluation, step, params, state['buffers'], put, runtime.task)['loss']


def test_the_view_is_of_its_stage_alone(tiny):
    small, masked, whole = Runtime(tiny('steps=8', stages=STAGES)).models
    assert small.view is None and masked.view is not None
    # What follows has the same model and sees all of it.
    assert whole.view is None and whole.built is masked.built and whole is not masked


@pytest.mark.ci
def test_a_stage_begins_with_the_function_of_the_one_before(tiny):
    runtime = Runtime(tiny('steps=8', stages=STAGES))
    with parallel.mesh_context(runtime.mesh, runtime.rules):
        state = runtime.initial_state()
        state['params'] = jax.tree.map(lambda x: 4 * x, state['params'])  # it computes something
        grown = runtime.transition(runtime.stages[1])[0](state)
        before = judged_loss(runtime, state, 0, 1.0)
        after = [judged_loss(runtime, grown, i, s) for i, s in ((1, 0.0), (1, 0.4), (1, 0.8))]
        # float32, another order of sums
        np.testing.assert_allclose(after[0], before, rtol=1e-5)
        assert min(abs(after[0] - after[1]), abs(after[1] - after[2])) > 1e-3
        # From the ramp's end on, and in a stage behind it from the start, nothing is hidden.
        assert judged_loss(runtime, grown, 2, 0.0) == after[2]
        params = runtime.eval_params(grown, 1, (0.5, 0.8))
    jax.tree.map(np.testing.assert_array_equal, params, grown['params'])


def trained(config, folder, monkeypatch, until=None):
    """A trainer after its run, to the end or to a signal after a step."""
    record = Trainer._record

    def wrapped(self, flight, *args):
        record(self, flight, *args)
        if flight.row['step'] == until:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, '_record', wrapped)
        trainer = Trainer(config, folder)
        trainer.run()
    return trainer


def rows(folder):
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return [(r['step'], r['stage'], r['loss'], r['eval']['valid']) for r in map(json.loads, lines)]


@pytest.mark.ci
def test_a_run_that_is_cut_while_the_mask_rises(tiny, tmp_path, monkeypatch):
    config = tiny('steps=8', stages=STAGES, evals={'valid': {'every_steps': 1}})
    whole = trained(config, tmp_path / 'whole', monkeypatch)
    jax.tree.map(np.testing.assert_array_equal, whole.judged()['params'], whole.state['params'])
    cut = trained(config, tmp_path / 'cut', monkeypatch, until=3)
    assert cut.stopped_by == 'SIGTERM' and cut.progress[1] in (0.2, 0.4)
    # What is judged, and what a checkpoint generates with, is what the mask lets through.
    raw, seen = (trees.flatten(p) for p in (cut.state['params'], cut.judged()['params']))
    mask = np.where(np.arange(32) < 24, 1, cut.progress[1] / 0.8)
    share = np.asarray(seen[DOWN] / raw[DOWN])[0, :, :8]  # of the old layer
    np.testing.assert_allclose(share, np.broadcast_to(mask[:, None], share.shape), rtol=1e-5)
    loaded = trees.flatten(generate.load(tmp_path / 'cut').arrays['params'])
    jax.tree.map(np.testing.assert_array_equal, loaded, seen)
    trained(config, tmp_path / 'cut', monkeypatch)
    assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')


def test_the_sentence_names_the_stage(tiny):
    stages = (STAGES[0], {'share': 0.5, 'grow': {'kind': 'msg', 'ramp': 2.0}})
    stages = ({k: v for k, v in stages[0].items() if k != 'steps'} | {'share': 0.5}, stages[1])
    with pytest.raises(ConfigError, match=r"stages\.1\.grow: 'msg': ramp is a share of the stage"):
        Runtime(tiny(stages=stages))
