"""Verdicts from cells: wins, losses, refusals, failed runs kept in sight."""

import dataclasses
import math
import random

import pytest

from effjax.study import analysis, words
from effjax.study.records import Cell, Ratio, analysis_from_json, to_json
from effjax.study.spec import Arm, Study

GPU = {'device': 'NVIDIA H200', 'backend': 'gpu', 'finished': '2026-01-02T03:04:05'}


def study(**changes):
    base = Study(
        name='s',
        config='configs/lm.py',
        arms=(Arm('base'), Arm('new')),
        budget=100.0,
        grid=(1.0, 2.0, 4.0),
        seeds=(0, 1, 2),
    )
    return dataclasses.replace(base, **changes)


def cell(arm, seed, fraction, value, status='done', phase='final', settings=None, env=GPU, **costs):
    spent = {'model_flops': 100 * fraction, 'seconds': 10.0 * fraction, 'data_seconds': 0.0}
    return Cell(
        arm, phase, seed, fraction, settings or {}, status, 'it broke' if status != 'done' else '',
        value if status == 'done' else None, {**spent, 'tokens': 7 * fraction, **costs}, [], env,
    )  # fmt: skip


def loss(budget, gain=0.0):
    return 2.0 + 0.3 * (budget * (1 + gain)) ** -0.3


def cells(one, gain=0.0, noise=0.001, **kw):
    draw = random.Random(1)
    shifts = [draw.gauss(0, noise) for _ in one.seeds]

    def rest():  # what a seed's arms and budgets do not share
        return draw.gauss(0, noise / 9)

    return [
        cell(arm.name, s, f, loss(f, gain if arm.name == 'new' else 0.0) + shift + rest(), **kw)
        for arm in one.arms
        for s, shift in zip(one.seeds, shifts, strict=True)
        for f in one.fractions
    ]  # fmt: skip


def judge(one, runs, **kw):
    return analysis.analyse(one, runs, code='c', **kw).comparisons[0]


def test_a_saving_is_found_and_said_both_ways():
    found = judge(study(), cells(study(), gain=0.12))
    ratio = found.at_equal_quality['model_flops']
    assert found.verdict == 'win'
    assert ratio.ratio == pytest.approx(1 / 1.12, abs=0.02)  # noise of 0.001 / 9 a run
    assert ratio.low < 1 / 1.12 < ratio.high
    assert found.sentence.startswith('new saves 1')
    assert 'of the model FLOPs at equal loss' in found.sentence
    assert 'x)' in found.sentence  # savings and speed-up together


def test_a_handicap_is_a_loss():
    found = judge(study(), cells(study(), gain=-0.10))
    assert found.verdict == 'loss'
    assert found.sentence.startswith('new needs 1')
    assert 'more model FLOPs' in found.sentence


def test_the_same_arm_twice_differs_by_exactly_nothing():
    runs = cells(study(), noise=0.01)
    same = [
        dataclasses.replace(c, arm='new') for c in runs if c.arm == 'base'
    ] + [c for c in runs if c.arm == 'base']  # fmt: skip
    found = judge(study(margin=0.0), same)
    assert (found.difference.mean, found.difference.low, found.difference.high) == (0, 0, 0)
    assert found.verdict == 'equivalent'
    assert 'exactly the same loss as base on every seed' in found.sentence


def test_noise_is_called_inconclusive_with_what_would_be_found():
    draw = random.Random(0)
    runs = [cell(a, s, 1.0, 2 + draw.gauss(0, 0.1)) for a in ('base', 'new') for s in (0, 1, 2)]
    found = judge(study(fractions=(1.0,)), runs)
    assert found.verdict == 'inconclusive'
    assert found.sentence.startswith('cannot tell new from base')
    assert found.detectable > 0.05


def test_a_difference_within_the_margin_is_equivalent():
    found = judge(study(margin=0.5), cells(study(), gain=0.02))
    assert found.verdict == 'equivalent'
    assert 'within the margin of 0.5' in found.sentence


def test_failed_and_missing_runs_are_told_never_dropped():
    runs = cells(study(), gain=0.12)
    bad = [
        dataclasses.replace(c, status='failed', value=None, error='out of memory')
        if c.arm == 'new' and c.fraction == 1.0 and c.seed < 2
        else c
        for c in runs
    ]
    found = judge(study(), bad)
    assert found.verdict == 'failed'
    assert found.sentence == (
        'no verdict on new: 2 runs did not end well; new, seed 0: out of memory'
    )
    assert '2 of 24 runs failed (new).' in found.notes
    assert found.pairs[0][2] is None
    assert sum(c.status == 'failed' for c in analysis.analyse(study(), bad, code='').cells) == 2


def test_diverged_seeds_leave_no_verdict_to_the_rest():
    one = study(seeds=(0, 1, 2, 3, 4))
    runs = [
        dataclasses.replace(c, status='diverged', value=None, error='not finite')
        if c.arm == 'new' and c.seed > 2
        else c
        for c in cells(one, gain=0.3)
    ]
    found = judge(one, runs)
    assert found.verdict == 'failed'
    assert 'new, seed 3: not finite' in found.sentence
    missing = [c for c in runs if c.status == 'done']
    assert judge(one, missing).verdict == 'win'
    assert '3 of 5 seeds so far.' in judge(one, missing).notes


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        ({'env': {**GPU, 'batched': 3}}, 'several runs shared one compiled step'),
        ({'data_seconds': 0.8}, 'waited for its data for 8% of its training time'),
    ],
)
def test_time_is_refused_where_it_misleads(change, reason):
    one = study(axis='seconds', fractions=(1.0,))
    found = judge(one, cells(one, gain=0.5, **change))
    assert found.verdict == 'refused'
    assert reason in found.sentence
    assert found.at_equal_quality['seconds'] is None


def test_time_is_refused_between_devices():
    one = study(axis='seconds', fractions=(1.0,))
    runs = [
        dataclasses.replace(c, environment={**GPU, 'device': c.arm}) for c in cells(one, gain=0.5)
    ]
    assert 'different devices (base, new)' in judge(one, runs).sentence


@pytest.mark.parametrize('fraction', [0.5, 1.0])
@pytest.mark.parametrize(
    ('odd', 'reason'),
    [
        ({'device': 'NVIDIA L4'}, 'made on different devices (NVIDIA H200, NVIDIA L4)'),
        ({'devices': 4}, 'made on different numbers of devices (1, 4)'),
        ({'jax': '0.8'}, 'made with different versions of jax (0.7, 0.8)'),
        ({'xla_flags': '--a'}, 'made with different XLA flags (none, --a)'),
        ({'batched': 3}, 'several runs shared one compiled step'),
    ],
)
def test_one_run_made_otherwise_refuses_time_at_any_budget(odd, reason, fraction):
    one = study(axis='seconds', fractions=(0.5, 1.0))
    same = {**GPU, 'devices': 1, 'jax': '0.7', 'xla_flags': ''}
    runs = [
        dataclasses.replace(
            c, environment=same | (odd if (c.fraction, c.seed) == (fraction, 1) else {})
        )
        for c in cells(one, gain=0.5)
    ]
    found = judge(one, runs)
    assert found.verdict == 'refused' and reason in found.sentence
    assert any(reason in note for note in found.notes)


def test_time_of_runs_side_by_side_counts_on_devices_of_their_own():
    one = study(axis='seconds', fractions=(1.0,))
    cpu = {**GPU, 'backend': 'cpu', 'workers': 2}
    found = judge(one, cells(one, gain=0.5, env=cpu))
    assert found.verdict == 'refused'
    assert "runs side by side shared a CPU's cores" in found.sentence
    assert judge(one, cells(one, gain=0.5, env={**GPU, 'workers': 2})).verdict == 'win'


def test_flops_stay_judged_where_time_is_refused():
    found = judge(study(), cells(study(), gain=0.12, env={**GPU, 'batched': 3}))
    assert found.verdict == 'win'
    assert found.at_equal_quality['seconds'] is None
    assert found.at_equal_quality['tokens'] is not None
    assert any('No ratio of time or energy' in n for n in found.notes)


def test_a_cheaper_step_shows_on_the_other_axes():
    runs = [
        dataclasses.replace(c, costs={**c.costs, 'seconds': c.costs['seconds'] * 1.5})
        if c.arm == 'new'
        else c
        for c in cells(study(), gain=0.12)
    ]
    found = judge(study(), runs).at_equal_quality
    assert found['seconds'].ratio == pytest.approx(1.5 * found['model_flops'].ratio)


def scaled(runs, arm, **factors):
    """Returns the runs with costs of an arm multiplied, by a number or by one a seed."""
    out = []
    for c in runs:
        costs = dict(c.costs)
        for axis, by in factors.items() if c.arm == arm else ():
            costs[axis] *= by[c.seed] if isinstance(by, tuple) else by
        out.append(dataclasses.replace(c, costs=costs))
    return out


def test_what_was_spent_counts_and_not_what_was_given():
    runs = cells(study(), gain=0.12)
    exact = judge(study(), runs).at_equal_quality['model_flops']
    rounded = judge(study(), scaled(runs, 'new', model_flops=1.03))  # ends half a step later
    found = rounded.at_equal_quality['model_flops']
    assert found.ratio == pytest.approx(1.03 * exact.ratio)
    assert any('new spent 103.0% of the model FLOPs that base did' in n for n in rounded.notes)
    assert not any('whole step' in n for n in judge(study(), runs).notes)


def test_a_curve_stands_at_what_its_runs_spent():
    def short(fraction):  # runs of few steps end well below what they may spend
        return {0.6: 0.5, 0.75: 0.7}.get(fraction, fraction)

    one = study(seeds=(0, 1, 2, 3, 4))
    runs = [
        dataclasses.replace(
            c,
            value=c.value - loss(c.fraction, gain) + loss(short(c.fraction), gain),
            costs={**c.costs, 'model_flops': 100 * short(c.fraction)},
        )
        for c in cells(one, gain=0.12)
        for gain in [0.12 if c.arm == 'new' else 0.0]
    ]
    ratio = judge(one, runs).at_equal_quality['model_flops']
    assert ratio.low < 1 / 1.12 < ratio.high
    assert ratio.ratio == pytest.approx(1 / 1.12, abs=0.01)


def test_the_spread_of_a_cost_over_seeds_widens_its_interval():
    runs = cells(study(), gain=0.12)
    even = judge(study(), runs).at_equal_quality
    found = judge(study(), scaled(runs, 'new', seconds=(1.4, 1.5, 1.6))).at_equal_quality
    assert found['model_flops'] == even['model_flops']
    assert found['seconds'].ratio == pytest.approx(1.5 * even['seconds'].ratio)
    width = [r.high / r.low for r in (even['seconds'], found['seconds'])]
    # t(2) = 4.30 times 0.0668 / sqrt(3), the error of the mean of three logarithms, on both sides.
    half = 4.303 * 0.0668 / 3**0.5
    assert width[1] > width[0]
    assert found['seconds'].high == pytest.approx(found['seconds'].ratio * math.exp(half), rel=0.02)


def test_a_charged_source_keeps_the_spread_of_what_it_is_compared_with():
    runs = scaled(cells(study(), gain=0.12), 'base', seconds=(0.9, 1.0, 1.1))
    runs = scaled(runs, 'new', seconds=(0.9, 1.0, 1.1))  # one factor, so that the ratio is sharp
    found = judge(study(), runs, sources={'new': {'seconds': 10.0}})
    free, charged = found.at_equal_quality['seconds'], found.source_charged['seconds']
    assert charged.ratio == pytest.approx(free.ratio + 1.0)
    assert charged.high - charged.ratio > 10 * (free.high - free.ratio)


def test_a_reused_source_is_charged_in_its_own_column():
    found = judge(study(), cells(study(), gain=0.12), sources={'new': {'model_flops': 25.0}})
    free, charged = found.at_equal_quality['model_flops'], found.source_charged['model_flops']
    assert charged.ratio == pytest.approx(free.ratio + 0.25)
    assert found.source_charged['tokens'] is None  # the source's tokens are not known
    assert judge(study(), cells(study())).source_charged == {}


def test_the_first_line_says_both_numbers_where_a_source_is_reused():
    one = study(tune_key='')
    found = judge(one, cells(one, gain=0.12), sources={'new': {'model_flops': 25.0}})
    free, _, charged = found.sentence.partition(' source free; ')
    assert free.startswith('new saves 1') and free.endswith('x)')
    assert charged.startswith('with source models charged it needs 1')
    assert 'more model FLOPs' in charged and charged.endswith('at equal loss (0.87x)')
    cheap = judge(one, cells(one, gain=0.12), sources={'new': {'model_flops': 5.0}})
    assert 'source free; with source models charged it saves ' in cheap.sentence
    one = study(tune_key='', fractions=(1.0,))  # no ratio there
    found = judge(one, cells(one, gain=0.12), sources={'new': {'model_flops': 25.0}})
    assert found.sentence.endswith(
        'source free; source models cost it a further 25.0% of the model FLOPs'
    )
    found = judge(one, cells(one, gain=0.12), sources={'new': {'tokens': 25.0}})
    assert found.sentence.endswith(
        'source free; what the source models cost in model FLOPs is not known'
    )


def test_a_source_of_the_baseline_is_charged_to_it():
    source = {'model_flops': 25.0}
    runs = cells(study(), gain=0.12)
    found = judge(study(), runs, sources={'base': source})
    free, charged = found.at_equal_quality['model_flops'], found.source_charged['model_flops']
    assert charged.ratio == pytest.approx(free.ratio / 1.25)
    assert 'with source models charged it saves 2' in found.sentence
    found = judge(study(), runs, sources={'base': source, 'new': source})
    assert found.source_charged['model_flops'].ratio == pytest.approx((free.ratio + 0.25) / 1.25)


def test_a_cpu_says_so_once_and_several_arms_too():
    one = study(arms=(Arm('base'), Arm('new'), Arm('third')))
    notes = analysis.analyse(one, cells(one, env={**GPU, 'backend': 'cpu'}), code='').notes
    assert sum('does not carry over to an accelerator' in n for n in notes) == 1
    assert any('2 arms against one baseline' in n for n in notes)


def tuned(values, **changes):
    one = study(**changes)
    runs = [
        cell('base', 9, 0.25, v, 'diverged' if v is None else 'done', 'tune', {'schedule.peak': g})
        for g, v in zip(one.grid, values, strict=True)
    ]
    return analysis.tune(one, one.baseline, runs)


def test_tuning_takes_the_best_and_marks_an_edge():
    assert tuned([2.0, 1.0, 3.0]).chosen == 2.0
    assert not tuned([2.0, 1.0, 3.0]).edge
    assert tuned([2.0, 1.0, 0.5]).edge
    assert tuned([2.0, 1.0, 0.5], lower_is_better=False).chosen == 1.0
    assert tuned([2.0, 1.0, None]).values == [2.0, 1.0, None]
    assert tuned([None, None, None]) is None


def test_ties_go_to_the_smaller_value():
    assert tuned([3.0, 1.0, 1.0], grid=(1.0, 2.0, 4.0)).chosen == 2.0
    assert tuned([0.0, 1.0, 1.0], lower_is_better=False).chosen == 2.0


def test_a_failed_neighbour_shows_nothing_and_a_diverged_one_does():
    one = study(grid=(1.0, 2.0, 4.0, 8.0))

    def tuning(values, *states, key='schedule.peak'):
        runs = [
            cell('base', 9, 0.25, v, state, 'tune', {key: g})
            for g, v, state in zip(one.grid, values, states, strict=True)
        ]
        return analysis.tune(one, one.baseline, runs)

    well = ('done',) * 4
    assert not tuning((3.0, 1.0, 2.0, 3.0), *well).untuned
    assert not tuning((3.0, 1.0, 2.0, 3.0), 'done', 'done', 'diverged', 'diverged').untuned
    failed = tuning((3.0, 1.0, 2.0, 3.0), 'done', 'done', 'failed', 'done')
    assert (failed.chosen, failed.edge, failed.untuned) == (2.0, False, True)
    assert failed.reason == 'its best schedule.peak, 2, lies beside 4, which failed: it broke'
    missing = tuning((3.0, 1.0, 2.0, 3.0), 'missing', 'done', 'done', 'done')
    assert missing.reason.endswith('lies beside 1, which has not been run')
    assert not tuning((3.0, 1.0, 2.0, 3.0), 'done', 'done', 'done', 'failed').untuned
    runs = [
        cell(a, 9, 0.25, v, state, 'tune', {'schedule.peak': g})
        for a in ('base', 'new')
        for g, v, state in zip((1.0, 2.0, 4.0), (3.0, 1.0, 2.0), ('failed', *well[:2]), strict=True)
    ]
    told = judge(study(), [*cells(study()), *runs])
    assert told.sentence.endswith('(untuned: base and new)')
    assert 'new is untuned: its best schedule.peak, 2, lies beside 1, which failed: it broke.' in (
        told.notes
    )


def test_an_untuned_arm_is_noted():
    runs = cells(study()) + [
        cell(a, 9, 0.25, v, 'done', 'tune', {'schedule.peak': g})
        for a in ('base', 'new')
        for g, v in zip((1.0, 2.0, 4.0), (3.0, 2.0, 1.0), strict=True)
    ]
    found = judge(study(), runs)
    assert found.sentence.endswith('(untuned: base and new)')
    assert any(n.startswith('new is untuned: its best schedule.peak, 4') for n in found.notes)


def test_runs_of_too_few_steps_are_noted():
    runs = [
        dataclasses.replace(c, costs={**c.costs, 'steps': (60 if c.arm == 'base' else 40) + c.seed})
        for c in cells(study())
    ]
    notes = judge(study(), runs).notes
    assert sum('steps in its shortest run' in n for n in notes) == 1
    assert any(n.startswith('new made only 40 steps in its shortest run') for n in notes)
    assert not any('shortest run' in n for n in judge(study(least_steps=40), runs).notes)


def test_findings_survive_json():
    found = analysis.analyse(study(), cells(study(), gain=0.12), code='c', commands=['x'])
    assert analysis_from_json(to_json(found)) == found


def test_savings_and_speedup_are_two_readings_of_one_ratio():
    assert words.savings(Ratio(0.75, 0.70, 0.80, 3)) == '25.0% ± 5.0'
    assert words.speed(Ratio(0.75, 0.70, 0.80, 3)) == '1.33x'
    assert words.savings(Ratio(0.6, 0.6, 0.6, 3, 'at most')) == 'at least 40%'
    assert words.speed(Ratio(0.6, 0.6, 0.6, 3, 'at most')) == 'at least 1.67x'
    assert 'interval 10.0% to 28.0%' in words.savings(Ratio(0.75, 0.72, 0.90, 3))


def test_an_interval_that_the_budgets_cut_off_says_so():
    wide = Ratio(0.6, 0.6, 0.877, 3, 'at most', low_open=True)
    assert words.savings(wide) == 'about 40% or more (95 % interval 12.3% to 40.0% or more)'
    assert words.speed(wide) == 'about 1.67x'
    cut = Ratio(0.8, 0.6, 1.0, 3, low_open=True)  # even, but for where the budgets end
    assert words.savings(cut) == '20.0% (95 % interval 0.0% to 40.0% or more)'
    both = Ratio(0.8, 0.6, 1 / 0.6, 3, low_open=True, high_open=True)
    assert words.savings(both) == '20.0% (95 % interval -66.7% or less to 40.0% or more)'


def test_a_loss_that_the_budgets_cut_off_says_so():
    def needs(*ratio, **ends):
        return words._amount(Ratio(*ratio, **ends), 'tokens')

    assert needs(1.25, 1.1, 5 / 3, 3, high_open=True) == (
        'needs 25.0% more tokens (95 % interval 10.0% to 66.7% or more)'
    )
    assert needs(5 / 3, 5 / 3, 5 / 3, 3, 'at least') == 'needs at least 67% more tokens'
    assert needs(5 / 3, 1.2, 5 / 3, 3, 'at least', high_open=True) == (
        'needs about 67% or more (95 % interval 20.0% to 66.7% or more) more tokens'
    )
