"""Stages: a run is a list of them, a plain config being one.

A stage is a dict in `config.stages` that says how long it lasts, by `share` of the run's extent
(`budget='12.5%'` is the same) or by `steps` (in runs counted in steps), and what it changes: batch
size, sequence length, data, schedule, optimizer settings, the model's sizes. With its own
`schedule` a stage's progress runs from 0 to 1 inside the stage; without one the run's schedule goes
on over the whole run. Where the model changes, `grow` names the operator that makes the larger
model's state of the smaller one's (`effjax.growth`): `grow='stack'`, or a block with its arguments,
and `moments`, `counts` and `seed` as `effjax.growth.grow` takes them.

A stage with `until={'slope': -0.05}` ends before its time once its loss falls no more steeply than
that (`training.slope`); the next one begins there and ends where it was to end.

The first stage may begin from another run's checkpoint, `init_from` (`training.sources`).
LiGO learns how to grow: `grow=dict(kind='ligo', steps=100, lr=2e-4)` puts a stage `NAME:maps` of so
many training steps in front of the stage NAME (`training.learning`), out of the same share.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from effjax.core.config import STAGE_OWN, as_dict, extent
from effjax.core.errors import ConfigError

# What a block of LiGO's says of its learning phase; the paper's values (arXiv 2303.00980).
LEARNING: dict[str, Any] = {'steps': 100, 'lr': 2e-4}

_PERCENT = re.compile(r'\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*')


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
      index: its number, from 0; a phase that learns maps counts, so that it is not always the
        number in the config, which `where` says.
      name: its name in metrics and reports.
      config: the complete config as plain dicts, with the stage's changes applied.
      unit: what the run's extent is counted in: 'steps', 'tokens', 'examples', 'model_flops',
        'seconds'.
      start: where it begins, in that unit.
      end: where it ends.
      own_schedule: whether progress counts inside the stage.
      total: the whole run's extent.
      grow: the block of the operator that grows the model of the stage before, or None.
      until: what ends it before its time, as `check_until` returns it, or None.
      where: its place in the config, for errors.
      origin: what the run had used before its first stage.
      limit: training steps after which it ends, whatever the run is counted in; 0 goes by `end`.
      maps: what it does with the maps of LiGO: 'learn' trains them, 'use' begins with the model
        that they make; '' has none.
    """

    index: int
    name: str
    config: dict[str, Any]
    unit: str
    start: float
    end: float
    own_schedule: bool
    total: float
    grow: dict[str, Any] | None = None
    until: dict[str, float] | None = None
    where: str = 'config'
    origin: float = 0.0
    limit: int = 0
    maps: Literal['', 'learn', 'use'] = ''

    def progress(self, consumed: float) -> float:
        """Returns the schedule's progress in [0, 1] when `consumed` of the extent is used."""
        run, stage = self.shares(consumed)
        return stage if self.own_schedule else run

    def shares(self, consumed: float) -> tuple[float, float]:
        """Returns the shares in [0, 1] of the run and of the stage that are done."""
        return (
            _share_of(consumed, self.origin, self.total),
            _share_of(consumed, self.start, self.end),
        )


def plan(config: Mapping[str, Any]) -> list[Stage]:
    """Returns the stages of a config whose form has been checked.

    Raises:
      ConfigError: a stage without exactly one of `share`, `budget` and `steps`, `steps` in a run
        that is not counted in steps, extents that do not add up, a change to a block's `kind` that
        would change the saved state, or a model that changes without `grow`, or with it does not.
    """
    base = as_dict(config)
    unit, total = extent(base)
    if not base['stages']:
        return [Stage(0, 'main', base, unit, 0.0, total, False, total)]
    lengths = _lengths(base['stages'], unit, total)
    out: list[Stage] = []
    start = done = 0.0
    for i, (stage, length) in enumerate(zip(base['stages'], lengths, strict=True)):
        done += length
        end = total if i == len(lengths) - 1 else round(done) if unit == 'steps' else done
        where = f'config.stages.{i}'
        if end <= start:
            raise ConfigError(f'{where} would not last a single step.')
        changed = _apply(base, stage, i)
        name = stage.get('name', f'stage_{i}')
        grow = _grow(stage, i)
        if out and 'init_from' in stage:
            raise ConfigError(
                f'{where}.init_from: only the first stage can begin from another run; in a later '
                'one what this run has trained would be lost.'
            )
        _check_growth(grow, changed, out[-1].config if out else None, i)
        own, until = 'schedule' in stage, None
        if 'until' in stage:
            until = check_until(stage['until'], f'{where}.until', last=i == len(lengths) - 1)
        planned = Stage(
            len(out), name, changed, unit, start, end, own, total, grow, until, where=where
        )
        out += _with_learning(planned, out[-1].config if out else {})
        start = end
    _check_names(out)
    return out


def _with_learning(stage: Stage, before: Mapping[str, Any]) -> list[Stage]:
    """Returns a stage, behind the one that learns the maps it begins with, if it has such."""
    if stage.grow is None or stage.grow['kind'] != 'ligo':
        return [stage]
    steps, lr = _learning(stage)
    if not steps:
        return [stage]
    config = {
        **stage.config,
        'schedule': {'kind': 'constant', 'peak': float(lr)},
        'optimizer': {'kind': 'adamw', 'weight_decay': 0.0},
        'lr_scales': (),
        'decay_scales': (),
        'ema': 0.0,
        'grown_from': before.get(
            'model', 'init_from'
        ),  # a step's time depends on it (`costs.reference`)
    }
    counted = stage.unit == 'steps'
    phase = Stage(
        stage.index,
        f'{stage.name}:maps',
        config,
        stage.unit,
        stage.start,
        stage.start + steps if counted else stage.end,
        True,
        stage.total,
        grow=stage.grow,
        where=stage.where,
        limit=steps,
        maps='learn',
    )
    if counted:
        check_learning(phase, stage.end - stage.start, 1.0)
    start = phase.end if counted else stage.start
    return [phase, dataclasses.replace(stage, index=stage.index + 1, start=start, maps='use')]


def _learning(stage: Stage) -> tuple[int, float]:
    """Returns the steps and the learning rate of a phase that learns maps."""
    assert stage.grow is not None
    steps, lr = (stage.grow.get(key, default) for key, default in LEARNING.items())
    where = f'{stage.where}.grow'
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ConfigError(
            f"{where}.steps must be the whole number of steps that learn LiGO's maps, 0 to take "
            f'the initial ones, not {steps!r}.'
        )
    number = isinstance(lr, int | float) and not isinstance(lr, bool)
    if not number or not 0 < lr < float('inf'):
        raise ConfigError(
            f"{where}.lr must be the positive learning rate of LiGO's maps, not {lr!r}; the "
            f'paper takes {LEARNING["lr"]:g}.'
        )
    return steps, lr


def check_learning(phase: Stage, extent: float, step: float) -> None:
    """Checks that a phase that learns maps leaves something of its stage to the model.

    Args:
      phase: one with `limit`.
      extent: how long it and its stage last together, in the run's unit.
      step: one of its steps in that unit.

    Raises:
      ConfigError: saying how long both are.
    """
    if phase.limit * step >= extent:
        raise ConfigError(
            f"{phase.where}.grow.steps: {phase.limit} steps that learn LiGO's maps take "
            f'{phase.limit * step:g} {phase.unit}, but they and the stage behind them last '
            f'{extent:g} together; give it fewer (0 takes the initial maps), or a longer stage.'
        )


def _check_names(stages: list[Stage]) -> None:
    seen: set[str] = set()
    for stage in stages:
        if stage.name in seen:
            raise ConfigError(
                f'{stage.where}.name: another stage is called {stage.name!r} too, and what each '
                'has cost is kept by name; give it a name of its own.'
            )
        seen.add(stage.name)


def _share_of(consumed: float, start: float, end: float) -> float:
    if end <= start:
        return 1.0  # a stage whose share the ones before it have used up
    return min(max((consumed - start) / (end - start), 0.0), 1.0)


def _lengths(stages: list[dict[str, Any]], unit: str, total: float) -> list[float]:
    lengths = []
    for i, stage in enumerate(stages):
        if sum(key in stage for key in ('share', 'budget', 'steps')) != 1:
            raise ConfigError(f'config.stages.{i} needs exactly one of share, budget and steps.')
        if 'steps' in stage and unit != 'steps':
            raise ConfigError(
                f'config.stages.{i}.steps: the run is counted in {unit}; give share instead.'
            )
        length = float(stage['steps']) if 'steps' in stage else _share(stage, i) * total
        if length <= 0:
            raise ConfigError(f'config.stages.{i} must last longer than nothing.')
        lengths.append(length)
    if abs(sum(lengths) - total) > 1e-6 * total:
        raise ConfigError(
            f'config.stages last {sum(lengths):g} {unit} together, but the run lasts {total:g}; '
            'make shares add up to 1, or steps to config.steps.'
        )
    return lengths


def _share(stage: Mapping[str, Any], index: int) -> float:
    """Returns which part of the run a stage lasts."""
    if 'share' in stage:
        return stage['share']
    found = _PERCENT.fullmatch(stage['budget'])
    if found is None:
        raise ConfigError(
            f"config.stages.{index}.budget is a part of the run's, such as '12.5%', not "
            f'{stage["budget"]!r}.'
        )
    return float(found[1]) / 100


def check_until(block: Mapping[str, Any], where: str, *, last: bool) -> dict[str, float]:
    """Returns a stage's `until`: `slope`, and over which `window` of compute it is taken.

    Raises:
      ConfigError: an unknown key, a slope that no falling loss reaches, or nothing that follows.
    """
    for key in block:
        if key not in ('slope', 'window'):
            raise ConfigError(f'{where} takes slope and window, not {key!r}.')
    found = {'window': 1.5, **block}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f'{where}.{key} must be a number, got {value!r}.')
    if 'slope' not in found or not found['slope'] < 0:
        raise ConfigError(
            f'{where} needs a slope below 0, at which the stage ends: d log(loss) / d log(FLOPs), '
            'such as -0.05.'
        )
    if not found['window'] > 1.1:
        raise ConfigError(
            f'{where}.window is how many times as much compute its end has spent as its beginning; '
            f'it must be above 1.1, got {found["window"]}.'
        )
    if last:
        raise ConfigError(f'{where}: no stage follows that could begin early; leave it out.')
    return found


def _grow(stage: Mapping[str, Any], index: int) -> dict[str, Any] | None:
    """Returns the block of a stage's operator."""
    grow = stage.get('grow')
    if isinstance(grow, str):
        return {'kind': grow}
    if grow is not None and not isinstance(grow.get('kind'), str):
        raise ConfigError(
            f"config.stages.{index}.grow names no operator; write grow='stack', or a block with a "
            "'kind'."
        )
    return grow


def _check_growth(
    grow: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    index: int,
) -> None:
    where = f'config.stages.{index}'
    if before is None:
        if grow is not None and not config.get('init_from'):
            raise ConfigError(
                f'{where}.grow: no stage comes before it whose model could grow; name a run to '
                'begin from in init_from.'
            )
        return
    if grow is None and config['model'] != before['model']:
        raise ConfigError(
            f"{where} changes the model without saying how: name an operator, such as grow='stack'."
        )
    if grow is not None and config['model'] == before['model']:
        raise ConfigError(
            f'{where}.grow: the model is that of the stage before; change {where}.model, or leave '
            'grow out.'
        )


def _apply(base: dict[str, Any], stage: Mapping[str, Any], index: int) -> dict[str, Any]:
    out = dict(base)
    for key, value in stage.items():
        if key in STAGE_OWN:
            continue
        if key == 'init_from':
            out[key] = value
        elif isinstance(base[key], dict):
            if key == 'model' and value.get('kind', base[key]['kind']) != base[key]['kind']:
                raise ConfigError(
                    f'config.stages.{index}.model.kind: a stage may change the sizes of a '
                    f'{base[key]["kind"]!r}, not make it another model.'
                )
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
