"""Several runs as one: configs that differ in seeds and schedules share a compiled step by `vmap`.

Small models leave an accelerator idle, and each run of a study compiles anew. Here every run is a
*lane*: state, batch, learning rate and seed have a leading axis of lanes, and one step trains them
all. A lane's initial values, data order, learning rates and evaluations are those of a run by
itself; its numbers agree with that run's up to the rounding of batched products. It is charged
what that run is charged, in the same ledger, and leaves the same files, but for checkpoints: a
group that is killed starts again. Lanes go through the stages of their config together, a compiled
step each; where a stage grows the model, each lane is grown by the very program, with its own
seed, that grows it by itself.

What lanes share is divided: seconds and joules, in rows and summaries, are a lane's part of what
passed while it was alive. Memory is not: the state is as many times as large as there are lanes,
and the peaks in a summary are those of the whole group. A lane whose loss is not finite ends there;
the others go on.

On two busy CPU cores, four seeds against four runs one by one: decoders of width 32 (200 steps), 64
(100 steps) and 128 (25 steps) took 0.4, 0.4 and 0.7 of the wall time, since they compile once; a
lane's step itself took 0.8 to 0.9, 1.3 to 1.5 and 1.1 to 1.4 of a single one. What an accelerator
makes of it has not been measured.
"""

import functools
import operator
import pathlib
import shutil
import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import data, parallel
from effjax.core.config import as_dict, check_form, extent
from effjax.core.errors import ConfigError
from effjax.core.signals import Stop
from effjax.costs import Clock, EnergyMeter, Ledger, StepCost
from effjax.data.packing import Batch, Position
from effjax.data.sampler import RowIndex, Sampler
from effjax.kernels.choice import platform
from effjax.training import evaluate, finish, resume, schedules, setup, teacher, transitions
from effjax.training import loop as loop_lib
from effjax.training.compiled import CompiledStep, with_lanes
from effjax.training.files import write_json_atomic
from effjax.training.metrics import MetricsWriter
from effjax.training.progress import make_progress
from effjax.training.runtime import DONE, Runtime
from effjax.training.stages import Stage, plan

VARYING = ('seed', 'init_seed', 'schedule', 'name')  # what the runs of a group may differ in


def run_batched(
    configs: Sequence[Mapping[str, Any]],
    workdirs: Sequence[pathlib.Path],
    report: Callable[[pathlib.Path], Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains runs that differ only in `VARYING` as one compiled step.

    Args:
      configs: one a run, as `effjax.train.run` takes them.
      workdirs: their folders, made if need be; what an earlier attempt left there is replaced.
      report: writes a finished run's report into its folder (`effjax.report.write`), or None.

    Returns:
      What each `summary.json` holds: the keys of a run by itself, and `batched`. A lane whose
      loss was not finite has `complete` False and says why in `error`. After SIGTERM or SIGINT
      `complete` is False, `stopped_by` names the signal, and no summary is written.

    Raises:
      ConfigError: configs that cannot share a step, or one that cannot run.
      DataError: missing or empty data.
      CheckpointError: a folder belongs to another config.
    """
    check_batchable(configs)
    folders = [pathlib.Path(workdir) for workdir in workdirs]
    if len({f.absolute() for f in folders}) != len(configs) or len(folders) != len(configs):
        raise ConfigError(
            f'{len(configs)} batched runs need as many different work folders, got '
            f'{", ".join(map(str, folders)) or "none"}.'
        )
    group = Group(configs, folders)
    group.run()
    return [group.finish(lane, report) for lane in group.lanes]


def check_batchable(configs: Sequence[Mapping[str, Any]]) -> None:
    """Checks that configs can be lanes of one step.

    Raises:
      ConfigError: a config that cannot run; configs that differ elsewhere than in `VARYING`;
        a mesh of several devices, a stage with `until`, `init_from`, a budget in seconds or
        joules, or wandb.
    """
    if not configs:
        raise ConfigError('batched runs need at least one config.')
    for config in configs:
        check_form(config)
        setup.check(config)
    first, *others = (as_dict(config) for config in configs)
    for i, other in enumerate(others, 1):
        _check_alike(first, other, i)
    count = parallel.make_mesh(first['mesh']).size
    if count > 1:
        raise ConfigError(
            f'batched runs share one device, but config.mesh spans {count}; set every axis of '
            'config.mesh to 1, or train the runs one by one.'
        )
    _check_stages(plan(first))
    unit, _ = extent(first)
    if unit in ('seconds', 'joules'):
        raise ConfigError(
            f'config.budget counts {unit}, which batched runs share; count steps, tokens or flops '
            'instead, or train the runs one by one.'
        )
    if first['log']['wandb']:
        raise ConfigError(
            "config.log.wandb follows one run at a time; set it to '', or train the runs one by "
            'one.'
        )


def _check_stages(stages: Sequence[Stage]) -> None:
    if stages[0].config['init_from']:
        raise ConfigError(
            f'batched runs begin from fresh values, but {stages[0].where}.init_from names a run; '
            'train the runs one by one.'
        )
    for stage in stages:
        if stage.until is not None:
            raise ConfigError(
                f"{stage.where}.until ends a stage by its own run's loss, but batched runs go from "
                'stage to stage together; leave it out, or train the runs one by one.'
            )


def _check_alike(first: Mapping[str, Any], other: Mapping[str, Any], index: int) -> None:
    old, new = ({k: v for k, v in c.items() if k not in VARYING} for c in (first, other))
    wrong = resume.changed(old, new, 'config')
    if wrong:
        raise ConfigError(
            f'batched runs may differ in {", ".join(VARYING)} only, but run {index} has another '
            f'{wrong[0].split(":")[0]} than run 0; train them one by one.'
        )


# ---- what is static ----------------------------------------------------------------------------


class LaneRuntime(Runtime):
    """A `Runtime` whose state, batches and steps have a leading axis of lanes.

    Args:
      configs: checked configs that may be batched.

    Attributes:
      configs: the resolved config of each lane.
      plans: the stages of each lane, which differ in seed and schedule.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]]):
        self.lanes = len(configs)
        super().__init__(configs[0])
        own = [{key: as_dict(config)[key] for key in VARYING} for config in configs]
        self.stages = plan(self._resolved)  # reference time is that of a run by itself
        self.configs = [{**self.config, **values} for values in own]
        if self.frozen:  # each lane may have a teacher of its own seed
            task = as_dict(configs[0])['task']
            mine = [{**config, 'task': task} for config in self.configs]
            self.configs = [teacher.resolve(config, self.dataset.info) for config in mine]
            _check_teachers(self.configs)
        self.plans = [plan(config) for config in self.configs]
        self._whole = parallel.replicated(self.mesh)  # one device: nothing is divided

    def _open_data(self, plain: dict[str, Any]) -> dict[str, Any]:
        """As for one run; names an attention that `vmap` can batch where documents need it."""
        self._resolved = config = super()._open_data(plain)
        execution = config['execution']
        # cuDNN takes documents as a bias or in its ragged layout, and jax can batch neither.
        asked = execution['attention']
        if asked == 'cudnn' and self._has_documents(config):
            raise ConfigError(
                "config.execution.attention 'cudnn' cannot keep documents apart in batched runs; "
                "name 'xla', or set config.data.packing to 'stream'."
            )
        if asked is None and platform() == 'gpu' and self._has_documents(config):
            return {**config, 'execution': {**execution, 'attention': 'xla'}}
        return config

    def _has_documents(self, config: Mapping[str, Any]) -> bool:
        def has(stage: Stage) -> bool:
            sampler = Runtime.sampler(self, stage)
            return 'segment_ids' in sampler.batch(sampler.initial(), slice(0, 1))

        return any(map(has, plan(config)))

    def initial_state(self, index: int = 0) -> dict[str, Any]:
        """Makes each lane's first state as a run by itself does, bit by bit, and stacks them."""
        return self._stack(*(self._first_state(config, index) for config in self.configs))

    @functools.cached_property
    def _stack(self) -> Any:
        return jax.jit(
            lambda *lanes: jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes),
            out_shardings=self._whole,
        )

    def abstract_sharded(self, index: int = -1) -> dict[str, Any]:
        """Returns the state's shapes with lanes and shardings."""
        return self._with_lanes(self.models[index].abstract)

    def given(self, index: int) -> dict[str, Any]:
        """Returns the shapes, with lanes and shardings, of what the model of a stage is given."""
        return self._with_lanes(self.models[index].built.abstract_state)

    def _with_lanes(self, shapes: Any) -> dict[str, Any]:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._whole),
            with_lanes(shapes, self.lanes),
        )

    def transition(self, stage: Stage) -> tuple[Any, StepCost]:
        """Returns (compiled `state -> state` of all lanes, what it costs each of them).

        A lane is grown by itself, since operators draw on the host, where `vmap` does not reach;
        lanes that draw from one seed share a program.
        """
        models = self.models[stage.index - 1], self.models[stage.index]
        programs: dict[int, tuple[Any, StepCost]] = {}
        seeds = []
        for own in self.plans:
            before, after = own[stage.index - 1 : stage.index + 1]
            pair, learned = (models[0].built, models[1].built), self.transitions.get(before.index)
            planned = transitions.plan(after, before.config, pair, learned)
            seeds.append(planned.shared['seed'])
            if seeds[-1] not in programs:
                programs[seeds[-1]] = self._compile_transition(stage, planned)
        split = jax.jit(
            lambda state: [jax.tree.map(operator.itemgetter(i), state) for i in range(self.lanes)],
            out_shardings=[models[0].shardings] * self.lanes,
        )
        apart = split.lower(self.abstract_sharded(stage.index - 1)).compile()
        together = self._stack.lower(*[models[1].abstract_sharded()] * self.lanes).compile()

        def grow(state: Any) -> Any:
            lanes = zip(seeds, apart(state), strict=True)
            return together(*(programs[seed][0](lane) for seed, lane in lanes))

        # A seed decides what is drawn, not how much: the cost is the same in all lanes.
        return grow, programs[seeds[0]][1]

    def sampler(self, stage: Stage) -> '_Samplers':
        """Returns the lanes' samplers as one."""
        make = super().sampler
        stages = [own[stage.index] for own in self.plans]
        seeds = [own.config['seed'] for own in stages]
        by_seed = dict(zip(seeds, stages, strict=True))
        return _Samplers({seed: make(own) for seed, own in by_seed.items()}, seeds)

    def loader(self, stage: Stage, position: dict[str, Any] | None) -> Any:
        """Returns an iterator of (placed batch [lanes, ...], position after it, seconds waited)."""
        sampler = self.sampler(stage)
        start = sampler.initial() if position is None else position
        put = functools.partial(jax.device_put, device=self._whole)
        return data.Loader(sampler, start, put=put)

    def raw_eval_step(self, index: int = -1) -> Any:
        """Returns the evaluation step: every lane's arrays, one batch for all."""
        return jax.vmap(super().raw_eval_step(index), in_axes=(0, 0, None))

    def eval_params(
        self, state: Mapping[str, Any], index: int = -1, progress: tuple[float, float] = DONE
    ) -> Any:
        """Returns the parameters to judge, of every lane."""
        key = self.models.index(self.models[index])
        if key not in self._eval_params:
            choose = jax.vmap(functools.partial(self._judged, index), in_axes=(0, None))
            self._eval_params[key] = jax.jit(choose, out_shardings=self._whole)
        return self._eval_params[key](state, np.array(progress, np.float32))

    def _judged(self, index: int, state: Mapping[str, Any], progress: jax.Array) -> Any:
        return self.raw_eval_params(state, index, progress)


def _check_teachers(configs: Sequence[Mapping[str, Any]]) -> None:
    """Checks that the teachers of all lanes have one form, and leave as much of the budget."""
    unit, _ = extent(configs[0])
    forms = [teacher.block_of(config) or {} for config in configs]
    for config, form in zip(configs[1:], forms[1:], strict=True):
        alike = teacher.spent(config, unit) == teacher.spent(configs[0], unit)
        if form['model'] != forms[0]['model'] or not alike:
            raise ConfigError(
                f'batched runs need teachers of one model and one cost, but {form["run"]} differs '
                f'from {forms[0]["run"]}; train the runs one by one.'
            )


class _Samplers:
    """The samplers of lanes as one: lanes of one seed share what is made.

    A position is `{seed: position}`; a batch has a leading axis of lanes.
    """

    def __init__(self, samplers: Mapping[int, Sampler], seeds: Sequence[int]):
        self._samplers = dict(samplers)
        self._seeds = list(seeds)
        one = self._samplers[self._seeds[0]]
        self.batch_size, self.workers = one.batch_size, one.workers

    def initial(self) -> Position:
        return {str(seed): one.initial() for seed, one in self._samplers.items()}

    def batch(self, position: Position, rows: RowIndex = None) -> Batch:
        made = {s: one.batch(position[str(s)], rows) for s, one in self._samplers.items()}
        keys = made[self._seeds[0]]
        return {key: np.stack([made[seed][key] for seed in self._seeds]) for key in keys}

    def advance(self, position: Position) -> Position:
        return {str(s): one.advance(position[str(s)]) for s, one in self._samplers.items()}

    def describe(self, position: Position, lane: int = 0) -> list[str]:
        seed = self._seeds[lane]
        return self._samplers[seed].describe(position[str(seed)])


# ---- the run -----------------------------------------------------------------------------------


class Lane:
    """One run of a group, with all that `finish.summary` asks of a trainer.

    Attributes:
      index: its place on the axis of lanes.
      error: why it ended before the others, '' while it is alive.
    """

    def __init__(self, group: 'Group', index: int, workdir: pathlib.Path):
        self.index, self.workdir = index, workdir
        self.runtime = group.runtime
        self.config = self.runtime.configs[index]
        self.ledger = Ledger()
        teacher.charge(self.ledger, self.config)
        self.results: dict[str, dict[str, float]] = {}
        self.row: dict[str, Any] | None = None
        self.error = ''
        self._group = group
        loop_lib.make_folder(workdir)
        loop_lib.refuse_other(workdir / 'config.json', self.config)

    def open_outputs(self) -> None:
        """Clears away an earlier attempt and opens the files."""
        for name in ('summary.json', 'report.html'):
            (self.workdir / name).unlink(missing_ok=True)
        shutil.rmtree(self.workdir / 'tensorboard', ignore_errors=True)
        write_json_atomic(self.workdir / 'config.json', self.config)
        self.writer = MetricsWriter(self.workdir, tensorboard=self.config['log']['tensorboard'])

    def settle(self) -> None:
        """Takes its part of time and energy, when it or the group has ended."""
        devices, joules = self._group.clock.devices, self._group.energy.joules()
        saved = self._group.clock.to_dict()
        self.clock = Clock.from_dict(saved, devices=devices, now=lambda: 0.0)
        self.energy = types.SimpleNamespace(joules=lambda: joules)
        # A copy: the stages that the others still have are not this lane's.
        self.memory, self.warnings = dict(self._group.memory), self._group.warnings
        self.compiler_options, self.kernels = self._group.compiler_options, self._group.kernels

    def write_row(self) -> None:
        """Writes the last row, which is complete now."""
        if self.row is not None:
            if self.row['step'] % self.config['log']['every_steps'] == 0 or 'eval' in self.row:
                self.writer.write(self.row)
            self.row = None

    @property
    def stopped_by(self) -> str | None:
        """What ended it early: an error of its own, or a signal to the group; else None."""
        return self.error or self._group.stopped_by

    def judged(self) -> dict[str, Any]:
        """Returns the params and buffers to evaluate."""
        return jax.tree.map(lambda x: x[self.index], self._group.judged())


class Group(loop_lib.Trainer):
    """The trainer of all lanes: its loop is that of one run, its books are kept lane by lane.

    Args:
      configs: configs that `check_batchable` has passed.
      workdirs: as many folders.

    Attributes:
      lanes: all of them, in order.
      alive: those that have not failed.
    """

    def __init__(self, configs: Sequence[Mapping[str, Any]], workdirs: Sequence[pathlib.Path]):
        self.runtime: LaneRuntime = LaneRuntime(configs)
        super().__init__(configs[0], workdirs[0], self.runtime)
        count = len(configs)
        self._time = _Share(time.perf_counter, count)
        self._joules = _Share(EnergyMeter().joules, count)
        self.clock = Clock(devices=jax.device_count(), now=self._time)
        self.energy: Any = types.SimpleNamespace(joules=self._joules)
        self.seed = np.array([config['seed'] for config in self.runtime.configs], np.uint32)
        self.lanes = [Lane(self, i, workdir) for i, workdir in enumerate(workdirs)]
        self.alive = list(self.lanes)

    def run(self) -> str | None:
        """Trains all lanes to the end or to a signal, whose name it returns."""
        with (
            parallel.mesh_context(self.runtime.mesh, self.runtime.rules),
            Stop() as self.stop,
        ):
            self._open_outputs()
            try:
                self.state = self.runtime.initial_state()
                self._run_stages()
            finally:
                self._close()
        for lane in self.alive:
            lane.settle()
        if self.stopped_by:
            self._warn(
                f'stopped by {self.stopped_by}: batched runs keep no checkpoints and begin again.'
            )
        return self.stopped_by

    def finish(
        self, lane: Lane, report: Callable[[pathlib.Path], Any] | None = None
    ) -> dict[str, Any]:
        """Returns a lane's summary; writes it, and the report, unless a signal came."""
        out = finish.summary(lane)
        out['batched'] = {'lanes': len(self.lanes)}
        if lane.error:
            out['error'] = lane.error
        if self.stopped_by:
            return {**out, 'stopped_by': self.stopped_by}
        write_json_atomic(lane.workdir / 'summary.json', out)
        if report is not None:
            report(lane.workdir)
        return out

    # ---- what a lane adds to the loop ------------------------------------------------------

    def _schedule(self, stage: Stage) -> Callable[[float], Any]:
        stages = [own[stage.index] for own in self.runtime.plans]
        made = [schedules.build(own.config['schedule']) for own in stages]
        return lambda progress: [schedule(progress) for schedule in made]

    def _charge_growth(self, cost: StepCost, stage: Stage) -> None:
        super()._charge_growth(cost, stage)  # the group's ledger decides how far all have come
        for lane in self.alive:
            lane.ledger.add_forward(cost, purpose=transitions.PURPOSE, stage=stage.name)

    def _stopping(self) -> bool:
        return super()._stopping() or not self.alive

    def _save_due(self) -> bool:
        return False

    def _record(self, flight: Any, compiled: CompiledStep, stage: Stage) -> None:
        """Waits for a step's metrics [lanes, metrics]; each lane's row before it is written."""
        table = self._fetch(flight).tolist()
        self._write_row()
        seconds, step = self._seconds(), flight.row['step']
        speed = self.speed.update(step, seconds, compiled.cost.tokens)
        for lane in list(self.alive):
            values = dict(zip(compiled.names, table[lane.index], strict=True))
            lane.ledger.add_step(compiled.cost, stage=stage.name)
            lane.row = {**flight.row, 'lr': flight.row['lr'][lane.index], **values}
            lane.row |= {'seconds': seconds, 'tokens_per_second': speed}
            del lane.row['weight']
            if values['skipped']:
                self._skipped(lane, flight, values, stage)
        if self.alive:
            assert self.alive[0].row is not None
            self.bar.update(self.alive[0].row)

    def _skipped(self, lane: Lane, flight: Any, values: Mapping[str, float], stage: Stage) -> None:
        """A step that left a lane's state alone: an overflow of float16, or its end."""
        lane.ledger.add_skipped()
        step = flight.row['step']
        if self.runtime.precision.loss_scale is not None:
            self._say(f'{lane.workdir.name}: {loop_lib.overflowed(step, values)}')
            return
        samples = self.runtime.sampler(stage).describe(flight.position, lane.index)
        lane.error = f'{loop_lib.not_finite(step, values, samples)}.'
        lane.write_row()
        lane.settle()
        self.alive.remove(lane)
        for shared in (self._time, self._joules):
            shared.divide(max(len(self.alive), 1))
        self._say(f'{lane.workdir.name}: {lane.error}')

    def _write_row(self) -> None:
        for lane in self.alive:
            lane.write_row()

    def _evaluate(self, due: list[evaluate.Evaluation]) -> None:
        runtime = self.runtime
        for evaluation in due:
            with self.clock('compile'):
                step = runtime.compile_eval(evaluation, self.stage)
            with self.clock('eval'):
                arrays = self.judged()
                sums = evaluate.add_up(
                    evaluation,
                    step,
                    arrays['params'],
                    arrays['buffers'],
                    runtime.putter(evaluation.batch_size),
                    self._stopping,
                )
            if sums is None:
                return
            self.evaluated[evaluation.name] = self.ledger.steps
            for lane in self.alive:
                own = {name: value[lane.index] for name, value in sums.items()}
                self._judge(lane, evaluation, evaluate.metrics(evaluation, own, runtime.task))

    def _judge(self, lane: Lane, evaluation: evaluate.Evaluation, result: dict[str, float]) -> None:
        cost = self.runtime.eval_cost(evaluation, self.stage)
        lane.ledger.add_forward(cost, purpose='eval')
        lane.results[evaluation.name] = result
        if lane.row is not None:
            lane.row.setdefault('eval', {})[evaluation.name] = result
        shown = '  '.join(f'{k} {v:.4g}' for k, v in result.items())
        self._say(f'{lane.workdir.name}: step {lane.ledger.steps}  eval {evaluation.name}: {shown}')

    # ---- outputs ---------------------------------------------------------------------------

    def _open_outputs(self) -> None:
        for lane in self.lanes:
            lane.open_outputs()
        unit, total = self.runtime.stages[0].unit, self.runtime.stages[0].total
        self.bar = make_progress(self.config['log']['progress'], unit, total)
        self._announce()
        self._say(f'{len(self.lanes)} runs at once; each has its own folder')

    def _close(self) -> None:
        self.bar.close()
        for lane in self.lanes:
            lane.writer.close()


class _Share:
    """A lane's part of something that all lanes alive use up together.

    Args:
      read: what all of them have used so far, or None where nothing measures it.
      among: lanes alive.
    """

    def __init__(self, read: Callable[[], float | None], among: int):
        self._read, self._among = read, among
        self._before, self._mark = 0.0, read()

    def __call__(self) -> Any:
        now = self._read()
        if now is None or self._mark is None:
            return None
        return self._before + (now - self._mark) / self._among

    def divide(self, among: int) -> None:
        """From here on so many lanes are alive."""
        self._before, self._mark = self() or 0.0, self._read()
        self._among = among
