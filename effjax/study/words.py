"""A finding in words: the sentence that every output of a study begins with."""

from collections.abc import Mapping, Sequence

from effjax.study.records import Interval, Ratio
from effjax.study.spec import AXES


def sentence(
    *,
    arm: str,
    baseline: str,
    verdict: str,
    axis: str,
    metric: str,
    difference: Interval | None,
    ratio: Ratio | None,
    margin: float,
    detectable: float | None,
    reason: str = '',
    untuned: Sequence[str] = (),
    reused: bool = False,
    charged: Ratio | None = None,
    extra: float | None = None,
) -> str:
    """Returns the finding on one arm.

    Args:
      arm, baseline: names.
      verdict: one of `records.VERDICTS`.
      axis: the study's budget axis.
      metric: 'EVALUATION.METRIC'.
      difference: of the metric at equal budget.
      ratio: budget for equal quality, None where it could not be told.
      margin: the study's.
      detectable: smallest difference that this many seeds find.
      reason: why it was refused or failed.
      untuned: arms whose tuning did not end inside its grid.
      reused: whether one of the two reuses a source model, so that two numbers are due.
      charged: `ratio` with the cost of source models added, None where it could not be told.
      extra: what the arm's source cost more than the baseline's, over what a run of the baseline
        spent; None where it is not known.
    """
    if verdict in ('refused', 'failed'):
        return f'no verdict on {arm}: {reason}'
    assert difference is not None
    text = _finding(arm, baseline, verdict, axis, metric, difference, ratio, margin, detectable)
    if reused:
        text += f' source free; {_with_sources(charged, extra, axis, metric)}'
    return text + (f' (untuned: {" and ".join(untuned)})' if untuned else '')


def _finding(
    arm: str,
    baseline: str,
    verdict: str,
    axis: str,
    metric: str,
    difference: Interval,
    ratio: Ratio | None,
    margin: float,
    detectable: float | None,
) -> str:
    budget, quality = AXES[axis][1], _quality(metric)
    gap = _difference(difference)
    if verdict == 'equivalent' and not (difference.mean or difference.sd):
        return f'{arm} gave exactly the same {quality} as {baseline} on every seed'
    if verdict == 'equivalent':
        return (
            f'{arm} is equivalent to {baseline} at equal {budget}: the {quality} differs by {gap}, '
            f'within the margin of {margin:g}'
        )
    if verdict == 'inconclusive':
        finds = f', where {_number(detectable)} would be found' if detectable else ''
        return (
            f'cannot tell {arm} from {baseline}: at equal {budget} the {quality} differs by {gap} '
            f'with {difference.n} seeds{finds}'
        )
    if ratio is None:
        better = 'better' if verdict == 'win' else 'worse'
        return f'{arm} is {better} at equal {budget}: the {quality} differs by {gap}'
    return f'{arm} {_amount(ratio, budget)} at equal {quality} ({speed(ratio)})'


def savings(ratio: Ratio) -> str:
    """Returns '12 % +- 4', its interval where it is lopsided or open, or 'at least 40 %'."""
    saved, low, high = 1 - ratio.ratio, 1 - ratio.high, 1 - ratio.low
    ends = interval(low, high, ratio.high_open, ratio.low_open)
    if ratio.bound:
        return bounded(f'{saved:.0%}', ratio, {'at most': 'at least', 'at least': 'at most'}, ends)
    up, down = high - saved, saved - low
    closed = not (ratio.low_open or ratio.high_open)
    if closed and abs(up - down) <= 0.25 * max(up, down):
        return f'{saved:.1%} ± {100 * (up + down) / 2:.1f}'
    return f'{saved:.1%} ({ends})'


def bounded(amount: str, ratio: Ratio, bounds: Mapping[str, str], ends: str) -> str:
    """Returns an amount whose crossing lies outside the budgets, as sure as the seeds make it.

    Args:
      amount: in words.
      ratio: what it comes from; its `bound` is set.
      bounds: the ratio's bound -> the amount's.
      ends: the amount's interval in words.
    """
    bound = bounds[ratio.bound]
    if ratio.beyond:
        return f'{bound} {amount}'
    # The budgets end there, the interval does not: the seeds do not show that much.
    return f'about {amount} or {"more" if bound == "at least" else "less"} ({ends})'


def interval(low: float, high: float, low_open: bool = False, high_open: bool = False) -> str:
    """Returns '95 % interval 10.0% to 40.0% or more'; an open end goes on beyond its number."""
    down, up = (' or less' if low_open else ''), (' or more' if high_open else '')
    return f'95 % interval {low:.1%}{down} to {high:.1%}{up}'


def speed(ratio: Ratio) -> str:
    """Returns '1.14x', with the words of a bound."""
    words = {'at most': 'at least ', 'at least': 'at most ', '': ''}[ratio.bound]
    if ratio.bound and not ratio.beyond:
        words = 'about '
    return f'{words}{1 / ratio.ratio:.2f}x'


def _with_sources(charged: Ratio | None, extra: float | None, axis: str, metric: str) -> str:
    """Returns what is left of a finding when source models are paid for."""
    budget = AXES[axis][1]
    if charged is not None:
        amount = f'{_amount(charged, budget)} at equal {_quality(metric)} ({speed(charged)})'
        return f'with source models charged it {amount}'
    if extra is None:
        return f'what the source models cost in {budget} is not known'
    return f'source models cost it a further {extra:.1%} of the {budget}'


def _quality(metric: str) -> str:
    return metric.partition('.')[2].replace('_', ' ')


def _amount(ratio: Ratio, budget: str) -> str:
    if ratio.ratio <= 1:
        return f'saves {savings(ratio)} of the {budget}'
    ends = interval(ratio.low - 1, ratio.high - 1, ratio.low_open, ratio.high_open)
    if ratio.bound:
        same = {'at most': 'at most', 'at least': 'at least'}
        amount = bounded(f'{ratio.ratio - 1:.0%}', ratio, same, ends)
        return f'needs {amount} more {budget}'
    return f'needs {ratio.ratio - 1:.1%} more {budget} ({ends})'


def _difference(difference: Interval) -> str:
    half = (difference.high - difference.low) / 2
    return f'{_signed(difference.mean)} ± {_number(half)}'


def _number(value: float) -> str:
    return f'{value:.2g}' if value else '0'


def _signed(value: float) -> str:
    return f'{value:+.3g}' if value else '0'
