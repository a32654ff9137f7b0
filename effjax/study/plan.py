"""From a study to its runs: which there are, the config and folder of each, and what shares a step.

Runs of one arm, phase and share of the budget form a `Group`: they differ in seed and learning
rate only, so that they may share one compiled step.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from effjax.core.config import as_dict, load
from effjax.core.errors import ConfigError, StudyError
from effjax.study.spec import AXES, Arm, Study

TUNE_SEED = 1_000_003  # tuning draws other data and values than the runs that are judged
PROBE_SEED = 2_000_003
PROBE_FRACTION = 0.05
PROBES = 3

# What decides a run's numbers: the code digest covers these packages and no others.
_CODE = (
    'core', 'kernels', 'precision', 'parallel', 'layers', 'reduce', 'models', 'tasks', 'growth',
    'data', 'costs', 'training',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run that a study asks for.

    Attributes:
      arm, phase, seed, fraction, settings: as `records.Cell`.
      config: the complete config, as plain dicts.
      folder: of the run, relative to the study's.
    """

    arm: str
    phase: str
    seed: int
    fraction: float
    settings: dict[str, Any]
    config: dict[str, Any]
    folder: str

    @property
    def trained(self) -> dict[str, Any]:
        """The config that is run: what is not judged is evaluated at its end alone."""
        if self.phase == 'final':
            return self.config
        once = {'every_steps': 0, 'every_share': 0.0}
        return {**self.config, 'evals': {k: {**v, **once} for k, v in self.config['evals'].items()}}

    @property
    def digest(self) -> str:
        """Names the config; a stored result of another digest is not this run's."""
        text = json.dumps(identity(self.config), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Group:
    """Jobs that may share one compiled step, in order."""

    name: str
    jobs: tuple[Job, ...]


def arm_config(study: Study, arm: Arm, extra: Iterable[str] = ()) -> dict[str, Any]:
    """Returns an arm's config, complete but for budget and seed.

    Evaluations that do not say their batch size get that of the baseline's, so that an arm with
    another batch size is judged on the same batches.

    Raises:
      StudyError: the arm's config cannot be loaded; names the arm.
    """
    config = _load(study, arm, extra)
    size = _batch_sizes(_load(study, study.baseline))[-1]
    if set(_batch_sizes(config)) != {size}:
        config['evals'] = {
            name: block
            if not isinstance(block, Mapping) or block.get('batch_size')
            else {**block, 'batch_size': size}
            for name, block in config['evals'].items()
        }
    return config


def _load(study: Study, arm: Arm, extra: Iterable[str] = ()) -> dict[str, Any]:
    overrides = [*study.overrides, *arm.overrides, *extra]
    try:
        return as_dict(load(arm.config or study.config, overrides))
    except ConfigError as e:
        raise StudyError(f'arm {arm.name!r}: {e}') from e


def _batch_sizes(config: Mapping[str, Any]) -> list[int]:
    """Returns the training batch size of each stage; what is no block is refused elsewhere."""
    whole, stages = config['batch_size'], [s for s in config['stages'] if isinstance(s, Mapping)]
    return [stage.get('batch_size', whole) for stage in stages] or [whole]


def tuning(study: Study) -> list[Group]:
    """Returns the tuning runs, a group an arm; none where nothing is tuned."""
    if not study.tune_key:
        return []
    groups = []
    for arm in study.arms:
        jobs = [
            _job(study, arm, 'tune', TUNE_SEED + i, study.tune_fraction, {study.tune_key: value})
            for value in study.grid_of(arm)
            for i in range(study.tune_seeds)
        ]
        groups.append(Group(f'{arm.name} tune', tuple(jobs)))
    return groups


def final(study: Study, arm: Arm, settings: Mapping[str, Any]) -> list[Group]:
    """Returns an arm's judged runs with its chosen settings, a group a share of the budget."""
    return [
        Group(
            f'{arm.name} {fraction:.0%}',
            tuple(_job(study, arm, 'final', s, fraction, dict(settings)) for s in study.seeds),
        )
        for fraction in study.fractions
    ]


def probes(study: Study) -> Group:
    """Returns short runs of the baseline, for its speed and its noise before the study starts."""
    jobs = [
        _job(study, study.baseline, 'probe', PROBE_SEED + i, PROBE_FRACTION, {})
        for i in range(PROBES)
    ]
    return Group(f'{study.baseline.name} probe', tuple(jobs))


def code_version() -> str:
    """Returns a digest of the code that decides a run's numbers."""
    root = pathlib.Path(__file__).parents[1]
    digest = hashlib.sha256()
    for package in _CODE:
        for file in sorted((root / package).rglob('*.py')):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _job(
    study: Study, arm: Arm, phase: str, seed: int, fraction: float, settings: dict[str, Any]
) -> Job:
    config = arm_config(study, arm, [f'{k}={v!r}' for k, v in settings.items()])
    every = config['log']['every_steps']
    rows = 20 if every == 1 else every  # many runs: the default would fill the disk
    config |= {
        'steps': 0,
        'budget': f'{study.budget * fraction!r}{AXES[study.axis][0]}',
        'seed': seed,
        'init_seed': seed + arm.init_offset if arm.init_offset else -1,
        'name': f'{arm.name}-{phase}',
        'log': {**config['log'], 'progress': False, 'tensorboard': False, 'every_steps': rows},
        'finish': {**config['finish'], 'gzip': False, 'sample_tokens': 0},
        'checkpoint': {**config['checkpoint'], 'keep': 1},
    }
    if study.axis == 'steps':
        config |= {'steps': max(1, round(study.budget * fraction)), 'budget': ''}
    if not (config['checkpoint']['every_steps'] or config['checkpoint']['every_seconds']):
        config['checkpoint']['every_seconds'] = 120.0
    named = '-'.join(f'{k.rsplit(".", 1)[-1]}{v:g}' for k, v in settings.items())
    parts = [arm.name, phase, f'{fraction:g}', *([named] if named else []), f'seed_{seed}']
    return Job(arm.name, phase, seed, fraction, settings, config, '/'.join(['runs', *parts]))


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what makes a run's numbers: not its name, logging, checkpoints or parallel layout."""
    left_out = ('name', 'log', 'checkpoint', 'finish', 'mesh', 'sharding')
    return {k: v for k, v in config.items() if k not in left_out}
