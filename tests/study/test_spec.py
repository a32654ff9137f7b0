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
        (
            {'arms': (Arm('a'), Arm('b', 'ema=0.9'))},
            r"overrides of arm 'b' must be a tuple of 'KEY=VALUE', got 'ema=0.9'; write .*,\)",
        ),
        ({'arms': (Arm('a'), Arm('b', (0.9,)))}, r"overrides of arm 'b' must be .* got \(0.9,\)"),
        ({'overrides': 'ema=0.9'}, 'overrides of the study must be a tuple'),
        ({'arms': ('a', 'b')}, "an arm must be an effjax.study.spec.Arm, got 'a'"),
        ({'seeds': 3}, 'seeds of a study must be a tuple of numbers, got 3'),
        ({'grid': 1e-3}, 'grid of a study must be a tuple of numbers'),
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


@pytest.mark.parametrize(
    ('text', 'parts'),
    [
        ("data.path='a b=c d' clip_norm=1", ("data.path='a b=c d'", 'clip_norm=1')),
        ('data.path="my texts x=1"', ('data.path="my texts x=1"',)),
        ("model={'a': 'x y=1', 'b': [1]} ema=0.9", ("model={'a': 'x y=1', 'b': [1]}", 'ema=0.9')),
        ("name=it's ema=0.9", ("name=it's", 'ema=0.9')),
        ("x={'it': 'o x=1'}", ("x={'it': 'o x=1'}",)),
        ('a=1   b=2', ('a=1', 'b=2')),
        ('data.path=a b', ('data.path=a b',)),
    ],
)  # fmt: skip
def test_a_change_does_not_split_within_quotes_or_brackets(text, parts):
    assert spec.split_change(text) == parts


def test_a_change_with_half_a_quote_is_refused():
    with pytest.raises(StudyError, match="has a quote ' without its other half; close it"):
        spec.split_change("data.path='a b=c")
    with pytest.raises(StudyError, match='has a bracket without its other half'):
        spec.split_change("model={'a': 1 b=2")


def test_arms_are_named_after_their_change():
    assert spec.arm_name(['model.ffn.kind=gelu']) == 'ffn.kind-gelu'
    assert spec.arm_name(["model.ffn={'kind': 'gelu'}"]) == 'ffn-_kind_gelu'
    long = [f'model.{"very_" * 20}long={i}' for i in range(2)]
    one, other = (spec.arm_name([o]) for o in long)
    assert one != other and len(one) == len(other) == 60
    spec.check(study(arms=(Arm('a'), Arm(one), Arm(other))))


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


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('x = 1\ny = nothing\n', r"study.py, line 2 cannot be loaded: NameError: name 'nothing'"),
        ('x = 1\n\ndef get_study(:\n', r'line 3 cannot be loaded: SyntaxError: .*; mend that line'),
        ('import no_such_module\n', r'line 1 cannot be loaded: ModuleNotFoundError: No module'),
        (
            'from effjax.study.spec import Study\n\ndef get_study():\n    return Study(nam="x")\n',
            r"line 4 cannot be loaded: TypeError: .* 'nam'",
        ),
        (
            'def inner():\n    return {}["x"]\n\n\ndef get_study():\n    return inner()\n',
            r"line 2 cannot be loaded: KeyError: 'x'",
        ),
        ('def get_study():\n    return None\n', r'get_study\(\) returned a NoneType; return an'),
        (
            'from effjax.study.spec import Arm, Study\n\n\ndef get_study():\n'
            '    return Study("m", "c.py", (Arm("a"), Arm("b", "ema=0.9")), budget=1.0)\n',
            "overrides of arm 'b' must be a tuple",
        ),
    ],
)  # fmt: skip
def test_a_study_file_that_raises_is_told_by_its_line(tmp_path, text, message):
    (tmp_path / 'study.py').write_text(text)
    with pytest.raises(StudyError, match=message) as said:
        spec.load(str(tmp_path))
    assert '\n' not in str(said.value)
