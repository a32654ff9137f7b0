"""Checkpoints: orbax, in the background, atomic, and checked byte by byte before they are used.

A checkpoint is the folder `<folder>/<step>` with three orbax items: `manifest` (JSON, read first),
`state` (arrays) and `extra` (JSON: ledger, clock, data position). Orbax renames it into place when
all processes are done; then process 0 writes `checksums.json` into it. Only with that file does
the checkpoint exist for effjax, and only then are older ones deleted: a kill at any moment leaves
the one before. The folder must be one that all processes see.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import shutil
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from effjax.core import trees
from effjax.core.errors import CheckpointError
from effjax.training import checksums
from effjax.training import manifest as manifest_lib
from effjax.training.signals import agree


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read.

    Attributes:
      step: its step.
      state: arrays in the shardings asked for.
      manifest: as saved, with `step` and `state` (shape and dtype by path) added.
      extra: as saved.
      skipped: one phrase for each newer checkpoint that could not be used, with the reason.
    """

    step: int
    state: Any
    manifest: dict[str, Any]
    extra: dict[str, Any]
    skipped: list[str]


class Checkpointer:
    """Saves and restores the train state of one run.

    In a run of several processes all of them call the same methods at the same steps. Nothing is
    written before the first `save`, so that reading a folder never changes it.

    Args:
      folder: the run's `checkpoints` folder.
      keep: how many valid checkpoints stay; room for one more is needed while saving.
      background: write while training goes on; only the copy to the host is waited for.
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int = 2, background: bool = True):
        self.folder = pathlib.Path(folder).absolute()
        self._keep = keep
        self._background = background
        self._manager: ocp.CheckpointManager | None = None
        self._writer: threading.Thread | None = None
        self._saving: int | None = None  # the step that is being written
        self._error: Exception | None = None  # of the save that is being written
        self._damaged: set[int] = set()  # found by `restore`

    def save(
        self,
        step: int,
        state: Any,
        *,
        manifest: Mapping[str, Any],
        extra: Mapping[str, Any],
        block: bool = False,
    ) -> None:
        """Saves a state; the arrays may be donated as soon as this returns.

        Saving the newest step again does nothing. After a failure the checkpointer can be used as
        before, and the step that failed can be saved again.

        Args:
          step: grows from save to save.
          state: nested dicts, optax states included, of jax arrays.
          manifest: JSON; config, stage, whatever `restore`'s check wants to see.
          extra: JSON; everything else that is not an array.
          block: return only when the checkpoint is complete.

        Raises:
          CheckpointError: this save failed, or the one before that was still being written (then
            this one has been started all the same). The last good checkpoint is untouched.
        """
        earlier = self._join()
        current: CheckpointError | None = None
        error = None
        try:
            self._start(step, state, manifest, extra)
        except CheckpointError:
            raise
        except Exception as e:  # orbax raises what its storage layers raise
            error = e
        if agree(error is not None):
            current = self._join() or self._failed(step, error)
        elif block or not self._background:
            current = self._join()
        if current or earlier:
            raise current or earlier  # type: ignore[misc]

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
          CheckpointError: it failed.
        """
        error = self._join()
        if error:
            raise error

    def close(self) -> None:
        """Waits and closes; may be called twice.

        Raises:
          CheckpointError: the last save failed.
        """
        error = self._join()
        self._close_manager()
        if error:
            raise error

    def steps(self) -> list[int]:
        """Returns the steps whose checkpoints are complete, their contents unread."""
        return [
            step
            for step in _completed(self.folder)
            if not checksums.problem(self.folder / str(step), contents=False)
        ]

    def latest(self) -> int | None:
        """Returns the newest step that was saved completely, or None for a fresh run.

        It may have been damaged since; `restore` finds out and uses the one before.
        """
        return _from_first(max(_completed(self.folder), default=None))

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        check: Callable[[dict[str, Any]], None] | None = None,
    ) -> Restored:
        """Reads the newest valid checkpoint.

        Args:
          abstract_state: tree of shape structs with shardings, of any mesh; or a function that
            makes it from the manifest.
          step: a step to read instead; no other is tried.
          check: called with the manifest before any array is read; raises to refuse.

        Raises:
          CheckpointError: there is none, none is valid, or the arrays are not those expected.
        """
        self.wait()
        step, skipped = self._choose(step)
        found = _read(self.folder, step, manifest=ocp.args.JsonRestore())['manifest']
        if check is not None:
            check(found)
        if callable(abstract_state):
            abstract_state = abstract_state(found)
        where = f'checkpoint {self.folder / str(step)}'
        manifest_lib.check_state(found, abstract_state, where)
        targets = jax.tree.map(_target, abstract_state)
        try:
            items = _read(
                self.folder,
                step,
                state=ocp.args.StandardRestore(targets),
                extra=ocp.args.JsonRestore(),
            )
        except Exception as e:
            # Its bytes are as written, so an older one would fare no better.
            raise CheckpointError(f'{where} is intact but cannot be read: {_first_line(e)}') from e
        state = trees.strict(abstract_state, items['state'], where)
        return Restored(step, state, found, items['extra'], skipped)

    # ---- saving ----------------------------------------------------------------------------

    def _start(self, step: int, state: Any, about: Mapping, extra: Mapping) -> None:
        """Copies the state to the host and starts the writing."""
        manager = self._open_manager()
        newest = self.latest()
        if newest == step:
            return
        if newest is not None and newest > step:
            raise CheckpointError(
                f'step {step} cannot be saved: {self.folder} already holds step {newest}, and '
                'steps only grow. Move the newer checkpoints away, or choose another --workdir.'
            )
        items = ocp.args.Composite(
            manifest=ocp.args.JsonSave(manifest_lib.complete(about, step, state)),
            state=ocp.args.StandardSave(state),
            extra=ocp.args.JsonSave(dict(extra)),
        )
        manager.save(step, args=items, force=True)
        self._saving = step
        self._writer = threading.Thread(target=self._finish, args=(step,), name='checkpoint')
        self._writer.start()

    def _finish(self, step: int) -> None:
        """Runs in the background: waits for orbax, completes the checkpoint, deletes old ones."""
        try:
            assert self._manager is not None
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                checksums.write(self.folder / str(step))
                self._delete_old(step)
        except Exception as e:
            self._error = e

    def _join(self) -> CheckpointError | None:
        """Waits for the writer; returns its error, known to all processes."""
        if self._writer is None:
            return None
        self._writer.join()
        self._writer = None
        step, error = self._saving, self._error
        self._saving = self._error = None
        assert step is not None
        if agree(error is not None):
            return self._failed(step, error)
        return None

    def _failed(self, step: int, error: Exception | None) -> CheckpointError:
        """Forgets a failed save, on disk and in orbax, and returns the error to raise."""
        self._close_manager()  # a new one reads the folder: no cache can hold the failed step
        if jax.process_index() == 0:
            for path in self.folder.glob(f'{step}.orbax-checkpoint-tmp*'):
                shutil.rmtree(path, ignore_errors=True)
            if step in _incomplete(self.folder):
                shutil.rmtree(self.folder / str(step), ignore_errors=True)
        steps = self.steps()
        why = _first_line(error) if error else 'another process says why'
        good = f'the last good one is step {steps[-1]}' if steps else 'there is none before it'
        result = CheckpointError(
            f'the checkpoint of step {step} could not be written to {self.folder}; {good}. '
            f'Check the free space and the permissions there. ({why})'
        )
        result.__cause__ = error
        return result

    def _delete_old(self, newest: int) -> None:
        """Deletes what is older than the `keep` newest checkpoints that are valid, if so many are.

        The kept ones are read again: a damaged one must not push out one that is good.
        """
        kept = 1
        for step in reversed([s for s in _completed(self.folder) if s < newest]):
            folder = self.folder / str(step)
            if kept < self._keep:
                kept += checksums.problem(folder) is None
                continue
            with contextlib.suppress(OSError):  # tried again after the next save
                shutil.rmtree(folder.rename(folder.with_name(f'{step}.deleting')))

    def _open_manager(self) -> ocp.CheckpointManager:
        """Returns the orbax manager, made after unusable checkpoints were moved out of its way."""
        if self._manager is None:
            if jax.process_index() == 0:
                self.folder.mkdir(parents=True, exist_ok=True)
                for step in sorted({*_incomplete(self.folder), *self._damaged}):
                    _set_aside(self.folder / str(step))
                for path in self.folder.glob('*.deleting'):  # a kill came in between
                    shutil.rmtree(path, ignore_errors=True)
            self._damaged.clear()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices('effjax: checkpoints set aside')
            for name in ('absl', 'asyncio'):
                logging.getLogger(name).addFilter(_quiet)
            options = ocp.CheckpointManagerOptions(
                max_to_keep=None,  # `_delete_old` deletes, after the checksums were written
                cleanup_tmp_directories=True,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def _close_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception:  # it raises the error of a failed save again
                logging.getLogger(__name__).debug('closing orbax', exc_info=True)

    # ---- reading ---------------------------------------------------------------------------

    def _choose(self, wanted: int | None) -> tuple[int, list[str]]:
        """Returns the step to read and why newer ones are not used; process 0 decides."""
        skipped: list[str] = []
        chosen = None
        if jax.process_index() == 0:
            chosen = self._newest_valid(wanted, skipped)
        chosen = _from_first(chosen)
        if chosen is not None:
            return chosen, skipped
        what = 'no valid checkpoint' if wanted is None else f'no valid checkpoint of step {wanted}'
        has = ', '.join(map(str, self.steps())) or 'no other'
        raise CheckpointError(
            f'{what} in {self.folder} ({"; ".join(skipped) or "nothing is there"}); it has {has}. '
            'Put back a copy of the folder, or start again with another --workdir.'
        )

    def _newest_valid(self, wanted: int | None, skipped: list[str]) -> int | None:
        there = sorted({*_completed(self.folder), *_incomplete(self.folder)}, reverse=True)
        for step in there:
            if wanted is not None and step != wanted:
                continue
            wrong = checksums.problem(self.folder / str(step))
            if wrong is None:
                return step
            skipped.append(f'step {step}: {wrong}')
            self._damaged.add(step)
        return None


def read_manifest(folder: str | pathlib.Path, step: int | None = None) -> dict[str, Any]:
    """Returns the manifest of one step, or of the newest whose manifest is intact.

    Raises:
      CheckpointError: there is none.
    """
    folder = pathlib.Path(folder).absolute()
    chosen = None
    if jax.process_index() == 0:
        for candidate in reversed(_completed(folder) if step is None else [step]):
            if not checksums.problem(folder / str(candidate), under='manifest/'):
                chosen = candidate
                break
    chosen = _from_first(chosen)
    if chosen is not None:
        return _read(folder, chosen, manifest=ocp.args.JsonRestore())['manifest']
    which = '' if step is None else f' of step {step}'
    raise CheckpointError(
        f'no valid checkpoint{which} in {folder}; give a folder that holds one, such as '
        'WORKDIR/checkpoints.'
    )


def read_extra(folder: str | pathlib.Path, step: int) -> dict[str, Any]:
    """Returns what the checkpoint of a step holds beside manifest and arrays.

    Raises:
      CheckpointError: it is damaged.
    """
    folder = pathlib.Path(folder).absolute()
    wrong = checksums.problem(folder / str(step), under='extra/')
    if wrong:
        raise CheckpointError(f'checkpoint {folder / str(step)} cannot be used: {wrong}.')
    return _read(folder, step, extra=ocp.args.JsonRestore())['extra']


def digest(folder: str | pathlib.Path, step: int) -> str:
    """Names the content of the checkpoint of a step, by the checksums that were kept of it."""
    file = pathlib.Path(folder) / str(step) / checksums.FILE
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _read(folder: pathlib.Path, step: int, **items: Any) -> Any:
    logging.getLogger('absl').addFilter(_quiet)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        return manager.restore(step, args=ocp.args.Composite(**items))


def _completed(folder: pathlib.Path) -> list[int]:
    """Steps, in order, that have a list of checksums."""
    return [step for step in _all(folder) if (folder / str(step) / checksums.FILE).exists()]


def _incomplete(folder: pathlib.Path) -> list[int]:
    """Steps, in order, whose save was interrupted between orbax's commit and the checksums."""
    return [step for step in _all(folder) if not (folder / str(step) / checksums.FILE).exists()]


def _all(folder: pathlib.Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


def _set_aside(path: pathlib.Path) -> None:
    """Renames a checkpoint that cannot be used to `<step>.damaged`, so that its step is free."""
    if not path.exists():
        return
    target = path.with_name(f'{path.name}.damaged')
    count = 1
    while target.exists():
        count += 1
        target = path.with_name(f'{path.name}.damaged{count}')
    path.rename(target)


def _from_first(step: int | None) -> int | None:
    """Returns process 0's step in every process: others may see the folder later."""
    if jax.process_count() == 1:
        return step
    value = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if value < 0 else value


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f'{type(error).__name__}: {text[0][:300]}' if text else type(error).__name__


def _quiet(record: logging.LogRecord) -> bool:
    """Drops orbax's own tracebacks and warnings: what went wrong is raised, in one sentence."""
    # asyncio reports the writes that orbax gave up after the first one had failed.
    return 'orbax' not in record.pathname and 'orbax/checkpoint' not in record.getMessage()
