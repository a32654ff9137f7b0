"""Learning-rate schedules: functions of a run's progress in [0, 1], in float64 on the host.

A component is `(*, peak, ...) -> Schedule`; `schedule(progress)` is a Python float. Progress is
the share of the budget (steps, tokens, FLOPs or seconds) that is spent, so a schedule ends exactly
at the budget whatever its unit. Every schedule rises linearly from 0 over the first `warmup` share
of the run, never rises after that (`piecewise` does as it is told), and takes its final value
exactly at progress 1.
"""

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from effjax.core.errors import ConfigError
from effjax.core.registry import arguments, check_block
from effjax.training import SCHEDULES


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of progress.

    Attributes:
      peak: the highest learning rate.
      warmup: share of the run over which the rate rises linearly from 0 to `peak`.
      shape: the rate after warm-up in units of `peak`, as a function of progress.
    """

    peak: float
    warmup: float
    shape: Callable[[float], float]

    def __call__(self, progress: float) -> float:
        """Returns the learning rate.

        Args:
          progress: share of the run that is done; beyond [0, 1] (a last step may overshoot its
            budget) the nearest end counts.

        Raises:
          ValueError: progress is not a number.
        """
        if math.isnan(progress):
            raise ValueError('a schedule needs a progress in [0, 1], got nan.')
        progress = min(max(float(progress), 0.0), 1.0)
        if progress < self.warmup:
            return self.peak * (progress / self.warmup)
        return self.peak * self.shape(progress)


def build(block: Mapping[str, Any], path: str = 'config.schedule') -> Schedule:
    """Builds the schedule that a block such as `dict(kind='cosine', peak=1e-3)` names.

    Raises:
      ConfigError: unknown kind or argument, a value of the wrong type or out of range.
    """
    component = check_block(SCHEDULES, block, 'schedule', path)
    try:
        return component(**arguments(block))
    except ConfigError as e:
        raise ConfigError(f'{path}{e}') from e


def constant(*, peak: float, warmup: float = 0.0) -> Schedule:
    """`peak` after warm-up."""
    _check(peak, warmup)
    return Schedule(peak, warmup, lambda progress: 1.0)


def linear(*, peak: float, warmup: float = 0.0, final: float = 0.0) -> Schedule:
    """A straight line from `peak` to `final * peak` (Defazio et al. 2023, arXiv:2310.07831)."""
    _check(peak, warmup, final=final)
    return Schedule(peak, warmup, lambda p: _blend(_share(p, warmup, 1.0), final))


def cosine(*, peak: float, warmup: float = 0.0, final: float = 0.0, stairs: int = 0) -> Schedule:
    """Half a cosine from `peak` to `final * peak` (Loshchilov, Hutter 2017, arXiv:1608.03983).

    Args:
      peak: the highest rate.
      warmup: share of the run that warms up.
      final: rate at the end in units of `peak`.
      stairs: the rate is held within each of so many equal parts of the run, at its value where
        the part begins, as by a scheduler that steps once an epoch; 0 holds it nowhere.

    Raises:
      ConfigError: an argument out of range.
    """
    _check(peak, warmup, final=final)
    if stairs < 0:
        raise ConfigError(f'.stairs must not be negative, got {stairs}.')

    def shape(progress: float) -> float:
        if stairs:
            progress = math.floor(progress * stairs) / stairs
        return _blend(_cosine(_share(progress, warmup, 1.0)), final)

    return Schedule(peak, warmup, shape)


def wsd(
    *,
    peak: float,
    warmup: float = 0.0,
    decay: float = 0.2,
    final: float = 0.0,
    shape: Literal['linear', 'sqrt', 'cosine'] = 'linear',
) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395); linear is the trapezoid.

    Args:
      peak: the rate of the stable part.
      warmup: share of the run that warms up.
      decay: share of the run, at its end, that decays.
      final: rate at the end in units of `peak`.
      shape: form of the decay; 'sqrt' is `1 - sqrt(x)` (Hägele et al. 2024, arXiv:2405.18392).

    Raises:
      ConfigError: an argument out of range, or warm-up and decay together longer than the run.
    """
    _check(peak, warmup, final=final, decay=decay)
    if warmup + decay > 1:
        raise ConfigError(f': warmup {warmup} and decay {decay} are together longer than the run.')
    form = {'linear': lambda x: x, 'sqrt': math.sqrt, 'cosine': _cosine}[shape]

    def after(progress: float) -> float:
        return _blend(form(_share(progress, 1.0 - decay, 1.0)), final)

    return Schedule(peak, warmup, after)


def piecewise(*, peak: float, points: tuple = ((0.0, 1.0), (1.0, 0.0))) -> Schedule:
    """Straight lines between points.

    Args:
      peak: the unit of the points' rates.
      points: pairs (progress, rate in units of `peak`), progress rising from 0 to 1.

    Raises:
      ConfigError: points that are no such pairs.
    """
    _check(peak, 0.0)
    xs, ys = _points(points)

    def shape(progress: float) -> float:
        i = min(bisect.bisect_right(xs, progress), len(xs) - 1)
        share = _share(progress, xs[i - 1], xs[i])
        return ys[i] if share == 1 else ys[i - 1] + share * (ys[i] - ys[i - 1])

    return Schedule(peak, 0.0, shape)


def _share(progress: float, start: float, end: float) -> float:
    """Returns how much of [start, end] is done, in [0, 1], and 1 exactly at the end."""
    if progress >= end:
        return 1.0
    return 0.0 if progress <= start else (progress - start) / (end - start)


def _blend(share: float, final: float) -> float:
    """Goes from 1 to `final`, exactly at both ends."""
    return (1.0 - share) + share * final


def _cosine(share: float) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * share))


def _check(peak: float, warmup: float, **shares: float) -> None:
    if not (math.isfinite(peak) and peak > 0):
        raise ConfigError(f'.peak must be above 0, got {peak}.')
    if not 0 <= warmup < 1:
        raise ConfigError(f'.warmup must be a share of the run in [0, 1), got {warmup}.')
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f'.{name} must be in [0, 1], got {value}.')


def _points(points: Sequence[Any]) -> tuple[list[float], list[float]]:
    pairs = [tuple(p) if isinstance(p, list | tuple) else () for p in points]
    if len(pairs) < 2 or any(len(p) != 2 for p in pairs):
        raise ConfigError(f'.points must be at least two pairs (progress, rate), got {points!r}.')
    xs, ys = [float(x) for x, _ in pairs], [float(y) for _, y in pairs]
    rising = all(a < b for a, b in itertools.pairwise(xs))
    if xs[0] != 0 or xs[-1] != 1 or not rising:
        raise ConfigError(f'.points must rise in progress from 0 to 1, got {xs}.')
    if min(ys) < 0:
        raise ConfigError(f'.points must have rates of at least 0, got {ys}.')
    return xs, ys
