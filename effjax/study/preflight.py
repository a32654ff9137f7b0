"""What must hold before a study starts, and what it will cost: no array is made here.

Each arm is built abstractly: parameters, cost of a step, steps at the budget, and a digest of the
batches it would be judged on, which must be the same in all arms.
"""

import dataclasses
import hashlib
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax import parallel
from effjax.core.config import as_dict, check_form
from effjax.core.errors import EffjaxError, StudyError
from effjax.core.registry import suggest
from effjax.costs import EnergyMeter
from effjax.costs.reference import reference_seconds
from effjax.study import plan
from effjax.study.records import Cell
from effjax.study.spec import AXES, Arm, Study, direction
from effjax.training import checkpoints, schedules, setup, teacher
from effjax.training.batched import VARYING
from effjax.training.runtime import Runtime

BATCHED_PARAMS = 100e6  # parameters of all lanes together, up to which `vmap` is chosen


@dataclasses.dataclass(frozen=True)
class Facts:
    """An arm, before it runs.

    Attributes:
      params: parameters.
      step_flops: model FLOPs of a training step (of the first stage).
      steps: steps at the full budget, None where only running tells.
      evaluation: digest of the batches that the metric is taken on.
      data: the data in words.
      resolved: the config with what the data knows filled in.
      inputs: digests of the content behind the config, which may change while the config stays:
        'data', 'evaluation NAME', and 'reference', the table of reference time.
    """

    params: int
    step_flops: float
    steps: int | None
    evaluation: str
    data: dict[str, Any]
    resolved: dict[str, Any]
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)


def examine(study: Study) -> dict[str, Facts]:
    """Returns arm -> facts.

    Raises:
      StudyError: an arm whose config is wrong, that reads other evaluation data, lacks the metric's
        evaluation, does not decay its schedule, or cannot reach the budget.
    """
    facts = {arm.name: _arm(study, arm) for arm in study.arms}
    first = facts[study.baseline.name]
    for name, fact in facts.items():
        if fact.evaluation != first.evaluation:
            raise StudyError(
                f'arm {name!r} would be judged on other batches than {study.baseline.name!r} '
                f'(evaluation {study.metric.split(".")[0]!r}), so that their numbers cannot be '
                'compared; give all arms the same held-out data, tokenizer, seq_len and '
                'evals.<name>.batch_size.'
            )
        tasks = [setup.judged_by(f.resolved)[1]['kind'] for f in (first, fact)]
        if tasks[0] != tasks[1]:
            raise StudyError(
                f'arm {name!r} has the task {tasks[1]!r} and {study.baseline.name!r} {tasks[0]!r}, '
                f'so that their {study.metric} are different things; give all arms the same '
                'task.kind.'
            )
    return facts


def reach(study: Study, facts: Mapping[str, Facts], probes: Sequence[Cell]) -> None:
    """Checks budgets whose steps only running tells, by what short runs of the baseline spent.

    An arm's step is taken to cost as much more as it has more model FLOPs.

    Args:
      study: the study.
      facts: of each arm, from `examine`.
      probes: finished runs of the baseline; without any nothing is checked.

    Raises:
      StudyError: an arm that would make too few steps.
    """
    first = facts[study.baseline.name]
    spent = [(c.costs.get(study.axis), c.costs.get('steps')) for c in probes if c.status == 'done']
    rates = [steps / amount for amount, steps in spent if amount and steps]
    if not rates or first.steps is not None:
        return
    for arm in study.arms:
        dearer = facts[arm.name].step_flops / first.step_flops
        steps = study.budget * statistics.median(rates) / dearer
        _check_steps(study, arm.name, steps, about=True)


def _check_steps(study: Study, arm: str, steps: float, *, about: bool = False) -> None:
    """Checks that an arm's shortest run has enough steps, given those at the full budget."""
    least = min(study.fractions[0], study.tune_fraction if study.tune_key else 1.0)
    if steps * least < study.least_steps:
        raise StudyError(
            f'arm {arm!r} cannot reach the budget: {study.budget:g} {AXES[study.axis][1]} are '
            f'{"about " if about else ""}{round(steps)} of its steps '
            f'({max(0, round(steps * least))} in the shortest run), and every run needs at least '
            f'{study.least_steps}; raise --budget, make its step smaller, or allow fewer with '
            '--least_steps.'
        )


def batched(study: Study, facts: dict[str, Facts]) -> bool:
    """Whether runs share a compiled step; see `Study.batched`."""
    if study.axis in ('seconds', 'joules'):
        if study.batched:
            raise StudyError(
                f'batched runs share the clock, so that a budget in {AXES[study.axis][1]} means '
                'nothing for one of them; use --batched=no.'
            )
        return False
    obstacle = _obstacle(study, facts)
    if study.batched and obstacle:
        raise StudyError(f'{obstacle}; use --batched=no.')
    if study.batched is not None:
        return study.batched
    lanes = max(len(study.seeds), len(study.grid) * study.tune_seeds)
    small = all(f.params * lanes <= BATCHED_PARAMS for f in facts.values())
    return small and not obstacle


def _obstacle(study: Study, facts: dict[str, Facts]) -> str:
    """Returns why the runs of an arm cannot share a compiled step, '' if they can."""
    if study.tune_key and study.tune_key.partition('.')[0] not in VARYING:
        return (
            f'batched runs may differ in {", ".join(VARYING)} only, and tuning varies '
            f'{study.tune_key}'
        )
    for name, fact in facts.items():
        config = fact.resolved
        if any(size not in (-1, 1) for size in config['mesh'].values()):
            return f'arm {name!r}: batched runs share one device, but config.mesh spans several'
        blocks = [config, *config['stages']]
        if any(block.get('init_from') for block in blocks):
            return f'arm {name!r}: batched runs begin from fresh values, not from init_from'
        if any(block.get('until') for block in blocks):
            return f"arm {name!r}: until ends a stage by its own run's loss"
        if config['log']['wandb']:
            return f'arm {name!r}: config.log.wandb follows one run at a time'
    return ''


def _arm(study: Study, arm: Arm) -> Facts:
    job = plan.final(study, arm, {})[-1].jobs[0]
    try:
        check_form(job.config)
        setup.check(job.config)
        runtime = Runtime(job.config)
        if arm.source_run and runtime.source is not None and runtime.source.charge:
            raise StudyError(
                f'its source_run {arm.source_run!r} is charged in a column of its own, and '
                'init_from.charge pays for it in the budget too; set charge to False.'
            )
        digest = _evaluation(study, runtime)
        _check_tuning(study, arm)
        steps = _steps(study, runtime)
        for stage in runtime.stages:
            runtime.sampler(stage)  # refuses data that do not fill one row
    except EffjaxError as e:
        raise StudyError(f'arm {arm.name!r}: {e}') from e
    for stage in runtime.stages:
        _check_decay(arm, stage.config['schedule'], last=stage is runtime.stages[-1])
    stage = runtime.stages[0]
    flops = runtime.step_flops(stage)
    if steps is not None:
        _check_steps(study, arm.name, steps)
    elif study.axis == 'hardware_flops' and len(runtime.stages) == 1:
        # What a step executes is known when it is compiled; that it is about what it asks for, now.
        _check_steps(study, arm.name, study.budget / flops, about=True)
    return Facts(
        params=runtime.params,
        step_flops=float(flops),
        steps=steps,
        evaluation=digest,
        data=as_dict(runtime.dataset.info.description),
        resolved=as_dict(runtime.config),
        inputs=_inputs(study, runtime, digest),
    )


def _inputs(study: Study, runtime: Runtime, evaluation: str) -> dict[str, str]:
    found = {'data': runtime.data_digest, f'evaluation {evaluation_of(study)}': evaluation}
    found |= _others(runtime)
    if runtime.config['reference']:
        table = pathlib.Path(runtime.config['reference']).read_bytes()
        found['reference'] = hashlib.sha256(table).hexdigest()[:16]
    return found


def _others(runtime: Runtime) -> dict[str, str]:
    """Returns digests of the checkpoints that an arm's runs begin from, or are taught by."""
    runs = {}
    if runtime.source is not None:
        runs['init_from'] = (runtime.source.folder, runtime.source.step)
    block = teacher.block_of(runtime.config)
    if block is not None:
        runs['teacher'] = (pathlib.Path(block['run']), block['step'])
    return {
        name: checkpoints.digest(folder / 'checkpoints', step)
        for name, (folder, step) in runs.items()
    }


def evaluation_of(study: Study) -> str:
    """Returns the name of the evaluation that a study's metric is taken on."""
    return study.metric.partition('.')[0]


def _check_tuning(study: Study, arm: Arm) -> None:
    """Checks each value of an arm's grid before the first of its runs."""
    for value in study.grid_of(arm):
        config = plan.arm_config(study, arm, [f'{study.tune_key}={value!r}'])
        try:
            setup.check(config)
        except EffjaxError as e:
            raise StudyError(f'with {study.tune_key}={value:g} of its grid: {e}') from e


def _check_metric(study: Study, runtime: Runtime, evaluation: Any) -> None:
    """Checks that the evaluation gives the study's metric, by tracing it."""
    batch = next(iter(evaluation.source))
    state = runtime.abstract
    with parallel.mesh_context(runtime.mesh, runtime.rules):
        sums = jax.eval_shape(runtime.raw_eval_step(), state['params'], state['buffers'], batch)
    known = runtime.task.metrics(dict.fromkeys(sums, (1.0, 1.0)), evaluation.source)
    key = study.metric.partition('.')[2]
    if key not in known:
        raise StudyError(
            f'evaluation {evaluation.name!r} has no metric {key!r}; it gives {", ".join(known)}.'
            + suggest(key, known)
        )
    if study.lower_is_better is None and direction(study.metric) is None:
        raise StudyError(
            f'whether less or more of {study.metric!r} is better is not known; say '
            'lower_is_better=True or False in the study file.'
        )


def _check_decay(arm: Arm, block: dict[str, Any], *, last: bool) -> None:
    schedule = schedules.build(block)
    if last and schedule(1.0) > 0.01 * schedule.peak:
        raise StudyError(
            f'arm {arm.name!r}: its schedule ends at {schedule(1.0) / schedule.peak:.0%} of its '
            'peak, and runs that are not decayed to zero at the budget cannot be compared; set '
            'schedule.final=0, or another kind (linear, cosine, wsd).'
        )


def _steps(study: Study, runtime: Runtime) -> int | None:
    """Steps at the full budget where a step's size is known beforehand (one stage)."""
    if study.axis == 'joules' and EnergyMeter().joules() is None:
        raise StudyError(
            'a budget in joules needs a meter, and nothing measures energy here (it takes an '
            'NVIDIA GPU and the nvidia-ml-py package); count flops, seconds or tokens instead.'
        )
    stage = runtime.stages[0]
    changes = runtime.task_at((1.0, 1.0)) is not runtime.task_at((0.0, 0.0))
    if len(runtime.stages) > 1 or changes or study.axis in ('seconds', 'joules', 'hardware_flops'):
        return None
    size = stage.config['batch_size']
    examples, tokens = runtime.task.units(size, stage.config['seq_len'])
    sizes: dict[str, float | None] = {
        'steps': 1.0,
        'tokens': tokens,
        'examples': examples,
        'model_flops': runtime.step_flops(stage),
    }
    if study.axis == 'reference_seconds':
        sizes['reference_seconds'] = reference_seconds(stage.config)
        if sizes['reference_seconds'] is None:
            raise StudyError(
                'a budget in reference time needs config.reference, a table made by `python -m '
                'effjax.calibrate`.'
            )
    one = sizes[study.axis]
    left = study.budget - (teacher.spent(runtime.config, study.axis) or 0.0)
    if runtime.source is not None and runtime.source.charge:
        left -= runtime.source.used(study.axis)
    return round(left / one) if one else 0


def _evaluation(study: Study, runtime: Runtime) -> str:
    """Returns a digest of every batch of the metric's evaluation."""
    name = study.metric.partition('.')[0]
    found = {e.name: e for e in runtime.evaluations(runtime.stages[-1])}
    if name not in found:
        raise StudyError(
            f'there is no evaluation {name!r} for the metric {study.metric!r}; the config has '
            f'{", ".join(found) or "none"}: set config.evals.{name}.'
        )
    _check_metric(study, runtime, found[name])
    digest = hashlib.sha256()
    for batch in found[name].source:
        for key in sorted(batch):
            digest.update(key.encode())
            digest.update(np.ascontiguousarray(batch[key]).tobytes())
    return digest.hexdigest()[:16]
