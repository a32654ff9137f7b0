"""Stages: extents, changes, progress, and the sentences of their errors."""

import pytest

from effjax.core.errors import ConfigError
from effjax.training import stages


def test_a_plain_config_is_one_stage(tiny):
    (only,) = stages.plan(tiny())
    assert (only.unit, only.start, only.end, only.total) == ('steps', 0.0, 6.0, 6.0)
    assert only.progress(3.0) == 0.5 and only.progress(9.0) == 1.0


def test_shares_and_steps_cover_the_run(tiny):
    config = tiny(
        steps=10,
        stages=(
            {'share': 0.25, 'batch_size': 4},
            {'share': 0.75, 'seq_len': 16, 'schedule': {'kind': 'cosine', 'peak': 1e-3}},
        ),
    )
    first, second = stages.plan(config)
    assert (first.start, first.end, second.start, second.end) == (0.0, 2.0, 2.0, 10.0)
    assert first.config['batch_size'] == 4 and second.config['batch_size'] == 8
    assert second.config['seq_len'] == 16
    # Without a schedule of its own a stage goes on with the run's; with one it starts anew.
    assert first.progress(1.0) == 0.1 and second.progress(6.0) == 0.5
    # Another kind of schedule takes none of the old one's arguments.
    assert second.config['schedule'] == {'kind': 'cosine', 'peak': 1e-3}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'stages': ({'share': 0.5},)}, 'last 3 steps together, but the run lasts 6'),
        ({'stages': ({'share': 0.5, 'steps': 3},)}, 'needs exactly one of share, budget and steps'),
        ({'stages': ({'steps': 0},)}, 'must last longer than nothing'),
        (
            {'steps': 0, 'budget': '1m', 'stages': ({'steps': 3},)},
            'the run is counted in seconds; give share instead',
        ),
        (
            {'stages': ({'steps': 6, 'optimizer': {'kind': 'lion'}},)},
            "a stage may change settings of 'adamw', not the optimizer itself",
        ),
    ],
)
def test_stages_that_cannot_be(tiny, changes, message):
    with pytest.raises(ConfigError) as error:
        stages.plan(tiny(**changes))
    assert message in str(error.value)


def test_shares_are_rounded_together(tiny):
    third = 1 / 3
    plan = stages.plan(tiny(steps=100, stages=({'share': third},) * 3))
    assert [stage.end for stage in plan] == [33, 67, 100]
    with pytest.raises(ConfigError, match='would not last a single step'):
        stages.plan(tiny(steps=100, stages=({'share': 0.001}, {'share': 0.999})))
