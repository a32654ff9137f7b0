"""Schedules: ends, monotony, float64, and messages."""

import itertools
import math

import numpy as np
import pytest

from effjax.core.errors import ConfigError
from effjax.training import SCHEDULES, schedules

BLOCKS = [
    ({'kind': 'constant'}, 1.0),
    ({'kind': 'linear'}, 0.0),
    ({'kind': 'linear', 'final': 0.1}, 0.1),
    ({'kind': 'cosine'}, 0.0),
    ({'kind': 'cosine', 'final': 0.1}, 0.1),
    ({'kind': 'cosine', 'stairs': 1000}, 0.0),
    ({'kind': 'wsd'}, 0.0),
    ({'kind': 'wsd', 'shape': 'sqrt', 'final': 0.3}, 0.3),
    ({'kind': 'wsd', 'shape': 'cosine', 'decay': 0.9}, 0.0),
    ({'kind': 'wsd', 'decay': 0.0, 'final': 0.5}, 0.5),
]


@pytest.mark.parametrize('warmup', [0.0, 0.02, 0.1])
@pytest.mark.parametrize(('block', 'final'), BLOCKS)
def test_ends_and_monotony(block, final, warmup):
    schedule = schedules.build({**block, 'peak': 3e-4, 'warmup': warmup})
    assert schedule(1.0) == 3e-4 * final  # exactly
    assert schedule(warmup) == pytest.approx(3e-4, rel=1e-12)
    rates = [schedule(p) for p in np.linspace(0, 1, 1001)]
    assert all(type(r) is float for r in rates)
    assert max(rates) <= 3e-4
    start = math.ceil(warmup * 1000)
    assert rates[0] == (0.0 if warmup else 3e-4)
    assert all(a <= b for a, b in itertools.pairwise(rates[:start]))
    assert all(a >= b for a, b in itertools.pairwise(rates[start:]))


def test_values():
    assert schedules.cosine(peak=2.0)(0.5) == pytest.approx(1.0)
    assert schedules.cosine(peak=2.0, warmup=0.2)(0.1) == pytest.approx(1.0)
    assert schedules.linear(peak=2.0, warmup=0.5)(0.75) == pytest.approx(1.0)
    # torch.optim.lr_scheduler.CosineAnnealingLR(T_max=4) stepped once an epoch.
    stairs = schedules.cosine(peak=2.0, stairs=4)
    epochs = [2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]
    assert [stairs((e + x) / 4) for e in range(4) for x in (0.0, 0.999)] == pytest.approx(
        np.repeat(epochs, 2)
    )
    wsd = schedules.wsd(peak=1.0, decay=0.4)
    assert [wsd(p) for p in (0.3, 0.6, 0.8)] == pytest.approx([1.0, 1.0, 0.5])
    root = schedules.wsd(peak=1.0, decay=0.4, shape='sqrt')
    assert root(0.7) == pytest.approx(0.5)


def test_piecewise():
    schedule = schedules.build(
        {'kind': 'piecewise', 'peak': 2.0, 'points': [[0, 0], [0.1, 1], [0.5, 1], [1, 0.25]]}
    )
    assert [schedule(p) for p in (0, 0.05, 0.1, 0.3, 0.75, 1)] == pytest.approx(
        [0, 1, 2, 2, 1.25, 0.5]
    )
    assert schedule(1.0) == 0.5


def test_float64():
    """Neighbouring steps of a run of 10^8 steps have different rates; float32 has 7 digits."""
    schedule = schedules.linear(peak=1e-3)
    assert schedule(0.5) != schedule(0.5 + 1e-8)


def test_progress_outside_counts_as_the_nearest_end():
    schedule = schedules.cosine(peak=1.0, warmup=0.1)
    assert schedule(1.0000001) == schedule(1.0) == 0
    assert schedule(-1e-9) == 0
    with pytest.raises(ValueError, match='got nan'):
        schedule(float('nan'))


@pytest.mark.parametrize(
    ('block', 'message'),
    [
        ({'kind': 'cosin', 'peak': 1.0}, "unknown schedule 'cosin' at config.schedule.*'cosine'"),
        ({'kind': 'cosine'}, "needs 'peak'; give config.schedule.peak"),
        ({'kind': 'cosine', 'peak': 1.0, 'stairs': -1}, 'config.schedule.stairs must not be neg'),
        ({'kind': 'cosine', 'peak': 0.0}, 'config.schedule.peak must be above 0, got 0.0'),
        ({'kind': 'cosine', 'peak': 1.0, 'warmup': 100}, r'warmup must be a share .* got 100'),
        (
            {'kind': 'linear', 'peak': 1.0, 'final': 2.0},
            r'config.schedule.final must be in \[0, 1\]',
        ),
        ({'kind': 'wsd', 'peak': 1.0, 'warmup': 0.5, 'decay': 0.6}, 'longer than the run'),
        ({'kind': 'wsd', 'peak': 1.0, 'shape': 'cubic'}, "one of 'linear', 'sqrt', 'cosine'"),
        ({'kind': 'piecewise', 'peak': 1.0, 'points': (1, 2)}, 'at least two pairs'),
        ({'kind': 'piecewise', 'peak': 1.0, 'points': ((0, 1), (0.5, 1))}, 'from 0 to 1'),
        ({'kind': 'piecewise', 'peak': 1.0, 'points': ((0, 1), (1, -1))}, 'at least 0'),
    ],
)
def test_bad_blocks(block, message):
    with pytest.raises(ConfigError, match=message):
        schedules.build(block)


def test_every_schedule_is_tested():
    assert {block['kind'] for block, _ in BLOCKS} | {'piecewise'} == set(SCHEDULES)
