"""A study as data: arms that differ in config, budget, seeds, metric, margin, tuning grid.

A study file, `experiments/<name>/study.py`, defines `get_study() -> Study`; `python -m
effjax.compare` also makes one from a baseline and its changes.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import math
import pathlib
import re
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from effjax.core import config as config_lib
from effjax.core.errors import ConfigError, EffjaxError, StudyError
from effjax.core.registry import suggest

# Budget axis -> (unit in config.budget, words). The ledger has a column of the same name.
AXES = {
    'model_flops': ('flops', 'model FLOPs'),
    'hardware_flops': ('hwflops', 'hardware FLOPs'),
    'tokens': ('tokens', 'tokens'),
    'examples': ('examples', 'examples'),
    'steps': ('steps', 'steps'),
    'reference_seconds': ('ref_s', 'reference time'),
    'seconds': ('s', 'training time'),
    'joules': ('J', 'energy'),
}
# The tasks' metrics by their last word: whether less of it is better.
_LOWER_IS_BETTER = {'loss': True, 'perplexity': True, 'bits_per_byte': True, 'accuracy': False}
FRACTIONS = (0.6, 0.75, 0.9, 1.0)  # of the budget; each run decays its own schedule to zero
# What a study sets in every run's config, and what says it instead.
_OWN = {
    'steps': 'the budget (--budget)',
    'budget': 'the budget (--budget)',
    'seed': 'the seeds (--seeds)',
    'init_seed': 'the seeds (--seeds), or init_offset of an arm in a study file',
}
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.+-]*')


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
      name: unique within the study; a folder's name.
      overrides: 'a.b=c' over the study's config; a tuple, in order.
      config: a config file of its own in place of the study's; '' takes the study's.
      method: the technique's id in `python -m effjax.methods`, for its card; '' for none.
      grid: values of the study's tuned key for this arm, as many as the study's; () takes those.
      init_offset: added to the seed of the initial values alone: with 0 the arms start equal.
      source_run: folder of a finished run whose model this arm reuses; its cost is charged in a
        column of its own.
    """

    name: str
    overrides: tuple[str, ...] = ()
    config: str = ''
    method: str = ''
    grid: tuple[float, ...] = ()
    init_offset: int = 0
    source_run: str = ''


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Attributes:
      name: the study's name; a folder's name.
      config: the config file (with `:variant`) that the arms change.
      arms: the first is the baseline.
      axis: what the budget counts, a key of `AXES`.
      budget: how much of it each run gets.
      seeds: one run of each arm for each; equal seeds share data order, evaluation batches and,
        where shapes match, initial values.
      metric: 'EVALUATION.METRIC', such as 'valid.loss', at the end of the run.
      lower_is_better: the metric's direction; None takes what its name tells (`direction`).
      margin: differences within plus or minus this do not matter; fixed before the runs. 0 means
        that no difference is too small, and then nothing is ever called equivalent.
      fractions: shares of the budget at which every arm is run, each with its own schedule
        decayed at its end; the last is 1. (1.0,) answers 'better at equal budget?' alone, more
        also 'how much budget for equal quality?'.
      tune_key: the config key that is tuned; '' tunes nothing, which the report says.
      grid: its values, at least three, ascending; every arm tries equally many.
      tune_fraction: share of the budget that a tuning run gets.
      tune_seeds: how many runs each value gets.
      least_steps: steps that the shortest run must have; of fewer, the schedule and the last step
        decide more than the arm does.
      overrides: 'a.b=c' for all arms.
      batched: whether the runs of one arm and budget share a compiled step by `vmap`: True, False,
        or None to choose by size.
      question: what it settles, in a sentence.
      scale: the workload in words; '' lets it be described by its numbers.
    """

    name: str
    config: str
    arms: tuple[Arm, ...]
    axis: str = 'model_flops'
    budget: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: str = 'valid.loss'
    lower_is_better: bool | None = None
    margin: float = 0.0
    fractions: tuple[float, ...] = FRACTIONS
    tune_key: str = 'schedule.peak'
    grid: tuple[float, ...] = ()
    tune_fraction: float = 0.25
    tune_seeds: int = 1
    least_steps: int = 50
    overrides: tuple[str, ...] = ()
    batched: bool | None = None
    question: str = ''
    scale: str = ''

    @property
    def baseline(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def minimised(self) -> bool:
        """Whether less of the metric is better."""
        told = direction(self.metric) if self.lower_is_better is None else self.lower_is_better
        return told is not False

    def arm(self, name: str) -> Arm:
        """Returns an arm by name."""
        return next(a for a in self.arms if a.name == name)

    def grid_of(self, arm: Arm) -> tuple[float, ...]:
        """Returns the values of the tuned key that an arm tries; () where nothing is tuned."""
        return (arm.grid or self.grid) if self.tune_key else ()


def check(study: Study) -> None:
    """Checks a study's form; what its configs hold is checked by `study.preflight`.

    Raises:
      StudyError: in one sentence, what is wrong and what to do.
    """
    _check_types(study)
    if study.axis not in AXES:
        raise StudyError(f'no budget axis {study.axis!r}.' + suggest(study.axis, AXES))
    if not study.budget > 0:
        raise StudyError(f'the budget must be positive, got {study.budget:g}; give --budget.')
    if len(study.arms) < 2:
        raise StudyError('a study needs a baseline and at least one change; give --change.')
    _check_names(study)
    _check_overrides(study)
    if len(set(study.seeds)) != len(study.seeds):
        raise StudyError(f'seeds must differ, got {list(study.seeds)}.')
    if len(study.seeds) < 2:
        raise StudyError(
            'one seed has no interval, so that nothing could be told from noise; give at least 2 '
            'seeds (--seeds=3).'
        )
    if not 0 <= study.margin < math.inf:
        raise StudyError(f'the margin must be a number from 0 on, got {study.margin:g}.')
    if len(study.metric.split('.')) != 2:
        raise StudyError(
            f"the metric must be EVALUATION.METRIC, such as 'valid.loss', got {study.metric!r}."
        )
    _check_direction(study)
    _check_fractions(study)
    if study.tune_key:
        _check_grids(study)


def load(path: str) -> Study:
    """Loads a study file, or the `study.py` of a folder.

    Raises:
      StudyError: no such file, one without `get_study`, one that raises (told with its line), or
        one that makes no study.
    """
    file = pathlib.Path(path)
    file = file / 'study.py' if file.is_dir() else file
    if not file.is_file():
        near = [p.parent.as_posix() for p in pathlib.Path('experiments').glob('*/study.py')]
        raise StudyError(f'no study {path!r}.' + suggest(path, near))
    module_spec = importlib.util.spec_from_file_location(f'effjax_study_{file.parent.name}', file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    with _told_by_line(file):
        module_spec.loader.exec_module(module)
    if not hasattr(module, 'get_study'):
        raise StudyError(f'{file} has no function get_study().')
    with _told_by_line(file):
        study = module.get_study()
    if not isinstance(study, Study):
        raise StudyError(
            f'{file}: get_study() returned a {type(study).__name__}; return an '
            'effjax.study.spec.Study.'
        )
    check(study)
    return study


@contextlib.contextmanager
def _told_by_line(file: pathlib.Path) -> Iterator[None]:
    """Turns whatever a study file raises into one sentence with the line that raised it."""
    try:
        yield
    except EffjaxError:
        raise
    except Exception as e:
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(file)]
        line = e.lineno if isinstance(e, SyntaxError) else (lines or [None])[-1]
        told = e.msg if isinstance(e, SyntaxError) else str(e)
        raise StudyError(
            f'{file}{f", line {line}" if line else ""} cannot be loaded: {type(e).__name__}: '
            f'{" ".join(told.split()).rstrip(".")}; mend that line.'
        ) from e


def split_change(text: str) -> tuple[str, ...]:
    """Splits 'a.b=c d.e={...}' at the blanks that stand before a key; one change is one arm.

    Blanks within quotes or brackets belong to a value.

    Raises:
      StudyError: no `=` in it, or a quote or bracket that does not close.
    """
    text = text.strip()
    starts = [0, *_keys_after_blanks(text)]
    ends = (*starts[1:], len(text))
    parts = tuple(text[a:b].strip() for a, b in zip(starts, ends, strict=True))
    for part in parts:
        if '=' not in part:
            raise StudyError(f'change {part!r} has no value; write --change KEY=VALUE.')
    return parts


def _keys_after_blanks(text: str) -> list[int]:
    """Returns the blanks, outside of quotes and brackets, that a 'key=' follows."""
    found, quote, depth = [], '', 0
    for i, sign in enumerate(text):
        if quote:
            quote = '' if sign == quote else quote
        elif sign in '\'"' and text[i - 1 : i] in tuple('=([{,: '):  # not the one of "it's"
            quote = sign
        elif sign in '([{':
            depth += 1
        elif sign in ')]}':
            depth -= 1
        elif not depth and re.match(r'\s[A-Za-z_][\w.]*=', text[i:]):
            found.append(i)
    if quote or depth:
        what = f'quote {quote}' if quote else 'bracket'
        raise StudyError(f'change {text!r} has a {what} without its other half; close it.')
    return found


def arm_name(overrides: Sequence[str]) -> str:
    """Returns a name for a change: 'model.ffn.kind=gelu' is 'ffn.kind-gelu'."""
    words = ['-'.join(o.removeprefix('model.').split('=', 1)) for o in overrides]
    name = re.sub(r'[^A-Za-z0-9_.+-]+', '_', '+'.join(words)).strip('_.+-')
    return shortened(name, 60) or 'changed'


def shortened(name: str, most: int) -> str:
    """Returns a name of at most so many characters; two that are cut stay different."""
    if len(name) <= most:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f'{name[: most - 9].rstrip("_.+-")}-{digest}'


def direction(metric: str) -> bool | None:
    """Returns whether less of 'EVALUATION.METRIC' is better, None where its name does not tell."""
    key = metric.partition('.')[2]
    return next((v for k, v in _LOWER_IS_BETTER.items() if f'_{key}'.endswith(f'_{k}')), None)


def parse_budget(text: str) -> tuple[str, float]:
    """Returns (axis, amount) of '20m', '1e9tokens', '3e16flops', '10ref_m', ...

    Raises:
      StudyError: not a number with a unit.
    """
    try:
        return config_lib.parse_budget(text)
    except ConfigError as e:
        raise StudyError(str(e)) from e


def to_json(study: Study) -> dict[str, Any]:
    """Returns a study as plain dicts and lists."""
    return config_lib.as_dict(dataclasses.asdict(study))


def from_json(saved: dict[str, Any]) -> Study:
    """Returns the study that `to_json` saved."""
    arms = tuple(Arm(**_tuples(arm)) for arm in saved['arms'])
    return Study(**{**_tuples(saved), 'arms': arms})


def _tuples(saved: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


def _check_types(study: Study) -> None:
    """Checks what Python would take apart letter by letter, or not at all."""
    for arm in study.arms:
        if not isinstance(arm, Arm):
            raise StudyError(f"an arm must be an effjax.study.spec.Arm, got {arm!r}; Arm('name').")
    sides = [
        ('the study', study.overrides),
        *((f'arm {a.name!r}', a.overrides) for a in study.arms),
    ]
    for who, given in sides:
        if isinstance(given, str) or not all(isinstance(o, str) for o in given):
            raise StudyError(
                f"the overrides of {who} must be a tuple of 'KEY=VALUE', got {given!r}; write "
                f'({given!r},).'
                if isinstance(given, str)
                else f"the overrides of {who} must be a tuple of 'KEY=VALUE', got {given!r}."
            )
    for what in ('seeds', 'fractions', 'grid'):
        given = getattr(study, what)
        if not isinstance(given, tuple | list):
            raise StudyError(f'{what} of a study must be a tuple of numbers, got {given!r}.')


def _check_names(study: Study) -> None:
    names = [arm.name for arm in study.arms]
    for name in (study.name, *names):
        if not _NAME.fullmatch(name):
            raise StudyError(
                f'{name!r} cannot name a study or an arm: letters, digits, . _ + and - only.'
            )
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice:
        raise StudyError(f'two arms are called {twice!r}; give each a name of its own.')


def _check_overrides(study: Study) -> None:
    sides = [
        ('the study', study.overrides),
        *((f'arm {a.name!r}', a.overrides) for a in study.arms),
    ]
    for who, overrides in sides:
        for key in (override.partition('=')[0].strip() for override in overrides):
            if key in _OWN:
                raise StudyError(
                    f'{who} sets config.{key}, which a study sets for each of its runs; give '
                    f'{_OWN[key]} instead.'
                )


def _check_direction(study: Study) -> None:
    told, given = direction(study.metric), study.lower_is_better
    if told is not None and given is not None and told != given:
        better = 'less' if told else 'more'
        raise StudyError(
            f'the study says lower_is_better={given}, but of {study.metric!r} {better} is better; '
            'leave lower_is_better out.'
        )


def _check_fractions(study: Study) -> None:
    f = study.fractions
    if not f or f[-1] != 1.0 or list(f) != sorted(set(f)) or f[0] <= 0:
        raise StudyError(f'fractions must rise to 1 from above 0, got {list(f)}.')
    if study.least_steps < 1:
        raise StudyError(f'least_steps must be at least 1, got {study.least_steps}.')
    if not 0 < study.tune_fraction <= 1:
        raise StudyError(f'tune_fraction must be in (0, 1], got {study.tune_fraction:g}.')


def _check_grids(study: Study) -> None:
    if study.tune_seeds < 1:
        raise StudyError(f'tune_seeds must be at least 1, got {study.tune_seeds}.')
    size = len(study.grid)
    if size < 3:
        raise StudyError(
            f'the tuning grid of {study.tune_key} needs at least 3 values, so that a winner can '
            f'lie inside it, got {list(study.grid)}; give --grid, or --tune_key= to tune nothing.'
        )
    for arm in study.arms:
        grid = study.grid_of(arm)
        if len(grid) != size:
            raise StudyError(
                f'arm {arm.name!r} would tune over {len(grid)} values and the study over {size}; '
                'every arm gets equally many.'
            )
        if list(grid) != sorted(set(grid)):
            raise StudyError(f'the grid of arm {arm.name!r} must ascend, got {list(grid)}.')
