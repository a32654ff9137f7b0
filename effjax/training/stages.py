"""Stages: a run is a list of them, a plain config being one.

A stage is a dict in `config.stages` that says how long it lasts, by `share` of the run's extent or
by `steps` (in runs counted in steps), and what it changes: batch size, sequence length, data,
schedule, optimizer settings. With its own `schedule` a stage's progress runs from 0 to 1 inside
the stage; without one the run's schedule goes on over the whole run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core.config import as_dict, extent
from effjax.core.errors import ConfigError

_EXTENT_KEYS = ('name', 'steps', 'share')


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      index: its number, from 0.
      name: its name in metrics and reports.
      config: the complete config as plain dicts, with the stage's changes applied.
      unit: what the run's extent is counted in: 'steps', 'tokens', 'examples', 'model_flops',
        'seconds'.
      start: where it begins, in that unit.
      end: where it ends.
      own_schedule: whether progress counts inside the stage.
      total: the whole run's extent.
    """

    index: int
    name: str
    config: dict[str, Any]
    unit: str
    start: float
    end: float
    own_schedule: bool
    total: float

    def progress(self, consumed: float) -> float:
        """Returns the schedule's progress in [0, 1] when `consumed` of the extent is used."""
        if self.own_schedule:
            span, consumed = self.end - self.start, consumed - self.start
        else:
            span = self.total
        return min(max(consumed / span, 0.0), 1.0)


def plan(config: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages of a config whose form has been checked.

    Raises:
      ConfigError: a stage without exactly one of `share` and `steps`, `steps` in a run that is
        not counted in steps, extents that do not add up, or a change to a block's `kind` that
        would change the saved state.
    """
    base = as_dict(config)
    unit, total = extent(base)
    if not base['stages']:
        return [Stage(0, 'main', base, unit, 0.0, total, False, total)]
    lengths = _lengths(base['stages'], unit, total)
    out, start, done = [], 0.0, 0.0
    for i, (stage, length) in enumerate(zip(base['stages'], lengths, strict=True)):
        done += length
        end = total if i == len(lengths) - 1 else round(done) if unit == 'steps' else done
        if end <= start:
            raise ConfigError(f'config.stages.{i} would not last a single step.')
        changed = _apply(base, stage, i)
        name = stage.get('name', f'stage_{i}')
        out.append(Stage(i, name, changed, unit, start, end, 'schedule' in stage, total))
        start = end
    return out


def _lengths(stages: list[dict[str, Any]], unit: str, total: float) -> list[float]:
    lengths = []
    for i, stage in enumerate(stages):
        if ('share' in stage) == ('steps' in stage):
            raise ConfigError(f'config.stages.{i} needs exactly one of share and steps.')
        if 'steps' in stage and unit != 'steps':
            raise ConfigError(
                f'config.stages.{i}.steps: the run is counted in {unit}; give share instead.'
            )
        length = stage['share'] * total if 'share' in stage else float(stage['steps'])
        if length <= 0:
            raise ConfigError(f'config.stages.{i} must last longer than nothing.')
        lengths.append(length)
    if abs(sum(lengths) - total) > 1e-6 * total:
        raise ConfigError(
            f'config.stages last {sum(lengths):g} {unit} together, but the run lasts {total:g}; '
            'make shares add up to 1, or steps to config.steps.'
        )
    return lengths


def _apply(base: dict[str, Any], stage: Mapping[str, Any], index: int) -> dict[str, Any]:
    out = dict(base)
    for key, value in stage.items():
        if key in _EXTENT_KEYS:
            continue
        if isinstance(base[key], dict):
            if key == 'optimizer' and value.get('kind', base[key]['kind']) != base[key]['kind']:
                raise ConfigError(
                    f'config.stages.{index}.optimizer.kind: a stage may change settings of '
                    f'{base[key]["kind"]!r}, not the optimizer itself: its state would be lost.'
                )
            same_kind = value.get('kind', base[key]['kind']) == base[key]['kind']
            out[key] = {**(base[key] if same_kind else {}), **value}
        else:
            out[key] = value
    return out
