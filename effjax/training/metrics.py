"""Where a run's numbers go: `metrics.jsonl` always, tensorboard beside it, wandb if asked for.

`metrics.jsonl` holds one JSON object a step, in order, each step once however often the run was
interrupted. Numbers that are not finite are written as null (JSON has no NaN). Only process 0
writes.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from effjax.core.config import as_dict
from effjax.core.errors import ConfigError
from effjax.training.files import plain, write_json_atomic

__all__ = ['FILE', 'MetricsWriter', 'drop_after', 'last_row', 'write_json_atomic']

FILE = 'metrics.jsonl'


class MetricsWriter:
    """Writes one mapping of scalars a step.

    Lines are kept in memory and written every `flush_seconds`, so flush before saving a
    checkpoint: then the file holds every step that the checkpoint has seen.

    Args:
      workdir: the run's folder, made if need be.
      resume_step: the step of the restored checkpoint, 0 for a fresh start; what was written for
        later steps is dropped.
      tensorboard: also write event files into `workdir/tensorboard`.
      wandb: project name at Weights & Biases; '' for none.
      config: the resolved config, shown by wandb.
      flush_seconds: most seconds that a line waits in memory while lines keep coming.

    Raises:
      ConfigError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        resume_step: int = 0,
        tensorboard: bool = True,
        wandb: str = '',
        config: Mapping[str, Any] | None = None,
        flush_seconds: float = 5.0,
    ):
        self._lines: list[str] = []
        self._warned = False
        self._file = self._events = self._run = None
        self._flush_seconds = flush_seconds
        self._flushed = time.monotonic()
        if jax.process_index() != 0:
            return
        workdir = pathlib.Path(workdir)
        if wandb:
            self._run = _open_wandb(workdir, wandb, config or {})
        workdir.mkdir(parents=True, exist_ok=True)
        drop_after(workdir / FILE, resume_step)
        self._file = (workdir / FILE).open('a', encoding='utf-8')
        if tensorboard:
            self._events = _Events(workdir / 'tensorboard', resume_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Takes one step's values; `row['step']` is the step they belong to.

        Values are numbers, text or what `files.plain` takes. Tensorboard gets the finite numbers.
        """
        if self._file is None:
            return
        row = plain(row)
        self._lines.append(json.dumps(row, allow_nan=False) + '\n')
        if self._events is not None:
            self._events.write(row)
        if self._run is not None:
            self._run.log(row, step=row['step'])
        if time.monotonic() - self._flushed >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what is still in memory to the files."""
        self._flushed = time.monotonic()
        if self._file is None:
            return
        lines, self._lines = ''.join(self._lines), []
        # A full disk must not end the training: what was written stays in the file's buffer and
        # is tried again with the next flush.
        try:
            self._file.write(lines)
            self._file.flush()
            if self._events is not None:
                self._events.flush()
        except OSError as e:
            if not self._warned:
                print(f'warning: metrics cannot be written ({e.strerror}).', file=sys.stderr)
            self._warned = True

    def close(self) -> None:
        """Flushes and closes; may be called twice."""
        if self._file is None:
            return
        self.flush()
        with contextlib.suppress(OSError):  # said in `flush`
            self._file.close()
            if self._events is not None:
                self._events.close()
        if self._run is not None:
            self._run.finish()
        self._file = self._events = self._run = None


def drop_after(path: pathlib.Path, step: int) -> None:
    """Drops, atomically, the lines of later steps and a line that was only half written."""
    if not path.exists():
        return
    temporary = path.with_name(f'.{path.name}.tmp')
    with path.open('rb') as old, temporary.open('wb') as new:
        for line in old:
            if _step_of(line) <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)


def last_row(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns the last whole line of a metrics file, or None where there is none."""
    last = None
    if path.exists():
        with path.open('rb') as f:
            for line in f:
                if _step_of(line) < float('inf'):
                    last = line
    return json.loads(last) if last else None


def _step_of(line: bytes) -> float:
    """Returns the step of a line, infinity where it is not a whole JSON object with one."""
    try:
        row = json.loads(line) if line.endswith(b'\n') else None
    except ValueError:
        row = None
    step = row.get('step') if isinstance(row, dict) else None
    return step if isinstance(step, int) else float('inf')


class _Events:
    """Tensorboard event files: one event a step, with all its scalars."""

    def __init__(self, folder: pathlib.Path, resume_step: int):
        # Imported here: it takes a third of a second, and not every run wants it.
        from tensorboardX import SummaryWriter
        from tensorboardX.proto.summary_pb2 import Summary

        # purge_step hides what an interrupted run had written for later steps.
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge)
        self._summary = Summary

    def write(self, row: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != 'step'
        ]
        # One event for all scalars: add_scalar would write (and queue) one for each.
        self._writer.file_writer.add_summary(self._summary(value=values), row['step'])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _open_wandb(workdir: pathlib.Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        wandb = importlib.import_module('wandb')
    except ImportError as e:
        raise ConfigError(
            "config.log.wandb needs the wandb package: pip install 'effjax[wandb]', or leave "
            "config.log.wandb ''."
        ) from e
    workdir.mkdir(parents=True, exist_ok=True)
    # The same folder is the same run at wandb, so that a resumed run goes on in its own curve.
    identity = hashlib.blake2b(str(workdir.resolve()).encode(), digest_size=8).hexdigest()
    return wandb.init(
        project=project,
        name=workdir.name,
        id=identity,
        resume='allow',
        dir=str(workdir),
        config=as_dict(config),
    )
