"""When evaluations run, and that they add up every batch once."""

import types

import numpy as np
import pytest

from effjax.training import evaluate


def make(every_steps=0, every_share=0.0):
    return evaluate.Evaluation('valid', every_steps, every_share, [], 4, slice(0, 4))


def test_by_steps():
    due = [step for step in range(1, 11) if make(every_steps=3).due(step, 0, 0)]
    assert due == [3, 6, 9]


@pytest.mark.parametrize('steps', [4, 7, 10, 100])
def test_by_share_of_the_run(steps):
    evaluation = make(every_share=0.25)
    due = [i for i in range(steps) if evaluation.due(i + 1, i / steps, (i + 1) / steps)]
    assert len(due) == 4 and due[-1] == steps - 1


def test_only_at_the_end():
    assert not any(make().due(step, step / 10, (step + 1) / 10) for step in range(10))


def test_sums_cover_every_batch_once_and_stop_when_asked():
    batches = [{'x': np.full((4, 2), float(i))} for i in range(20)]
    evaluation = evaluate.Evaluation('valid', 0, 0.0, batches, 4, slice(1, 3))
    task = types.SimpleNamespace(metrics=lambda sums, source: sums)

    def step(params, buffers, batch):
        assert batch['x'].shape == (2, 2)  # this process's rows only
        return {'loss': np.array([batch['x'].sum(), batch['x'].size])}

    out = evaluate.run(evaluation, step, None, None, dict, task)
    assert out == {'loss': (4.0 * sum(range(20)), 80.0)}
    asked = iter([False, False, True])
    assert evaluate.run(evaluation, step, None, None, dict, task, lambda: next(asked)) is None
