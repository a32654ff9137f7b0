"""Statistics of studies: against scipy, hand-worked and published numbers, and by simulation."""

import math
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from effjax.core.errors import StudyError
from effjax.study import stats
from effjax.study.records import Interval

SEVERAL_SEEDS = (2, 3, 5, 10, 30)
# The ten published baseline runs of evidence B3: sigma of the final loss, and how much of it one
# per cent of 3250 steps is worth at 0.0045 loss per 100 steps.
SIGMA = 0.0013
SLOPE = -0.0045 * 32.5  # per unit of log(budget)


def interval(low, high):
    return Interval(mean=(low + high) / 2, low=low, high=high, sd=1.0, n=3)


class TestPairedInterval:
    def test_hand_worked(self):
        # Mean 2, sd 1, t(0.975, 2) = 4.302653: half the width is 4.302653 / sqrt(3).
        found = stats.paired_interval([1.0, 2.0, 3.0])
        assert (found.mean, found.sd, found.n) == (2.0, 1.0, 3)
        assert found.high - 2 == pytest.approx(2.484138, abs=1e-6)
        assert 2 - found.low == pytest.approx(2.484138, abs=1e-6)

    @pytest.mark.parametrize('n', SEVERAL_SEEDS)
    @pytest.mark.parametrize('level', [0.8, 0.95, 0.99])
    def test_equals_scipys_paired_t_test(self, n, level):
        rng = np.random.default_rng(n)
        arm, baseline = rng.normal(3.3, 0.1, (2, n))
        test = scipy.stats.ttest_rel(arm, baseline)
        low, high = test.confidence_interval(level)
        found = stats.paired_interval(arm - baseline, level)
        assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
        excludes_zero = not found.low <= 0 <= found.high
        assert excludes_zero == (test.pvalue < 1 - level)

    def test_equal_differences_have_no_width(self):
        found = stats.paired_interval([0.1] * 7)
        assert (found.mean, found.low, found.high, found.sd) == (0.1, 0.1, 0.1, 0.0)

    @pytest.mark.parametrize('differences', [[], [0.2]])
    def test_one_seed_has_no_interval(self, differences):
        with pytest.raises(StudyError, match=r'at least two; run the study with --seeds=3 or more'):
            stats.paired_interval(differences)

    @pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
    def test_diverged_runs_are_refused(self, bad):
        with pytest.raises(StudyError, match=f'paired difference is {bad}: an interval needs'):
            stats.paired_interval([0.1, bad, 0.2])

    def test_level_out_of_range(self):
        with pytest.raises(StudyError, match=r'level = 95 is no probability'):
            stats.paired_interval([0.1, 0.2], level=95)


class TestVerdict:
    @pytest.mark.parametrize(
        ('low', 'high', 'margin', 'expected'),
        [
            (-0.3, -0.1, 0.0, 'win'),
            (0.1, 0.3, 0.0, 'loss'),
            (-0.1, 0.3, 0.0, 'inconclusive'),
            (-0.3, -0.1, 0.2, 'win'),
            (-0.3, -0.1, 0.5, 'equivalent'),  # excludes 0, and is of no interest
            (-0.1, 0.3, 0.5, 'equivalent'),
            (-0.5, 0.3, 0.5, 'inconclusive'),  # strictly inside, or not
            (0.0, 0.3, 0.0, 'inconclusive'),  # touching 0 does not exclude it
            (-0.3, 0.0, 0.1, 'inconclusive'),
        ],
    )
    def test_table(self, low, high, margin, expected):
        assert stats.verdict(interval(low, high), margin) == expected
        # The same finding about a metric that grows with quality: everything changes sign.
        assert stats.verdict(interval(-high, -low), margin, lower_is_better=False) == expected

    @pytest.mark.parametrize('margin', [0.0, 0.1])
    def test_identical_runs_are_equivalent(self, margin):
        assert stats.verdict(stats.paired_interval([0.0] * 3), margin) == 'equivalent'

    @pytest.mark.parametrize('margin', [-0.1, math.nan, math.inf])
    def test_impossible_margin(self, margin):
        with pytest.raises(StudyError, match=f'margin = {margin} cannot judge equivalence'):
            stats.verdict(interval(-1, 1), margin)

    @pytest.mark.parametrize('n', [3, 5])
    def test_equal_arms_are_called_different_in_five_per_cent(self, n):
        rng = np.random.default_rng(7)
        repetitions = 2000
        verdicts = [
            stats.verdict(stats.paired_interval(d), 0.0) for d in rng.normal(size=(repetitions, n))
        ]
        low, high = stats.binomial_bounds(repetitions, 0.05)
        assert low <= repetitions - verdicts.count('inconclusive') <= high
        low, high = stats.binomial_bounds(repetitions, 0.025)
        assert low <= verdicts.count('win') <= high


class TestPower:
    @pytest.mark.parametrize('n', SEVERAL_SEEDS)
    @pytest.mark.parametrize('power', [0.5, 0.8, 0.95])
    def test_equals_the_noncentral_t(self, n, power):
        shift = stats.minimum_detectable(2.0, n, power) / 2.0 * math.sqrt(n)
        edge = scipy.stats.t.ppf(0.975, n - 1)
        # scipy's far tail is NaN for small n and large shifts, where it is nothing.
        other = np.nan_to_num(scipy.stats.nct.cdf(-edge, n - 1, shift))
        assert scipy.stats.nct.sf(edge, n - 1, shift) + other == pytest.approx(power, abs=1e-5)

    def test_published_sample_size(self):
        # Cohen 1988: a one-sample t test of d = 0.5 needs 34 for 80 % power, two-sided 5 %.
        assert stats.seeds_needed(1.0, 0.5) == 34

    def test_published_seeds_of_a_language_model(self):
        # 1 % fewer steps needs about 12 seeds by the normal formula for two unpaired arms, which
        # knows sigma; estimating it from n pairs costs z**2 / 2, about two more.
        sd, effect = SIGMA * math.sqrt(2), 0.01 * -SLOPE
        normal = 2 * ((1.959964 + 0.841621) * SIGMA / effect) ** 2
        assert normal == pytest.approx(12, abs=0.5)
        assert stats.seeds_needed(sd, effect) == math.ceil(normal + 1.959964**2 / 2) == 15
        assert stats.seeds_needed(sd, 2 * effect) == 6  # by formula 4: sigma known
        assert stats.seeds_needed(sd, 5 * effect) == 3  # by formula 1

    def test_simulated_studies_find_it(self):
        rng = np.random.default_rng(3)
        effect, repetitions = stats.minimum_detectable(0.7, 4), 2000
        draws = rng.normal(-effect, 0.7, (repetitions, 4))
        found = sum(stats.verdict(stats.paired_interval(d), 0.0) == 'win' for d in draws)
        low, high = stats.binomial_bounds(repetitions, 0.8)
        assert low <= found <= high

    def test_least_n_is_least(self):
        for effect in (0.3, 1.0, 3.0, 100.0):
            n = stats.seeds_needed(1.0, effect)
            assert stats.minimum_detectable(1.0, n) <= effect
            assert n == 2 or stats.minimum_detectable(1.0, n - 1) > effect

    def test_edges(self):
        assert stats.minimum_detectable(0.0, 3) == 0
        assert stats.seeds_needed(0.0, 0.1) == 2
        assert stats.seeds_needed(1.0, -0.5) == 34
        assert stats.seeds_needed(1.0, 0.5, most=33) is None
        assert stats.seeds_needed(1.0, 0.5, most=34) == 34

    @pytest.mark.parametrize(
        ('call', 'message'),
        [
            (lambda: stats.minimum_detectable(1.0, 1), r'n = 1 pairs can detect no difference'),
            (lambda: stats.minimum_detectable(-1.0, 3), r'sd = -1.0 is no standard deviation'),
            (lambda: stats.minimum_detectable(math.nan, 3), r'sd = nan is no standard deviation'),
            (lambda: stats.minimum_detectable(1.0, 3, power=0.05), r'give one above 0.05'),
            (lambda: stats.minimum_detectable(1.0, 3, power=1.0), r'power = 1.0 is|power = 1.0 ca'),
            (lambda: stats.seeds_needed(1.0, 0.0), r'effect = 0.0 cannot be planned for'),
        ],
    )
    def test_messages(self, call, message):
        with pytest.raises(StudyError, match=message):
            call()


class TestDetectableSpeedup:
    def test_is_the_formula(self):
        expected = math.exp(stats.minimum_detectable(SIGMA * math.sqrt(2), 3) / -SLOPE)
        assert stats.detectable_speedup(SIGMA, SLOPE, 3) == pytest.approx(expected)
        found = stats.detectable_speedup(SIGMA, -SLOPE, 3, lower_is_better=False)
        assert found == pytest.approx(expected)
        # The published workload: 15 seeds for 1 % (`test_published_seeds_of_a_language_model`).
        assert stats.detectable_speedup(SIGMA, SLOPE, 15) < math.exp(0.01)
        assert stats.detectable_speedup(SIGMA, SLOPE, 14) > math.exp(0.01)

    def test_correlation_helps_and_its_opposite_hurts(self):
        found = [stats.detectable_speedup(SIGMA, SLOPE, 3, r) for r in (-1, 0, 0.5, 0.9, 1)]
        assert found == sorted(found, reverse=True)
        assert found[-1] == 1
        # sqrt(2 (1 - 1/2)) = 1: the difference is as noisy as one run.
        assert math.log(found[2]) == pytest.approx(-stats.minimum_detectable(SIGMA, 3) / SLOPE)

    def test_no_budget_would_show_it(self):
        assert stats.detectable_speedup(1.0, -1e-6, 3) == math.inf

    def test_messages(self):
        with pytest.raises(StudyError, match=r'choose a budget at which the metric still improves'):
            stats.detectable_speedup(1.0, 0.0, 3)
        with pytest.raises(StudyError, match=r'slope_per_log_budget = 0.1 cannot turn'):
            stats.detectable_speedup(1.0, 0.1, 3)  # a loss that rises with the budget
        with pytest.raises(StudyError, match=r'correlation = 1.5 is none'):
            stats.detectable_speedup(1.0, -1.0, 3, 1.5)


def test_correlation():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 8))
    assert stats.correlation(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert stats.correlation(a, 2 * a + 1) == pytest.approx(1)
    assert stats.correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert stats.correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None
    with pytest.raises(StudyError, match=r'3 values of the baseline cannot be paired with 2'):
        stats.correlation([1.0, 2.0, 3.0], [1.0, 2.0])


@pytest.mark.parametrize('n', [1, 10, 100, 2000])
@pytest.mark.parametrize('p', [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize('level', [0.9, 0.99])
def test_binomial_bounds(n, p, level):
    low, high = stats.binomial_bounds(n, p, level)
    tail = (1 - level) / 2
    law = scipy.stats.binom(n, p)
    assert law.cdf(low - 1) <= tail + 1e-9 and law.sf(high) <= tail + 1e-9
    assert law.cdf(low) >= tail - 1e-9 and law.sf(high - 1) >= tail - 1e-9
    assert law.cdf(high) - law.cdf(low - 1) >= level - 1e-9
    assert 0 <= low <= high <= n


def test_binomial_bounds_of_the_hundred_repetitions():
    assert stats.binomial_bounds(100, 0.05) == (0, 11)
    with pytest.raises(StudyError, match=r'n = 0 trials of probability p = 0.5 have no bounds'):
        stats.binomial_bounds(0, 0.5)


FRACTIONS = (0.6, 0.75, 0.9, 1.0)


def losses(saved, noise, *, exponent=0.3, slope=SLOPE, floor=2.0):
    """{fraction: {seed: loss}}; noise is [seeds, fractions]; the method saves this share."""
    table = {}
    for k, f in enumerate(FRACTIONS):
        value = floor - slope / exponent * (f / (1 - saved)) ** -exponent
        table[f] = {seed: value + e[k] for seed, e in enumerate(noise)}
    return table


def study(rng, saved, n, sigma=SIGMA, correlated=0.0, **kwargs):
    """(method, baseline) with noise that one seed's runs share to that part of its variance."""
    shared = rng.normal(0, sigma * math.sqrt(correlated), (1, n, 1))
    noise = shared + rng.normal(0, sigma * math.sqrt(1 - correlated), (2, n, len(FRACTIONS)))
    return losses(saved, noise[0], **kwargs), losses(0.0, noise[1], **kwargs)


def mirrored(table):
    return {f: {seed: 1 - v for seed, v in values.items()} for f, values in table.items()}


class TestFitCurve:
    @pytest.mark.parametrize('exponent', [0.1, 0.5, 1.5])
    def test_finds_a_power_law(self, exponent):
        table = losses(0.0, np.zeros((2, 4)), exponent=exponent)
        curve = stats.fit_curve(FRACTIONS, {s: [table[f][s] for f in FRACTIONS] for s in (0, 1)})
        assert curve.exponent == exponent
        assert curve.slope == pytest.approx(SLOPE, rel=1e-9)
        assert curve.slopes == pytest.approx({0: SLOPE, 1: SLOPE}, rel=1e-9)
        assert (curve.slope_error, curve.freedom) == (pytest.approx(0, abs=1e-9), 4)

    def test_slope_and_error_are_scipys_for_one_seed(self):
        y = [3.1, 3.05, 3.02, 3.0]
        curve = stats.fit_curve(FRACTIONS, {4: y})
        a = curve.exponent
        z = np.log(FRACTIONS) if a == 0 else (1 - np.power(FRACTIONS, -a)) / a
        line = scipy.stats.linregress(z, y)
        assert curve.slope == pytest.approx(line.slope)
        # One degree of freedom more goes to the exponent.
        assert curve.slope_error == pytest.approx(line.stderr * math.sqrt(2 / 1))

    def test_two_fractions_draw_a_line_through_both(self):
        curve = stats.fit_curve([1.0, 0.5], {0: [1.0, 2.0], 1: [1.5, 2.5]})
        assert curve.slope == pytest.approx(-0.3 / (0.5**-0.3 - 1))
        assert (curve.freedom, curve.slope_error) == (1, pytest.approx(0, abs=1e-12))
        assert stats.fit_curve([1.0, 0.5], {0: [1.0, 2.0]}).slope_error == math.inf

    def test_missing_values_are_left_out(self):
        whole = stats.fit_curve([0.5, 1.0], {0: [2.0, 1.0]})
        holes = stats.fit_curve([0.5, 1.0], {0: [2.0, 1.0], 1: [None, 1.0], 2: [2.0, None]})
        assert holes == whole

    @pytest.mark.parametrize(
        ('fractions', 'values', 'message'),
        [
            ([0.5, 0.75], {0: [2.0, 1.0]}, r'make no curve: give at least two, each once, and 1.0'),
            ([1.0], {0: [2.0]}, r'\[1.0\] make no curve'),
            ([1.0, 1.0], {0: [2.0, 1.0]}, r'each once'),
            ([0.0, 1.0], {0: [2.0, 1.0]}, r'leave the range: give shares'),
            ([0.5, 1.0], {3: [2.0]}, r'Seed 3 has 1 values for 2 budget fractions'),
            ([0.5, 1.0], {3: [math.nan, 1.0]}, r'Seed 3 has a metric of nan: leave diverged'),
            ([0.5, 1.0], {3: [None, 1.0]}, r'No seed ended well at the full budget and at'),
        ],
    )
    def test_messages(self, fractions, values, message):
        with pytest.raises(StudyError, match=message):
            stats.fit_curve(fractions, values)


class TestBudgetRatio:
    @pytest.mark.parametrize('exponent', [0.1, 0.5, 1.0])
    @pytest.mark.parametrize('saved', [0.12, 0.3, -0.2])
    def test_exact_without_noise(self, saved, exponent):
        rng = np.random.default_rng(0)
        found = stats.budget_ratio(*study(rng, saved, 3, 1e-9, exponent=exponent))
        assert found.ratio == pytest.approx(1 - saved, rel=1e-5)
        assert (found.low, found.high) == pytest.approx((1 - saved, 1 - saved), rel=1e-4)
        assert (found.n, found.bound) == (3, '')

    # Coverage of 95 % within 90 to 99 %: 400 studies each have a standard error of 1.1 %.
    @pytest.mark.ci
    @pytest.mark.parametrize(
        ('saved', 'exponent', 'n', 'correlated'),
        [
            (0.12, 0.3, 3, 0.0),
            (0.12, 0.05, 5, 0.0),
            (0.12, 0.8, 10, 0.3),
            (0.12, 0.3, 5, 0.8),
            (0.0, 0.3, 5, 0.0),
            (0.0, 0.8, 10, 0.3),
            (-0.12, 0.8, 3, 0.8),
            (-0.12, 0.05, 10, 0.0),
        ],
    )
    def test_covers_the_truth(self, saved, exponent, n, correlated):
        rng = np.random.default_rng(11)
        hits, errors = 0, []
        for _ in range(400):
            arms = study(rng, saved, n, correlated=correlated, exponent=exponent)
            found = stats.budget_ratio(*arms)
            hits += found.low <= 1 - saved <= found.high
            errors.append(math.log(found.ratio / (1 - saved)))
        assert 0.90 <= hits / 400 <= 0.99
        assert abs(np.mean(errors)) < 0.003  # a third of one seed's error at this noise

    def test_noisy_small_models_are_covered_or_not_told(self):
        rng = np.random.default_rng(12)
        found = [stats.budget_ratio(*study(rng, 0.12, 5, 0.01)) for _ in range(400)]
        told = [r for r in found if r]
        assert len(told) > 380
        assert 0.90 <= sum(r.low <= 0.88 <= r.high for r in told) / len(told) <= 0.99

    def test_correlated_seeds_narrow_it(self):
        width = {}
        for correlated in (0.0, 0.9):
            rng = np.random.default_rng(5)
            found = [
                stats.budget_ratio(*study(rng, 0.1, 5, correlated=correlated)) for _ in '12345'
            ]
            width[correlated] = np.mean([r.high - r.low for r in found])
        # Differences lose 90 % of their variance: widths shrink to sqrt(0.1) = 0.32.
        assert width[0.9] < 0.5 * width[0.0]

    @pytest.mark.parametrize('sigma', [0.001, 0.01, 0.03])
    def test_says_the_same_as_the_verdict(self, sigma):
        rng = np.random.default_rng(6)
        told = 0
        for saved in (-0.1, -0.02, 0.0, 0.02, 0.1) * 10:
            method, baseline = study(rng, saved, 3, sigma)
            found = stats.budget_ratio(method, baseline)
            if found is None:
                continue
            told += 1
            gaps = [method[1.0][i] - baseline[1.0][i] for i in range(3)]
            verdict = stats.verdict(stats.paired_interval(gaps), 0.0)
            says = 'win' if found.high < 1 else 'loss' if found.low > 1 else 'inconclusive'
            assert says == verdict
            assert found.low <= found.ratio <= found.high
            assert found.low >= 0.6 - 1e-9 and found.high <= 1 / 0.6 + 1e-9
        assert told > 10

    def test_swapped_arms_give_the_inverse(self):
        method, baseline = study(np.random.default_rng(1), 0.1, 4)
        one, other = stats.budget_ratio(method, baseline), stats.budget_ratio(baseline, method)
        assert (one.ratio, one.low, one.high) == pytest.approx(
            (1 / other.ratio, 1 / other.high, 1 / other.low)
        )

    def test_higher_is_better(self):
        arms = study(np.random.default_rng(2), 0.1, 3)
        found = stats.budget_ratio(*map(mirrored, arms), lower_is_better=False)
        expected = stats.budget_ratio(*arms)
        assert (found.ratio, found.low, found.high) == pytest.approx(
            (expected.ratio, expected.low, expected.high)
        )

    def test_identical_runs_need_the_same_budget(self):
        table, _ = study(np.random.default_rng(2), 0.0, 3, sigma=0.1)
        found = stats.budget_ratio(table, table)
        assert (found.ratio, found.low, found.high, found.n) == (1.0, 1.0, 1.0, 3)

    def test_crossing_below_the_budgets_that_were_run_is_a_bound(self):
        method, baseline = study(np.random.default_rng(3), 0.6, 3)
        found = stats.budget_ratio(method, baseline)
        assert (found.ratio, found.bound) == (pytest.approx(0.6), 'at most')
        assert found.low == pytest.approx(0.6) and found.high == pytest.approx(0.6)
        found = stats.budget_ratio(baseline, method)
        assert (found.ratio, found.bound) == (pytest.approx(1 / 0.6), 'at least')

    def test_an_end_that_the_budgets_cut_off_is_open(self):
        rng, seen = np.random.default_rng(6), set()
        for saved in (0.0, 0.1, 0.35) * 20:
            method, baseline = study(rng, saved, 3, 0.03)
            found = stats.budget_ratio(method, baseline)
            if found is None:
                continue
            assert found.low_open == (found.low < 0.6 + 1e-9)
            assert found.high_open == (found.high > 1 / 0.6 - 1e-9)
            seen.add((found.low_open, found.high_open))
            swapped = stats.budget_ratio(baseline, method)
            if swapped:
                assert (swapped.low_open, swapped.high_open) == (found.high_open, found.low_open)
        assert seen == {(False, False), (False, True), (True, False), (True, True)}
        exact = stats.budget_ratio(*study(rng, 0.1, 3, 1e-9))
        assert not exact.low_open and not exact.high_open

    def test_a_winner_needs_the_baseline_at_the_full_budget_only(self):
        method, baseline = study(np.random.default_rng(4), 0.1, 3)
        full = {1.0: baseline[1.0]}
        assert stats.budget_ratio(method, full) == stats.budget_ratio(method, baseline)
        assert stats.budget_ratio(baseline, {1.0: method[1.0]}) is None

    def test_a_failed_run_costs_its_own_value_only(self):
        method, baseline = study(np.random.default_rng(4), 0.1, 3)
        del method[0.6][1]
        found = stats.budget_ratio(method, baseline)
        assert found.n == 3 and found.ratio == pytest.approx(0.9, abs=0.02)
        del method[1.0][1]
        assert stats.budget_ratio(method, baseline).n == 2

    def test_cannot_tell(self):
        rng = np.random.default_rng(5)
        method, baseline = study(rng, 0.1, 3)
        assert stats.budget_ratio({}, baseline) is None
        assert stats.budget_ratio({1.0: method[1.0]}, {1.0: baseline[1.0]}) is None
        assert stats.budget_ratio(*study(rng, 0.1, 1)) is None
        assert stats.budget_ratio(*study(rng, 0.0, 3, slope=-SLOPE)) is None  # worse with budget
        flat = [stats.budget_ratio(*study(rng, 0.0, 3, slope=-1e-9)) for _ in range(100)]
        assert flat.count(None) >= 90  # a slope of noise passes the test in 2.5 % of studies

    def test_diverged_runs_are_refused(self):
        method, baseline = study(np.random.default_rng(4), 0.1, 3)
        method[0.75][2] = math.inf
        with pytest.raises(StudyError, match=r'Seed 2 has a metric of inf'):
            stats.budget_ratio(method, baseline)


def test_importing_is_cheap():
    code = (
        'import effjax.study.stats, sys; print([m for m in sys.modules if m in ("scipy", "jax")])'
    )
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == '[]'
