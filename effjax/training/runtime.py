"""Everything static about a run: devices, data, model, optimizer, compiled steps.

The loop asks for these; a dry run, generation and studies build the same thing. Nothing here
changes while training.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from effjax import data, models, parallel, precision
from effjax.core import trees
from effjax.core.config import as_dict
from effjax.costs import StepCost
from effjax.costs.reference import reference_seconds
from effjax.tasks.distillation import TEACHER
from effjax.training import ema, evaluate, setup, sources, teacher, transitions
from effjax.training import state as state_lib
from effjax.training import step as step_lib
from effjax.training.checkpoints import Checkpointer
from effjax.training.compiled import CompiledStep, compile_train
from effjax.training.stage_models import StageModel, StageModels, stage_optimizer, with_shardings
from effjax.training.stages import Stage, check_learning, plan

DONE = (1.0, 1.0)  # progress of the run and of the stage at their ends


class Runtime:
    """A checked config made concrete, before its first step.

    Args:
      config: a config whose form and blocks have been checked.
      with_data: open the data, and check the config against it; without it (a look at shapes)
        there is no `dataset` and there are no evaluations.
      with_source: look at the run that this one begins from; a run that goes on does not need it.

    Attributes:
      config: the resolved config, as plain dicts: what the data knows is filled in.
      mesh: the devices.
      rules: logical axis -> mesh axes.
      dataset: the data of the first stage.
      stages: the run's stages.
      task: the objective.
      precision: dtypes and loss scaling.
      models: the model of each stage; stages whose models and views are equal share one.
      frozen: name -> model that the objective needs beside those.
      transitions: stage's index -> the growth that leads to it.
      source: the run that this one begins from, or None.
      source_model: that run's model, at this run's precision and with its optimizer.
      lanes: runs that one step trains at once (`training.batched`); 0 without such an axis.

    Raises:
      ConfigError: a model, batch or mesh that does not fit, or a stage that changes the form of
        the optimizer's state.
      DataError: missing or empty data.
      DeviceError: a mesh larger than the devices.
    """

    lanes = 0

    def __init__(
        self, config: Mapping[str, Any], *, with_data: bool = True, with_source: bool = True
    ):
        parallel.initialize()
        plain = as_dict(config)
        self.mesh = parallel.make_mesh(plain['mesh'])
        self.rules = parallel.make_rules(plain['sharding'])
        setup.check_mesh(plain, self.mesh, self.rules)
        self._datasets: dict[str, Any] = {}
        self._eval_steps: dict[str, Any] = {}
        self._eval_params: dict[int, Any] = {}
        self._initialisers: dict[int, Any] = {}
        self._record = max(stage.config['seq_len'] for stage in plan(plain))
        config = self._open_data(plain) if with_data else plain
        self.config = teacher.resolve(config, self.dataset.info if with_data else None)
        self.stages = plan(self.config)
        self.task = setup.build_task(self.config)
        self.frozen = self._frozen_models()
        self._sequence = self.task.data == 'text'
        self._evaluations = [self._plan_evaluations(s) for s in self.stages] if with_data else []
        self.precision = precision.build(self.config['precision'])
        self._maker = StageModels(
            self.config,
            self.stages,
            self.mesh,
            self.precision.loss_scale,
            self.frozen,
            self._record,
        )
        self.source: sources.Source | None = None
        self.source_model: StageModel | None = None
        self._source_config: dict[str, Any] = {}
        # The form of LiGO's maps depends on the small model, wherever a run goes on.
        needed = with_source or self.stages[0].maps == 'learn'
        if needed and self.stages[0].config.get('init_from'):
            self._open_source()
        begin = (self._source_config, self.source_model) if self.source_model else None
        self.models, self.transitions = self._maker.make(begin)
        for model in self.models if self.frozen else ():
            self.task = self.task.taught(model.built.model, self.frozen[TEACHER])
        setup.check_sampling(self.config, self.built.model)
        self._check_learning()
        if self.source is not None and with_source:
            self._check_source(self.source)

    def _frozen_models(self) -> dict[str, models.Built]:
        """Builds what the objective needs beside the model that is trained: its teacher."""
        built = teacher.build(self.config, self.mesh)
        return {} if built is None else {TEACHER: built}

    def _open_source(self) -> None:
        """Reads what the run that this one begins from says of itself."""
        stage = self.stages[0]
        where = f'{stage.where}.init_from'
        source = sources.read(stage.config['init_from'], where, self.config['seed'])
        placed = sources.placed(source.config, self.config)
        self._of_source = Runtime(placed, with_data=False, with_source=False)
        theirs = self._of_source.stages[self._of_source.stage_of(source.manifest)]
        self._source_config = {**stage.config, 'model': theirs.config['model']}
        self.source, self.source_model = source, self._maker.of_source(theirs.config['model'])

    def _check_source(self, source: sources.Source) -> None:
        """Checks that the run that this one begins from fits it."""
        stage, first = self.stages[0], self.models[0]
        more = teacher.spent(self.config, stage.unit) or 0.0
        sources.check_charge(source, stage.unit, stage.end, more)
        index = self._of_source.stage_of(source.manifest)
        theirs = self._of_source.models[index]
        assert self.source_model is not None
        sources.check_arrays(source, theirs, self.source_model)
        if self._evaluations and self.task.data == 'text':
            sources.check_tokenizer(source, self.dataset.info.tokenizer.digest)
        if stage.grow is None:
            blocks = (self._source_config['model'], stage.config['model'])
            built = (self.source_model.built, first.built)
            params = (built[0].abstract_state['params'], built[1].abstract_state['params'])
            sources.check_model(source, blocks, params)

    @property
    def built(self) -> models.Built:
        """The model that the run ends with, without arrays."""
        return self.models[-1].built

    @property
    def abstract(self) -> dict[str, Any]:
        """Shapes and dtypes of the train state that the run ends with."""
        return self.models[-1].abstract

    @property
    def shardings(self) -> dict[str, Any]:
        """A sharding for each of its leaves."""
        return self.models[-1].shardings

    @property
    def params(self) -> int:
        """Number of parameters of the model that the run ends with."""
        return self.models[-1].params

    def _open_data(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Opens the data of every stage; returns the config with what it knows filled in."""
        first, *later = plan(plain)
        self.dataset = self._dataset(first.config)
        for stage in later:
            setup.check_same_data(self.dataset.info, self._dataset(stage.config).info, stage.where)
        return setup.resolve(plain, self.dataset.info)

    def _check_learning(self) -> None:
        """Checks that a phase that learns maps fits into its stage, where its steps are known."""
        for stage in (s for s in self.stages if s.limit):
            config = stage.config
            examples, tokens = self.task.units(config['batch_size'], config['seq_len'])
            sizes = {
                'examples': examples, 'tokens': tokens, 'model_flops': self.step_flops(stage)
            }  # fmt: skip
            if stage.unit in sizes:
                start = max(stage.start, self._charged(stage.unit))
                check_learning(stage, stage.end - start, sizes[stage.unit])

    def _charged(self, unit: str) -> float:
        """What of a budget other runs have used before the first step."""
        source = self.source.used(unit) if self.source and self.source.charge else 0.0
        return source + (teacher.spent(self.config, unit) or 0.0)

    @property
    def data_digest(self) -> str:
        """Names the content of the data of all stages; '' without data."""
        found = [dataset.info.digest for dataset in self._datasets.values()]
        return found[0] if len(found) == 1 else '+'.join(found)

    # ---- state -----------------------------------------------------------------------------

    def initial_state(self, index: int = 0) -> dict[str, Any]:
        """Makes a first train state under one jit, every leaf born with its sharding.

        Args:
          index: of the stage whose model it is of.
        """
        return self._first_state(self.config, index)

    def _first_state(self, config: Mapping[str, Any], index: int = 0) -> dict[str, Any]:
        """Makes the first state of a config that differs from this run's in its seeds at most."""
        first = config['init_seed']
        key = jax.random.key(config['seed'] if first < 0 else first)
        shardings = self._without_frozen(self.models[index].shardings)
        state = parallel.init_sharded(self._initialiser(index), shardings, key)
        return self._with_frozen(state, config)

    def _without_frozen(self, state: dict[str, Any]) -> dict[str, Any]:
        """Returns a state's tree without the arrays that are read, not made."""
        made = {k: v for k, v in state['frozen'].items() if k not in self.frozen}
        return {**state, 'frozen': made}

    def _with_frozen(self, state: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        read = {name: teacher.load(config, built) for name, built in self.frozen.items()}
        return {**state, 'frozen': {**state['frozen'], **read}}

    def _initialiser(self, index: int) -> Callable[[jax.Array], dict[str, Any]]:
        # One function for all seeds: jax compiles a function once, but not its equals.
        if index not in self._initialisers:
            self._initialisers[index] = self._make_initialiser(self.stages[index])
        return self._initialisers[index]

    def source_state(self) -> dict[str, Any]:
        """Returns the first state of the source's model, with its weights.

        Raises:
          CheckpointError: the checkpoint is damaged, or its optimizer kept another state.
        """
        source, model, theirs = self.source, self.source_model, self._of_source
        assert source is not None and model is not None
        restored = Checkpointer(source.folder / 'checkpoints').restore(
            lambda found: theirs.abstract_sharded(theirs.stage_of(found)), source.step
        )
        index, state = theirs.stage_of(restored.manifest), restored.state
        if source.keeps_optimizer:
            what = f"{source.where}: the optimizer's state of {source.folder}"
            optimizer = trees.strict(model.abstract['optimizer'], state['optimizer'], what)
            params = state['params']
        else:
            params, optimizer = theirs.eval_params(state, index, source.progress), None
        make = functools.partial(
            state_lib.with_arrays,
            optimizer=self._maker.source_optimizer(model),
            loss_scale=self.precision.loss_scale,
            ema=bool(self.config['ema']),
            like=model.abstract,
        )
        shardings = self._without_frozen(model.shardings)
        first = jax.jit(make, out_shardings=shardings)(params, state['buffers'], optimizer)
        return self._with_frozen(first, self.config)

    def _make_initialiser(self, stage: Stage) -> Callable[[jax.Array], dict[str, Any]]:
        if stage.maps == 'learn':
            optimizer = self.optimizer(stage)
            small = self._initialiser(stage.index - 1) if stage.index else self._small_source()
            grow = self.transitions[stage.index].apply
            return lambda key: grow(small(key), optimizer)
        return state_lib.initialiser(
            self.models[stage.index].built,
            self.optimizer(stage),
            self.precision.loss_scale,
            bool(stage.config['ema']),
        )

    def _small_source(self) -> Callable[[jax.Array], dict[str, Any]]:
        assert self.source_model is not None
        optimizer = self._maker.source_optimizer(self.source_model)
        scale, average = self.precision.loss_scale, bool(self.config['ema'])
        return state_lib.initialiser(self.source_model.built, optimizer, scale, average)

    def stage_of(self, manifest: Mapping[str, Any]) -> int:
        """Returns the index of the stage that a checkpoint's state belongs to."""
        return min(int(manifest['stage']), len(self.stages) - 1)

    def abstract_sharded(self, index: int = -1) -> dict[str, Any]:
        """Returns the shapes of a stage's state with shardings: what a restore needs."""
        return self.models[index].abstract_sharded()

    def given(self, index: int) -> dict[str, Any]:
        """Returns the shapes, with shardings, of what the model of a stage is given."""
        built = self.models[index].built
        return with_shardings(built.abstract_state, built.shardings)

    def transition(self, stage: Stage) -> tuple[Any, StepCost]:
        """Returns (compiled `state -> state` of a stage that grows its model, what it costs)."""
        return self._compile_transition(stage, self.transitions[stage.index])

    def _compile_transition(
        self, stage: Stage, planned: transitions.Transition
    ) -> tuple[Any, StepCost]:
        before = self.models[stage.index - 1] if stage.index else self.source_model
        after = self.models[stage.index]
        assert before is not None
        return transitions.compile_transition(
            planned,
            self.optimizer(stage),
            before.abstract_sharded(),
            after.shardings,
        )

    # ---- data ------------------------------------------------------------------------------

    def sampler(self, stage: Stage) -> Any:
        """Returns the sampler of a stage: batches as a pure function of a position."""
        config = stage.config
        dataset = self._dataset(config)
        return dataset.train(config['batch_size'], config['seq_len'], config['seed'])

    def loader(self, stage: Stage, position: dict[str, Any] | None) -> Any:
        """Returns an iterator of (placed batch, position after it, seconds waited)."""
        sampler, size = self.sampler(stage), stage.config['batch_size']
        start = sampler.initial() if position is None else position
        return data.Loader(sampler, start, rows=self._rows(size), put=self.putter(size))

    def putter(self, batch_size: int) -> Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]:
        """Returns what places this process's rows of a batch on the mesh."""
        return functools.partial(
            parallel.put_batch,
            mesh=self.mesh,
            batch_size=batch_size,
            sequence=self._sequence,
            rules=self.rules,
        )

    def evaluations(self, stage: Stage) -> list[evaluate.Evaluation]:
        """Returns the evaluations, with the stage's batch size and sequence length."""
        return self._evaluations[stage.index]

    def _plan_evaluations(self, stage: Stage) -> list[evaluate.Evaluation]:
        config = stage.config
        return evaluate.plan(
            self.config,
            self._dataset(config),
            config['batch_size'],
            config['seq_len'],
            self._rows,
        )

    def _rows(self, batch_size: int) -> slice:
        return parallel.process_rows(batch_size, self.mesh, rules=self.rules)

    def _dataset(self, config: Mapping[str, Any]) -> Any:
        key = repr(config['data'])
        if key not in self._datasets:
            self._datasets[key] = data.build(config['data'], seq_len=self._record)
        return self._datasets[key]

    # ---- steps -----------------------------------------------------------------------------

    def optimizer(self, stage: Stage) -> Any:
        """Returns the optimizer with a stage's settings."""
        model = self.models[stage.index]
        return stage_optimizer(stage, model.meta or model.built.meta['params'])

    def task_at(self, progress: tuple[float, float], task: Any = None) -> Any:
        """Returns the objective of what follows once shares of (run, stage) are done.

        Args:
          progress: both shares.
          task: the objective so far; None takes the run's.
        """
        task = task or self.task
        return task.at(progress) if hasattr(task, 'at') else task

    def raw_step(self, stage: Stage, task: Any = None) -> Any:
        """Returns a stage's train step, a pure function to be jitted, for `task_at`'s objective."""
        average = None
        if stage.config['ema']:
            average = functools.partial(ema.update, decay=stage.config['ema'])
        return step_lib.make_train_step(
            self.models[stage.index].built.graphdef,
            task or self.task_at((0.0, 0.0)),
            self.optimizer(stage),
            loss_scale=self.precision.loss_scale,
            view=self.models[stage.index].view,
            clip_norm=stage.config['clip_norm'],
            accumulate=stage.config['accumulate'],
            ema=average,
        )

    def costs(self, stage: Stage) -> dict[str, Any]:
        """Returns `part -> Cost` of one batch of a stage."""
        model, config = self.models[stage.index], stage.config
        parts = self.task.cost(model.built.model, config['batch_size'], config['seq_len'])
        return {**parts, **model.extra}

    def frozen_costs(self, stage: Stage, task: Any = None) -> dict[str, Any]:
        """Returns `part -> Cost` of the frozen models' forward passes in one step of a stage."""
        task = task or self.task_at((0.0, 0.0))
        if not hasattr(task, 'frozen_cost'):
            return {}
        return task.frozen_cost(stage.config['batch_size'], stage.config['seq_len'])

    def step_flops(self, stage: Stage) -> float:
        """Returns the model FLOPs of a first step of a stage."""
        trained = sum(cost.train_flops for cost in self.costs(stage).values())
        return trained + sum(cost.model_flops for cost in self.frozen_costs(stage).values())

    def compile(
        self, stage: Stage, batch: Mapping[str, jax.Array], task: Any = None
    ) -> CompiledStep:
        """Compiles a stage's step for a placed batch, by default with the run's first objective."""
        config, model = stage.config, self.models[stage.index]
        # Of all stages: a table that does not cover a later one is an error now, not then.
        charged = [reference_seconds(s.config) for s in self.stages]
        return compile_train(
            self.raw_step(stage, task),
            state=model.abstract,
            shardings=model.shardings,
            batch=batch,
            mesh=self.mesh,
            parts=self.costs(stage),
            forward=self.frozen_costs(stage, task),
            units=self.task.units(config['batch_size'], config['seq_len']),
            optimizer_flops=self.optimizer(stage).flops(model.abstract['params']),
            options=config['execution']['compiler_options'],
            reference_seconds=charged[stage.index],
            lanes=self.lanes,
        )

    def eval_cost(self, evaluation: evaluate.Evaluation, index: int = -1) -> StepCost:
        """Returns what one run of an evaluation costs: forward passes only.

        Args:
          evaluation: of a stage.
          index: of the stage whose model is judged.
        """
        size, length = evaluation.batch_size, evaluation.seq_len
        count = len(evaluation.source)
        examples, tokens = self.task.units(count * size, length)
        one = self.task.cost(self.models[index].built.model, size, length)
        parts = {k: c.times(count) for k, c in one.items()}
        return StepCost.forward(parts, examples=examples, tokens=tokens, tokens_computed=tokens)

    def compile_eval(self, evaluation: evaluate.Evaluation, index: int = -1) -> Any:
        """Compiles `(params, buffers, batch) -> {name: [sum, weight]}`, once for each shape.

        Args:
          evaluation: of a stage.
          index: of the stage whose model is judged.
        """
        batch = next(iter(evaluation.source))
        placed = self.putter(evaluation.batch_size)(
            {key: array[evaluation.rows] for key, array in batch.items()}
        )
        model = self.models[index]
        batches = {key: (array.shape, array.dtype) for key, array in placed.items()}
        shapes = repr((batches, self.models.index(model)))
        if shapes not in self._eval_steps:
            given = self.given(index)
            step = jax.jit(self.raw_eval_step(index))
            lowered = step.lower(given['params'], given['buffers'], placed)
            self._eval_steps[shapes] = lowered.compile()
        return self._eval_steps[shapes]

    def eval_params(
        self, state: Mapping[str, Any], index: int = -1, progress: tuple[float, float] = DONE
    ) -> Any:
        """Returns the parameters to judge: the average, or what the optimizer says.

        Args:
          state: a train state.
          index: of a stage with its model.
          progress: the shares of the run and of the stage that are done.
        """
        model = self.models[index]
        key = self.models.index(model)
        if key not in self._eval_params:
            choose = functools.partial(self.raw_eval_params, index=index)
            shardings = model.built.shardings['params']
            self._eval_params[key] = jax.jit(choose, out_shardings=shardings)
        return self._eval_params[key](state, progress=np.array(progress, np.float32))

    def raw_eval_params(
        self, state: Mapping[str, Any], index: int = -1, progress: Any = DONE
    ) -> Any:
        """Returns the parameters to judge, by a pure function to be jitted."""
        if state['ema']:
            params = ema.params(state['ema'], state['params'])
        else:
            choose = self.optimizer(self.stages[index]).eval_params
            params = choose(state['optimizer'], state['params'])
        view = self.models[index].view
        return view(params, state['frozen'], progress) if view else params

    def raw_eval_step(self, index: int = -1) -> Any:
        """Returns the evaluation step of a stage's model, a pure function to be jitted."""
        return step_lib.make_eval_step(self.models[index].built.graphdef, self.task)
