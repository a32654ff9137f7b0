"""Studies as data: what is refused, in one sentence each."""

import dataclasses

import pytest

from effjax.core.errors import StudyError
from effjax.study import spec
from effjax.study.spec import Arm, Study


def study(**changes):
    base = Study(
        name='s',
        config='configs/lm.py',
        arms=(Arm('a'), Arm('b')),
        budget=1e9,
        grid=(1.0, 2.0, 4.0),
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ('changes', 'words_said'),
    [
        ({'axis': 'flops'}, r"no budget axis 'flops'.*Did you mean|no budget axis 'flops'"),
        ({'budget': 0.0}, 'the budget must be positive'),
        ({'arms': (Arm('a'),)}, 'a baseline and at least one change; give --change'),
        ({'arms': (Arm('a'), Arm('a'))}, "two arms are called 'a'"),
        ({'arms': (Arm('a'), Arm('b/c'))}, "'b/c' cannot name"),
        ({'seeds': (0,)}, r'one seed has no interval.*--seeds=3'),
        ({'seeds': (1, 1)}, 'seeds must differ'),
        ({'margin': -1.0}, 'the margin must be a number from 0 on'),
        ({'metric': 'loss'}, "such as 'valid.loss'"),
        (
            {'metric': 'valid.accuracy', 'lower_is_better': True},
            "says lower_is_better=True, but of 'valid.accuracy' more is better; leave",
        ),
        ({'lower_is_better': False}, "of 'valid.loss' less is better"),
        ({'fractions': (0.5,)}, 'fractions must rise to 1'),
        ({'fractions': (0.9, 0.5, 1.0)}, 'fractions must rise to 1'),
        ({'tune_fraction': 0.0}, 'tune_fraction must be in'),
        ({'grid': (1.0, 2.0)}, r'needs at least 3 values.*--tune_key='),
        ({'arms': (Arm('a'), Arm('b', grid=(1.0, 2.0)))}, "arm 'b' would tune over 2 values and"),
        ({'grid': (2.0, 1.0, 4.0)}, 'must ascend'),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused_in_one_sentence(changes, words_said):
    with pytest.raises(StudyError, match=words_said) as found:
        spec.check(study(**changes))
    assert '\n' not in str(found.value)


def test_the_metric_tells_its_direction():
    assert study(metric='valid.loss').minimised
    assert study(metric='valid.bits_per_byte').minimised
    for metric in ('test.accuracy', 'valid.label_accuracy'):
        more = study(metric=metric)
        spec.check(more)
        assert not more.minimised
        assert not dataclasses.replace(study(), metric=metric).minimised
    own = study(metric='valid.score', lower_is_better=False)
    spec.check(own)
    assert not own.minimised


def test_a_study_without_tuning_needs_no_grid():
    spec.check(study(tune_key='', grid=()))


def test_a_study_survives_json():
    one = study(overrides=('model.width=8',), arms=(Arm('a'), Arm('b', ('x.y=1',), grid=(1, 2, 3))))
    assert spec.from_json(spec.to_json(one)) == one


def test_a_change_splits_before_keys_only():
    text = "model.ffn={'kind': 'gelu'} model.width=64"
    assert spec.split_change(text) == ("model.ffn={'kind': 'gelu'}", 'model.width=64')
    with pytest.raises(StudyError, match='has no value; write --change KEY=VALUE'):
        spec.split_change('model.width')


def test_arms_are_named_after_their_change():
    assert spec.arm_name(['model.ffn.kind=gelu']) == 'ffn.kind-gelu'
    assert spec.arm_name(["model.ffn={'kind': 'gelu'}"]) == 'ffn-_kind_gelu'


def test_budgets_of_every_axis_parse():
    amounts = {
        '20m': ('seconds', 1200.0), '3e15flops': ('model_flops', 3e15), '2e5J': ('joules', 2e5),
        '1e6hwflops': ('hardware_flops', 1e6), '10ref_m': ('reference_seconds', 600.0),
        '500steps': ('steps', 500.0), '7tokens': ('tokens', 7.0), '9examples': ('examples', 9.0),
    }  # fmt: skip
    assert {text: spec.parse_budget(text) for text in amounts} == amounts
    assert {axis for axis, _ in amounts.values()} == set(spec.AXES)
    with pytest.raises(StudyError, match='is not a number with a unit'):
        spec.parse_budget('a lot')


def test_a_missing_study_file_is_named(tmp_path):
    with pytest.raises(StudyError, match="no study 'experiments/nothing'"):
        spec.load('experiments/nothing')
    (tmp_path / 'study.py').write_text('x = 1\n')
    with pytest.raises(StudyError, match='has no function get_study'):
        spec.load(str(tmp_path))
