"""The trainer: from a checked config to a finished run. Read `Trainer.run` from top to bottom.

One step is always in flight: step t is dispatched before the metrics of step t-1 are fetched, so
that the device never waits for the host. Every decision (learning rate, end of a stage,
evaluations, checkpoints) is taken on the host from the ledger, which the checkpoint holds.
"""

import collections
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import parallel
from effjax.core.errors import CheckpointError, ConfigError, TrainingError
from effjax.core.signals import Stop
from effjax.costs import Clock, EnergyMeter, Ledger, StepCost, meters
from effjax.kernels import choices
from effjax.training import evaluate, resume, schedules, teacher
from effjax.training.checkpoints import Checkpointer
from effjax.training.compiled import CompiledStep
from effjax.training.files import plain, write_json_atomic
from effjax.training.metrics import FILE, MetricsWriter, last_row
from effjax.training.progress import human, make_progress
from effjax.training.runtime import DONE, Runtime
from effjax.training.signals import Agreement
from effjax.training.slope import LossSlope
from effjax.training.stages import Stage
from effjax.training.transitions import PURPOSE

WASTED = 'wasted.json'


@dataclasses.dataclass
class _InFlight:
    """A dispatched step whose metrics have not been fetched."""

    vector: jax.Array
    row: dict[str, Any]
    position: dict[str, Any]  # of its batch, to name the samples if it goes wrong


class Trainer:
    """One run of one config in one folder.

    Args:
      config: a checked config.
      workdir: the run's folder, made if need be.
      runtime: what `Runtime(config)` would be, from who has made it already.

    Raises:
      ConfigError: a model, batch or mesh that does not fit, or an unwritable folder.
      DataError: missing or empty data.
      CheckpointError: the folder belongs to another config, or nothing in it is valid.
    """

    def __init__(
        self, config: Mapping[str, Any], workdir: pathlib.Path, runtime: Runtime | None = None
    ):
        self.workdir = make_folder(workdir)
        parallel.initialize()  # all processes take the first one's answer
        fresh = Checkpointer(workdir / 'checkpoints').latest() is None
        known = teacher.recall(config, workdir)
        self.runtime = runtime or Runtime(known, with_source=fresh)
        self.config = self.runtime.config
        self.seed: Any = self.config['seed']  # what the step takes; batched runs, one a lane
        self.clock = Clock(devices=jax.device_count())
        self.energy = EnergyMeter()
        self.ledger = Ledger()
        teacher.charge(self.ledger, self.config)
        self.position: dict[str, Any] | None = None
        self.stage = 0
        self.row: dict[str, Any] | None = None  # the last step's row, still to be written
        self.resumed_from: int | None = None
        self.last_saved: int | None = None
        self.saved_at = time.monotonic()
        self.speed = _Speed()
        self.results: dict[str, dict[str, float]] = {}
        self.evaluated: dict[str, int] = {}  # evaluation -> step of its result
        self.started: dict[
            str, float
        ] = {}  # stage's index -> what of the extent was used at its start
        self.progress = (0.0, 0.0)  # shares of the run and of the stage that are done
        self.slope: LossSlope | None = None  # of a stage that it may end
        self.ended = -1  # the last stage that ended before its time
        # Evaluations that a signal cut short, and the row of their step.
        self.left: dict[str, Any] | None = None
        self.memory: dict[str, Any] = {}
        self.compiler_options: dict[str, Any] = {}
        self.kernels: dict[str, Any] = {}  # that earlier processes of this run chose
        self.warnings: list[str] = []
        self.stopped_by: str | None = None
        self._agreement = Agreement()
        self._check_energy()

    def _check_energy(self) -> None:
        if self.runtime.stages[0].unit != 'joules':
            return
        if jax.process_count() > 1:
            raise ConfigError(
                'config.budget in joules works in one process: a meter sees its own host alone.'
            )
        if self.energy.joules() is None:
            raise ConfigError(
                'config.budget counts joules, which nothing measures here (it takes an NVIDIA GPU '
                'and the nvidia-ml-py package); count flops, seconds or tokens instead.'
            )

    # ---- the run ---------------------------------------------------------------------------

    def run(self) -> str | None:
        """Trains to the end or to a signal, whose name it returns."""
        options = self.config['checkpoint']
        self.checkpointer = Checkpointer(
            self.workdir / 'checkpoints', keep=options['keep'], background=options['background']
        )
        with (
            parallel.mesh_context(self.runtime.mesh, self.runtime.rules),
            Stop() as self.stop,
        ):
            restored = self._restored()
            self._open_outputs()
            try:
                self.state = restored or self._first_state()
                del restored  # growing does not donate: it would live on beside what it becomes
                self._evaluate_left()
                self._run_stages()
                self._save(block=True)
            finally:
                self._close()
        return self.stopped_by

    def _run_stages(self) -> None:
        """Trains through all stages, and judges the model that they end with."""
        for stage in self.runtime.stages:
            self._run_stage(stage)
            if self._stopping():
                break
        else:
            last = self.runtime.evaluations(stage)
            steps = self.ledger.steps
            self._evaluate([e for e in last if self.evaluated.get(e.name) != steps])
        self._write_row()

    def _first_state(self) -> dict[str, Any]:
        """Returns the state that the first stage begins with, another run's where it is to."""
        source, stage = self.runtime.source, self.runtime.stages[0]
        if source is None:
            return self.runtime.initial_state()
        cost = 'charged' if source.charge else 'free'
        self._say(f'begins from step {source.step} of {source.folder}, whose cost is {cost}')
        self.state = self.runtime.source_state()
        if stage.grow is not None:
            self._enter(stage)
        return self.state

    def _run_stage(self, stage: Stage) -> None:
        # A run ends with the model that it says, even if the stages before took all that was left.
        ahead = self.runtime.stages[self.stage + 1 : stage.index + 1]
        due = any(later.grow is not None for later in ahead)
        if stage.index < self.stage or (self._over(stage, self._used(stage.unit)) and not due):
            return  # resumed after its end
        if stage.index <= self.ended:
            return
        for later in ahead:
            self._enter(later)
        stage = self._as_started(stage)
        if self.position is None:
            self.position = self.runtime.sampler(stage).initial()
        loader = self.runtime.loader(stage, self.position)
        try:
            first = next(loader)
            batches = itertools.chain([first], loader)
            task = self.runtime.task_at(stage.shares(self._used(stage.unit)))
            while task is not None:  # one compiled step for each
                with self.clock('compile'):
                    compiled = self.runtime.compile(stage, first[0], task)
                self.memory['compiled'] = compiled.memory
                self.compiler_options = compiled.options
                self.speed.start(self.ledger.steps, self._seconds())
                with self.clock('train'):
                    task = self._steps(stage, compiled, batches, task)
        finally:
            loader.close()

    def _flat(self, stage: Stage) -> bool:
        """Whether a stage's loss has come to fall too slowly to go on."""
        if self.slope is None:
            return False
        assert stage.until is not None
        slope = self.slope.value(self.ledger.steps + 1)
        if slope is None or slope < stage.until['slope']:
            return False
        self.ended, self.slope = stage.index, None
        self._say(f'stage {stage.name} ends: the slope of its loss is {slope:.4f}')
        return True

    def _enter(self, stage: Stage) -> None:
        """Takes the state from the stage before into this one, growing it if that is asked."""
        if stage.grow is not None:
            with self.clock('compile'):
                grow, cost = self.runtime.transition(stage)
            with self.clock('train'):  # what a transition computes is charged, its time too
                self.state = jax.block_until_ready(grow(self.state))
            self._charge_growth(cost, stage)
            self.evaluated = {}  # of another model
        self.stage, self.progress = stage.index, (self.progress[0], 0.0)
        self.state['stage'] = jnp.full_like(self.state['stage'], stage.index)
        grown = ''
        if stage.grow is not None:
            transition = self.runtime.transitions[stage.index]
            before, after = map(human, transition.sizes)
            grown = f': grown from {before} to {after} parameters by {transition.words}'
        self._say(f'stage {stage.name}{grown}')

    def _charge_growth(self, cost: StepCost, stage: Stage) -> None:
        self.ledger.add_forward(cost, purpose=PURPOSE, stage=stage.name)

    def _as_started(self, stage: Stage) -> Stage:
        """Returns a stage with the start that it really had, which the one before decides."""
        start = self.started.setdefault(str(stage.index), self._used(stage.unit))
        origin = self.started.setdefault('0', start)
        return dataclasses.replace(stage, start=start, origin=origin)

    def _steps(
        self, stage: Stage, compiled: CompiledStep, batches: Iterator[Any], task: Any
    ) -> Any:
        """Trains on a task to the end of the stage, or to where another takes over: returns it."""
        schedule, following = self._schedule(stage), None
        evaluations = self.runtime.evaluations(stage)
        flying: collections.deque[_InFlight] = collections.deque()
        if stage.until is not None and self.slope is None:
            self.slope = LossSlope(stage.until['window'])
        while not self._stopping() and not self._flat(stage):
            used, size = self._used(stage.unit), self._step_extent(stage, compiled)
            if self._over(stage, used + size / 2):
                self.slope = None
                break  # a run ends with the step that comes nearest to its budget
            progress = stage.shares(used + size)
            left = self.runtime.task_at(progress, task)
            if left is not task:
                following = left
                break
            lr, self.progress = schedule(stage.progress(used + size / 2)), progress
            with self.clock('data'):
                item = next(batches)
            flying.append(self._dispatch(stage, item, compiled, lr))
            if len(flying) > 1:
                self._record(flying.popleft(), compiled, stage)
            before, after = used / stage.total, min((used + size) / stage.total, 1.0)
            due = [e for e in evaluations if e.due(self.ledger.steps, before, after)]
            save = self._save_due()
            # At the very end everything is evaluated, and saved after that.
            ending = used + 1.5 * size >= stage.end and stage.index == self.runtime.stages[-1].index
            if (due or save) and not ending:
                self._drain(flying, compiled, stage)
                self._evaluate(due)
                if save:
                    self._save()
        self._drain(flying, compiled, stage)
        return following

    def _schedule(self, stage: Stage) -> Callable[[float], Any]:
        return schedules.build(stage.config['schedule'])

    # ---- one step --------------------------------------------------------------------------

    def _dispatch(
        self, stage: Stage, item: tuple[Any, Any, float], compiled: CompiledStep, lr: Any
    ) -> _InFlight:
        batch, position, _ = item
        before, self.position = self.position, position
        self.state, vector = compiled(self.state, batch, lr, self.seed, self.progress)
        self.ledger.add_step(compiled.cost, stage=stage.name)
        row = {
            'step': self.ledger.steps,
            'stage': stage.index,
            'lr': lr,
            'tokens': self.ledger.tokens,
            'examples': self.ledger.examples,
            'model_flops': self.ledger.model_flops,
            'hardware_flops': self.ledger.hardware_flops,
        }
        if self.ledger.reference_seconds is not None:
            row['reference_seconds'] = self.ledger.reference_seconds
        assert before is not None
        return _InFlight(vector, row, before)

    def _record(self, flight: _InFlight, compiled: CompiledStep, stage: Stage) -> None:
        """Waits for a step's metrics; the row before it is then complete and is written."""
        values = dict(zip(compiled.names, self._fetch(flight).tolist(), strict=True))
        self._write_row()
        self.row = {**flight.row, **values, 'seconds': self._seconds()}
        self.row.pop('weight')
        if stage.unit == 'joules':
            self.row['joules'] = self.energy.joules()
        self.row['tokens_per_second'] = self.speed.update(
            self.row['step'], self.row['seconds'], compiled.cost.tokens
        )
        self.bar.update(self.row)
        if self.slope is not None:
            self.slope.add(self.row['step'], self.row['model_flops'], values['loss'])
        if values['skipped']:
            self.ledger.add_skipped()
            if self.runtime.precision.loss_scale is None:
                self._not_finite(flight, values, stage)
            self._say(overflowed(flight.row['step'], values))

    def _fetch(self, flight: _InFlight) -> np.ndarray:
        """Waits for a step to end: the only place of the loop where the host waits for a device."""
        return np.asarray(flight.vector)

    def _drain(
        self, flying: collections.deque[_InFlight], compiled: CompiledStep, stage: Stage
    ) -> None:
        while flying:
            self._record(flying.popleft(), compiled, stage)

    def _not_finite(self, flight: _InFlight, values: Mapping[str, float], stage: Stage) -> None:
        self._write_row()
        samples = self.runtime.sampler(stage).describe(flight.position)
        try:
            self.checkpointer.wait()
        except CheckpointError:
            self.last_saved = self.checkpointer.latest()
        good = (
            f'the last good checkpoint is step {self.last_saved} in {self.checkpointer.folder}'
            if self.last_saved is not None
            else 'there is no checkpoint yet'
        )
        raise TrainingError(
            f'{not_finite(flight.row["step"], values, samples)}; {good}, and nothing was '
            'overwritten. Lower the learning rate, lengthen the warm-up, or look at those samples.'
        )

    def _write_row(self) -> None:
        if self.row is not None:
            if self.row['step'] % self.config['log']['every_steps'] == 0 or 'eval' in self.row:
                self.writer.write(self.row)
            self.row = None

    # ---- how far ---------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self.clock.seconds('train') + self.clock.seconds('data')

    def _used(self, unit: str) -> float:
        if unit == 'joules':
            return self.energy.joules() or 0.0
        if unit == 'seconds':
            # The one budget that no two machines agree on: process 0 decides for all.
            seconds = self._seconds() + self.ledger.source_seconds
            return float(parallel.broadcast(np.float64(seconds)))
        return float(getattr(self.ledger, unit) or 0.0)

    def _over(self, stage: Stage, used: float) -> bool:
        """Whether a stage ends where so much of the run's extent is used."""
        if stage.limit:
            return self.ledger.steps_of(stage.name) >= stage.limit
        return used >= stage.end

    def _step_extent(self, stage: Stage, compiled: CompiledStep) -> float:
        if stage.unit == 'steps':
            return 1.0
        if stage.unit == 'seconds':
            return float(parallel.broadcast(np.float64(self.speed.seconds_per_step)))
        if stage.unit == 'joules':
            return self._used('joules') / max(self.ledger.steps, 1)
        size = getattr(compiled.cost, stage.unit)
        if size is None:
            raise ConfigError(
                f'config.budget counts {stage.unit}, which are not known for this step; '
                'count tokens, flops or steps instead.'
            )
        return float(size)

    def _stopping(self) -> bool:
        """Whether any process has been asked to stop; the same answer in all of them."""
        if self._agreement(self.stop.requested is not None):
            self.stopped_by = self.stop.requested or 'a signal to another process'
        return self.stopped_by is not None

    # ---- evaluations -----------------------------------------------------------------------

    def _evaluate_left(self) -> None:
        """Runs, before anything else, the evaluations that a signal had cut short."""
        if self.left is not None:
            planned = self.runtime.evaluations(self.runtime.stages[self.stage])
            names = self.left['names']
            self._evaluate([e for e in planned if e.name in names])

    def _evaluate(self, due: list[evaluate.Evaluation]) -> None:
        runtime, self.left = self.runtime, None
        for i, evaluation in enumerate(due):
            with self.clock('compile'):
                step = runtime.compile_eval(evaluation, self.stage)
            with self.clock('eval'):
                result = evaluate.run(
                    evaluation,
                    step,
                    runtime.eval_params(self.state, self.stage, self.progress),
                    self.state['buffers'],
                    runtime.putter(evaluation.batch_size),
                    runtime.task,
                    stop=self._stopping,
                )
            if result is None:  # asked to stop: the checkpoint comes first
                self.left = {'names': [e.name for e in due[i:]], 'row': self.row}
                return
            self.ledger.add_forward(runtime.eval_cost(evaluation, self.stage), purpose='eval')
            self.results[evaluation.name] = result
            self.evaluated[evaluation.name] = self.ledger.steps
            if self.row is not None:
                self.row.setdefault('eval', {})[evaluation.name] = result
            shown = '  '.join(f'{k} {v:.4g}' for k, v in result.items())
            self._say(f'step {self.ledger.steps}  eval {evaluation.name}: {shown}')

    def judged(self) -> dict[str, Any]:
        """Returns the params (averaged, where config or optimizer say so) and the buffers."""
        params = self.runtime.eval_params(self.state, self.stage, self.progress)
        return {'params': params, 'buffers': self.state['buffers']}

    # ---- checkpoints -----------------------------------------------------------------------

    def _restored(self) -> dict[str, Any] | None:
        """Returns the newest valid state and takes up its ledger, clock and data position."""
        folder = self.checkpointer.folder
        if self.checkpointer.latest() is None:
            refuse_other(self.workdir / 'config.json', self.config)
            source = self.runtime.source
            if source is not None:
                self.ledger.add_source(
                    'init_from', source.totals, seconds=source.seconds, charged=source.charge
                )
            self._book_waste()
            return None
        runtime = self.runtime

        def check(found: Mapping[str, Any]) -> None:
            params = runtime.models[runtime.stage_of(found)].abstract['params']
            resume.check(found, self.config, params, folder)

        restored = self.checkpointer.restore(
            lambda found: runtime.abstract_sharded(runtime.stage_of(found)), check=check
        )
        for sentence in restored.skipped:
            self._warn(f'checkpoint not used: {sentence}')
        changes = resume.settings_changed(restored.manifest['config'], self.config)
        for change in changes:
            self._warn(f'resumed with another setting: {change}.')
        self.stage = runtime.stage_of(restored.manifest)
        self._take_up(restored.extra)
        if changes:
            self.evaluated = {}  # it may be judged in another way now
        self.resumed_from = self.last_saved = restored.step
        self._book_waste()
        return restored.state

    def _extra(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the arrays; `_take_up` reads it."""
        return {
            'ledger': self.ledger.to_dict(),
            'clock': self.clock.to_dict(),
            'joules': self.energy.joules(),
            'position': self.position,
            'results': self.results,
            'evaluated': self.evaluated,
            'started': self.started,
            'progress': self.progress,
            'slope': self.slope and self.slope.to_dict(),
            'ended': self.ended,
            'left': plain(self.left),
            'memory': meters.memory(jax.local_devices(), self.memory),
            'compiler_options': self.compiler_options,
            'kernels': {**self.kernels, **choices()},
        }

    def _take_up(self, extra: Mapping[str, Any]) -> None:
        self.ledger = Ledger.from_dict(extra['ledger'])
        self.clock = Clock.from_dict(extra['clock'], devices=jax.device_count())
        self.energy.restore(extra['joules'])
        self.position, self.results = extra['position'], extra['results']
        # Checkpoints of earlier versions lack what follows.
        self.evaluated = extra.get('evaluated', {})
        self.started = dict(extra.get('started') or self._planned_starts())
        self.progress = tuple(extra.get('progress', DONE))
        self.ended = extra.get('ended', -1)
        if extra.get('slope'):
            until = self.runtime.stages[self.stage].until
            if until is not None:
                self.slope = LossSlope(until['window'])
                self.slope.restore(extra['slope'])
        self.left = extra.get('left')
        self.row = self.left['row'] if self.left else None
        self.memory = extra.get('memory', {})
        self.compiler_options = extra.get('compiler_options', {})
        self.kernels = extra.get('kernels', {})

    def _planned_starts(self) -> dict[str, float]:
        return {str(stage.index): stage.start for stage in self.runtime.stages[: self.stage + 1]}

    def _close(self) -> None:
        """Ends outputs and background writing; hides no error that is on its way."""
        self.bar.close()
        self.writer.close()
        try:
            self.checkpointer.close()
        except CheckpointError as error:
            self._warn(str(error))

    def _save_due(self) -> bool:
        options = self.config['checkpoint']
        by_step = options['every_steps'] and self.ledger.steps % options['every_steps'] == 0
        late = time.monotonic() - self.saved_at
        by_time = bool(options['every_seconds']) and late >= options['every_seconds']
        if options['every_seconds']:
            by_time = bool(parallel.broadcast(np.int32(by_time)))
        return bool(by_step or by_time)

    def _save(self, block: bool = False) -> None:
        """Saves the state, unless this step is saved already; by config, goes on if it fails."""
        self.saved_at = time.monotonic()
        self._write_row()
        self.writer.flush()
        params = self.runtime.models[self.stage].abstract['params']
        tokenizer = getattr(self.runtime.dataset.info.tokenizer, 'digest', '')
        manifest = resume.manifest(self.config, params, self.stage, tokenizer)
        with self.clock('checkpoint'):
            try:
                if self.last_saved != self.ledger.steps:
                    self.checkpointer.save(
                        self.ledger.steps, self.state, manifest=manifest, extra=self._extra()
                    )
                    self.last_saved = self.ledger.steps
                if block:
                    self.checkpointer.wait()
            except CheckpointError as error:
                if self.config['checkpoint']['on_error'] == 'stop':
                    raise
                self.last_saved = self.checkpointer.latest()
                self._warn(f'{error} Training goes on.')

    def _book_waste(self) -> None:
        """Charges what an interrupted run did after its last checkpoint.

        A file keeps the sum, since another kill may come before the next checkpoint.
        """
        file, last = self.workdir / WASTED, last_row(self.workdir / FILE)
        if file.exists():
            self.ledger.take_waste(json.loads(file.read_text()))
        lost = last and self.ledger.add_waste_since(last, seconds=self._seconds())
        if lost and jax.process_index() == 0:
            write_json_atomic(file, self.ledger.wasted)

    # ---- outputs ---------------------------------------------------------------------------

    def _open_outputs(self) -> None:
        log = self.config['log']
        if jax.process_index() == 0:
            write_json_atomic(self.workdir / 'config.json', self.config)
        self.writer = MetricsWriter(
            self.workdir,
            # The row of a step whose evaluations are not complete is written again.
            resume_step=(self.resumed_from or 0) - (self.row is not None),
            tensorboard=log['tensorboard'],
            wandb=log['wandb'],
            config=self.config,
        )
        stages = self.runtime.stages
        self.bar = make_progress(log['progress'], stages[0].unit, stages[0].total)
        self._announce()

    def _announce(self) -> None:
        """Says what is about to run, where its files go, and from which step it goes on."""
        runtime, first = self.runtime, self.runtime.stages[self.stage]
        model = runtime.models[self.stage]
        flops = runtime.step_flops(first)
        how = '; '.join(
            f'{part["repeat"]} x [{", ".join(part["period"])}], layers: {part["layers"]}'
            for part in model.built.model.body.describe()
        )
        axes = ', '.join(f'{axis} {n}' for axis, n in runtime.mesh.shape.items() if n > 1)
        where = f'{runtime.mesh.size} x {jax.devices()[0].device_kind}' + (
            f' ({axes})' if axes else ''
        )
        self._say(
            f'{self.config["name"] or "run"}: {human(model.params)} parameters, '
            f'{human(flops, "FLOP")} a step, on {where}; {how}; files in {self.workdir}'
        )
        why = model.built.fallbacks
        if why:
            more = f' (and {len(why) - 4} more, in summary.json)' if len(why) > 4 else ''
            self._say(f'sharding fell back in {len(why)} places: {" ".join(why[:4])}{more}')
        if self.resumed_from is not None:
            self._say(f'resumed from step {self.resumed_from} in {self.workdir}')

    def _say(self, text: str) -> None:
        self.bar.line(text)

    def _warn(self, text: str) -> None:
        """Tells the user whatever the config says of progress, and notes it in the summary."""
        self.warnings.append(text)
        if jax.process_index() == 0:
            print(f'warning: {text}', file=sys.stderr, flush=True)


class _Speed:
    """Seconds a step, from when a stage's step was first run."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._start: tuple[int, float] = (0, 0.0)
        self._last: tuple[int, float] = (0, 0.0)

    def start(self, step: int, seconds: float) -> None:
        self._start = self._last = (step, seconds)

    def update(self, step: int, seconds: float, tokens: int) -> float:
        """Takes a step that ended at `seconds`; returns its tokens a second."""
        steps, spent = step - self._start[0], seconds - self._start[1]
        self.seconds_per_step = spent / max(steps, 1)
        taken, self._last = seconds - self._last[1], (step, seconds)
        return tokens / max(taken, 1e-9)


def not_finite(step: int, values: Mapping[str, float], samples: Sequence[str]) -> str:
    """Says which step's loss or gradient is not finite, and on what samples."""
    return (
        f'the loss or its gradient is not finite at step {step} (loss {values["loss"]}, '
        f'gradient norm {values["grad_norm"]}, samples {samples})'
    )


def overflowed(step: int, values: Mapping[str, float]) -> str:
    """Says that float16 gradients overflowed, which costs one step."""
    return (
        f'step {step}: gradients overflowed at loss scale {values["loss_scale"]:g}; the step is '
        'left out and the scale lowered'
    )


def make_folder(workdir: pathlib.Path) -> pathlib.Path:
    """Makes a run's folder and checks that it can be written.

    Raises:
      ConfigError: it cannot.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / '.writable'
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise ConfigError(
            f'cannot write to the work folder {workdir} ({e.strerror}); give another --workdir.'
        ) from e
    return workdir


def refuse_other(file: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Refuses a folder whose config is another experiment's, even without a checkpoint."""
    if not file.exists():
        return
    try:
        found = json.loads(file.read_text())
    except ValueError:
        return  # half-written by something else; nothing of a run depends on it
    resume.check_config(found, config, file)
