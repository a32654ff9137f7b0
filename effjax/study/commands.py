"""Exact commands: what makes a study again, what trains one arm alone; no folders of a machine."""

import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from effjax.core.config import as_dict, load
from effjax.study import plan
from effjax.study.spec import Study

# What is said of one call and not of the study.
_OF_A_CALL = ('--report_only', '--retry_failed', '--traceback', '--any_code')
_PATH = re.compile(r'(?<![\w.~:/)+*\\-])/(?:[\w.+@~-]+/)*[\w.+@~-]+')


def noted(argv: Sequence[str]) -> str:
    """Returns the command that makes a study again, of one that may ask for more than that."""
    kept, skip = [], False
    for arg in argv:
        if not (skip or arg in _OF_A_CALL or arg.partition('=')[0] == '--publish'):
            kept.append(arg)
        skip = arg == '--publish'
    return _line('python -m effjax.compare', kept)


def of_arm(study: Study, job: plan.Job) -> str:
    """Returns the command that trains one run of an arm by itself, with the same numbers.

    Args:
      study: the study.
      job: the run.
    """
    arm = study.arm(job.arm)
    file = arm.config or study.config
    given = [*study.overrides, *arm.overrides, *(f'{k}={v!r}' for k, v in job.settings.items())]
    base = as_dict(load(file, given))
    # What the study sets beyond that: budget, seeds, and evaluations on the baseline's batches.
    sets = {k: v for k, v in plan.identity(job.config).items() if base.get(k) != v or k == 'seed'}
    given += [f'{k}={v}' if isinstance(v, str) else f'{k}={v!r}' for k, v in sets.items()]
    return _line('python -m effjax.train', [f'--config={file}', *(f'--config.{g}' for g in given)])


def shown(value: Any) -> Any:
    """Returns plain data without the folders of the machine that made it.

    A path below the current folder becomes relative, of any other absolute one the name stays.
    """
    if isinstance(value, str):
        here = re.escape(pathlib.Path.cwd().as_posix())
        text = re.sub(rf'(?<![\w./-]){here}/', '', value)
        return _PATH.sub(lambda found: os.path.basename(found.group()), text)
    if isinstance(value, Mapping):
        return {key: shown(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [shown(inner) for inner in value]
    return value


def _line(command: str, words: Sequence[str]) -> str:
    return ' '.join([command, *map(_quoted, words)])


def _quoted(word: str) -> str:
    """Returns a word as a shell takes it; of two ways the one that a person can read."""
    if "'" in word and not set(word) & set('"$`\\!'):
        return f'"{word}"'
    return shlex.quote(word)
