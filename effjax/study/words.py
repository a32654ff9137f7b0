"""A finding in words: the sentence that every output of a study begins with."""

from collections.abc import Sequence

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
    """
    if verdict in ('refused', 'failed'):
        return f'no verdict on {arm}: {reason}'
    assert difference is not None
    text = _finding(arm, baseline, verdict, axis, metric, difference, ratio, margin, detectable)
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
    budget, quality = AXES[axis][1], metric.partition('.')[2].replace('_', ' ')
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
    return f'{arm} {_amount(ratio, verdict, budget)} at equal {quality} ({speed(ratio)})'


def savings(ratio: Ratio) -> str:
    """Returns '12 % +- 4', with a plain interval where it is lopsided, or 'at least 40 %'."""
    saved, low, high = 1 - ratio.ratio, 1 - ratio.high, 1 - ratio.low
    if ratio.bound == 'at most' and ratio.high > 1.001 * ratio.ratio:
        # The budgets end there, the interval does not: the seeds do not show that much.
        return f'about {saved:.0%} or more (95 % interval from {low:.0%})'
    if ratio.bound:
        return f'{"at least" if ratio.bound == "at most" else "at most"} {saved:.0%}'
    up, down = high - saved, saved - low
    if abs(up - down) <= 0.25 * max(up, down):
        return f'{saved:.1%} ± {100 * (up + down) / 2:.1f}'
    return f'{saved:.1%} (95 % interval {low:.1%} to {high:.1%})'


def speed(ratio: Ratio) -> str:
    """Returns '1.14x', with the words of a bound."""
    words = {'at most': 'at least ', 'at least': 'at most ', '': ''}[ratio.bound]
    if ratio.bound == 'at most' and ratio.high > 1.001 * ratio.ratio:
        words = 'about '
    return f'{words}{1 / ratio.ratio:.2f}x'


def _amount(ratio: Ratio, verdict: str, budget: str) -> str:
    if verdict == 'win':
        return f'saves {savings(ratio)} of the {budget}'
    if ratio.bound:
        return f'needs {ratio.bound} {ratio.ratio - 1:.0%} more {budget}'
    low, high = ratio.low - 1, ratio.high - 1
    return f'needs {ratio.ratio - 1:.1%} more {budget} (95 % interval {low:.1%} to {high:.1%})'


def _difference(difference: Interval) -> str:
    half = (difference.high - difference.low) / 2
    return f'{_signed(difference.mean)} ± {_number(half)}'


def _number(value: float) -> str:
    return f'{value:.2g}' if value else '0'


def _signed(value: float) -> str:
    return f'{value:+.3g}' if value else '0'
