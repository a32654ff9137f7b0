"""The slope of a loss over compute, and stages that it ends."""

import json
import math

import numpy as np
import pytest

from effjax import train
from effjax.core.errors import ConfigError
from effjax.training.dryrun import dry_run
from effjax.training.slope import LossSlope
from effjax.training.stages import plan

# As soon as a stretch of compute that doubles is known: any slope is above -10.
STAGES = (
    {'share': 0.7, 'model': {'layers': 1}, 'until': {'slope': -10.0, 'window': 2.0}},
    {'share': 0.3, 'grow': 'stack', 'schedule': {'warmup': 0.0}},
)


def follow(slope, losses, flops=1e9):
    """Gives a slope the losses of steps 1, 2, ... and returns its value before each."""
    found = []
    for step, loss in enumerate(losses, 1):
        found.append(slope.value(step))
        slope.add(step, flops * step, loss)
    return found


def test_of_a_power_law():
    steps = np.arange(1, 401)
    found = follow(LossSlope(1.5), 3.0 * steps**-0.07)
    assert found[:12] == [None] * 12
    # A bin holds several steps, whose means lie on the line up to its curvature within a bin.
    np.testing.assert_allclose([x for x in found if x is not None], -0.07, rtol=1e-4)


def test_of_a_noisy_loss_that_flattens():
    rng, steps = np.random.default_rng(0), np.arange(1, 2001)
    losses = (1.0 + steps**-0.5) * np.exp(0.01 * rng.normal(size=len(steps)))
    found = follow(LossSlope(1.5), losses)
    expected = -0.5 * steps**-0.5 / (1 + steps**-0.5)  # at the end of the stretch
    late = slice(500, None)
    # Noise of 1 % over 170 steps or more of 0.4 in log(C): 0.01 / sqrt(170) / 0.12 = 0.007.
    assert np.max(np.abs(np.array(found[late], float) - expected[late])) < 0.03


def test_the_newest_loss_does_not_count():
    """A loop that has just waited for all losses knows one more than it would otherwise."""
    losses = np.linspace(3, 1, 60)
    one, other = LossSlope(1.5), LossSlope(1.5)
    follow(one, losses[:58]), follow(other, losses[:59])
    assert one.value(60) == other.value(60) is not None


def test_it_is_saved_and_taken_up():
    losses = list(np.linspace(3, 1, 80))
    whole, first, second = (LossSlope(1.5) for _ in range(3))
    expected = follow(whole, losses)[50:]
    follow(first, losses[:50])
    second.restore(json.loads(json.dumps(first.to_dict())))
    found = []
    for step in range(51, 81):
        found.append(second.value(step))
        second.add(step, 1e9 * step, losses[step - 1])
    assert found == expected
    assert len(second.to_dict()['bins']) < 85


def test_what_is_no_loss_is_left_out():
    slope = LossSlope(1.5)
    for step in range(1, 50):
        slope.add(step, 1e9 * step, math.nan)
    assert slope.value(60) is None


def rows(workdir):
    found = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    return [(row['step'], row['stage'], row['lr'], row['loss']) for row in found]


def test_a_stage_ends_early_and_the_next_one_gets_the_rest(tiny, tmp_path):
    config = tiny('steps=40', stages=STAGES)
    assert [stage.end for stage in plan(config)] == [28, 40]
    whole = train.run(config, tmp_path / 'whole')
    found = rows(whole.workdir)
    stages = [stage for _, stage, _, _ in found]
    first = stages.count(0)
    assert 15 < first < 28 and len(found) == 40
    # The second stage's own schedule runs over all that is left.
    left = 40 - first
    np.testing.assert_allclose(
        [lr for _, stage, lr, _ in found if stage],
        [1e-2 * (1 - (i + 0.5) / left) for i in range(left)],
        rtol=1e-5,
    )


@pytest.mark.ci
@pytest.mark.parametrize('step', [9, 18, 30])
def test_an_interrupted_run_decides_alike(tiny, tmp_path, stop_after, step):
    config = tiny('steps=40', stages=STAGES)
    train.run(config, tmp_path / 'whole')
    stop_after(step)
    assert train.run(config, tmp_path / 'cut').stopped_by == 'SIGTERM'
    train.run(config, tmp_path / 'cut')
    assert rows(tmp_path / 'cut') == rows(tmp_path / 'whole')


def test_dry_run_says_it(tiny):
    assert 'ends early once its loss falls by a slope above -10' in dry_run(tiny(stages=STAGES))


@pytest.mark.parametrize(
    ('until', 'message'),
    [
        ({}, r'stages\.0\.until needs a slope below 0'),
        ({'slope': 0.05}, r'stages\.0\.until needs a slope below 0'),
        ({'slope': -0.05, 'window': 1.0}, r'window is how many times .* above 1\.1, got 1\.0'),
        ({'slope': 'flat'}, r'stages\.0\.until\.slope must be a number'),
        ({'slop': -0.05}, r"stages\.0\.until takes slope and window, not 'slop'"),
    ],
)
def test_bad_input(tiny, until, message):
    stages = ({**STAGES[0], 'until': until}, STAGES[1])
    with pytest.raises(ConfigError, match=message):
        plan(tiny(stages=stages))


def test_nothing_follows_the_last_stage(tiny):
    stages = (STAGES[0], {**STAGES[1], 'until': {'slope': -0.05}})
    with pytest.raises(ConfigError, match=r'stages\.1\.until: no stage follows'):
        plan(tiny(stages=stages))
