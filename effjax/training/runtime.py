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
from effjax.core.errors import ConfigError
from effjax.costs import StepCost
from effjax.costs.reference import reference_seconds
from effjax.training import ema, evaluate, optimizers, setup
from effjax.training import state as state_lib
from effjax.training import step as step_lib
from effjax.training.compiled import CompiledStep, compile_train
from effjax.training.stages import Stage, plan


class Runtime:
    """A checked config made concrete, before its first step.

    Args:
      config: a config whose form and blocks have been checked.
      with_data: open the data, and check the config against it; without it (a look at shapes)
        there is no `dataset` and there are no evaluations.

    Attributes:
      config: the resolved config, as plain dicts: what the data knows is filled in.
      mesh: the devices.
      rules: logical axis -> mesh axes.
      dataset: the data of the first stage.
      stages: the run's stages.
      task: the objective.
      precision: dtypes and loss scaling.
      built: the model without arrays.
      abstract: shapes and dtypes of the train state.
      shardings: a sharding for each of its leaves.
      params: number of parameters.
      lanes: runs that one step trains at once (`training.batched`); 0 without such an axis.

    Raises:
      ConfigError: a model, batch or mesh that does not fit, or a stage that changes the form of
        the optimizer's state.
      DataError: missing or empty data.
      DeviceError: a mesh larger than the devices.
    """

    lanes = 0

    def __init__(self, config: Mapping[str, Any], *, with_data: bool = True):
        parallel.initialize()
        plain = as_dict(config)
        self.mesh = parallel.make_mesh(plain['mesh'])
        self.rules = parallel.make_rules(plain['sharding'])
        setup.check_mesh(plain, self.mesh, self.rules)
        self._datasets: dict[str, Any] = {}
        self._eval_steps: dict[str, Any] = {}
        self._record = max(stage.config['seq_len'] for stage in plan(plain))
        self.config = self._open_data(plain) if with_data else plain
        self.stages = plan(self.config)
        self.task = setup.build_task(self.config)
        self._sequence = self.task.data == 'text'
        self._evaluations = [self._plan_evaluations(s) for s in self.stages] if with_data else []
        self.precision = precision.build(self.config['precision'])
        # Built for the longest rows that any stage will ask for.
        longest = {**self.config, 'seq_len': self._record}
        self.built = models.build(longest, mesh=self.mesh)
        setup.check_sampling(self.config, self.built.model)
        self.params = trees.count(self.built.abstract_state['params'])
        optimizer = self.optimizer(self.stages[0])
        scale, average = self.precision.loss_scale, bool(self.config['ema'])
        self.abstract = state_lib.abstract(self.built, optimizer, scale, average)
        self._check_optimizers()
        self.shardings = state_lib.shardings(self.built, optimizer, self.abstract, self.mesh)

    def _open_data(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Opens the data of every stage; returns the config with what it knows filled in."""
        first, *later = plan(plain)
        self.dataset = self._dataset(first.config)
        for stage in later:
            setup.check_same_data(self.dataset.info, self._dataset(stage.config).info, stage.index)
        return setup.resolve(plain, self.dataset.info)

    def _check_optimizers(self) -> None:
        """Checks that every stage's optimizer keeps the state that the first one made."""
        first = trees.flatten(self.abstract['optimizer'])
        structure: Any = jax.tree.structure(self.abstract['optimizer'])
        for stage in self.stages[1:]:
            state = self.optimizer(stage).abstract_state(self.abstract['params'])
            wrong = trees.differences(first, trees.flatten(state))
            wrong += [] if jax.tree.structure(state) == structure else ['other parts']
            if wrong:
                raise ConfigError(
                    f"config.stages.{stage.index}.optimizer changes the form of the optimizer's "
                    f'state ({wrong[0]}), which goes on from stage to stage; set what it stores '
                    'in config.optimizer, for all stages.'
                )

    @property
    def data_digest(self) -> str:
        """Names the content of the data of all stages; '' without data."""
        found = [dataset.info.digest for dataset in self._datasets.values()]
        return found[0] if len(found) == 1 else '+'.join(found)

    # ---- state -----------------------------------------------------------------------------

    def initial_state(self) -> dict[str, Any]:
        """Makes the first train state under one jit, every leaf born with its sharding."""
        return self._first_state(self.config)

    def _first_state(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Makes the first state of a config that differs from this run's in its seeds at most."""
        first = config['init_seed']
        key = jax.random.key(config['seed'] if first < 0 else first)
        return parallel.init_sharded(self._initialiser, self.shardings, key)

    @functools.cached_property
    def _initialiser(self) -> Callable[[jax.Array], dict[str, Any]]:
        # One function for all seeds: jax compiles a function once, but not its equals.
        return state_lib.initialiser(
            self.built,
            self.optimizer(self.stages[0]),
            self.precision.loss_scale,
            bool(self.config['ema']),
        )

    def abstract_sharded(self) -> dict[str, Any]:
        """Returns the state's shapes with shardings: what a restore needs."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            self.abstract,
            self.shardings,
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
        config = stage.config
        return optimizers.build(
            config['optimizer'],
            meta=self.built.meta['params'],
            lr_scales=config['lr_scales'],
            decay_scales=config['decay_scales'],
        )

    def raw_step(self, stage: Stage) -> Any:
        """Returns a stage's train step, a pure function to be jitted."""
        average = None
        if self.config['ema']:
            average = functools.partial(ema.update, decay=self.config['ema'])
        return step_lib.make_train_step(
            self.built.graphdef,
            self.task,
            self.optimizer(stage),
            loss_scale=self.precision.loss_scale,
            clip_norm=stage.config['clip_norm'],
            accumulate=stage.config['accumulate'],
            ema=average,
        )

    def costs(self, stage: Stage) -> dict[str, Any]:
        """Returns `part -> Cost` of one batch of a stage."""
        return self.task.cost(self.built.model, stage.config['batch_size'], stage.config['seq_len'])

    def compile(self, stage: Stage, batch: Mapping[str, jax.Array]) -> CompiledStep:
        """Compiles a stage's step for a placed batch."""
        config = stage.config
        # Of all stages: a table that does not cover a later one is an error now, not then.
        charged = [reference_seconds(s.config) for s in self.stages]
        return compile_train(
            self.raw_step(stage),
            state=self.abstract,
            shardings=self.shardings,
            batch=batch,
            mesh=self.mesh,
            parts=self.costs(stage),
            units=self.task.units(config['batch_size'], config['seq_len']),
            optimizer_flops=self.optimizer(stage).flops(self.abstract['params']),
            options=config['execution']['compiler_options'],
            reference_seconds=charged[stage.index],
            lanes=self.lanes,
        )

    def eval_cost(self, evaluation: evaluate.Evaluation) -> StepCost:
        """Returns what one run of an evaluation costs: forward passes only."""
        size, length = evaluation.batch_size, evaluation.seq_len
        count = len(evaluation.source)
        examples, tokens = self.task.units(count * size, length)
        one = self.task.cost(self.built.model, size, length)
        parts = {k: c.times(count) for k, c in one.items()}
        return StepCost.forward(parts, examples=examples, tokens=tokens, tokens_computed=tokens)

    def compile_eval(self, evaluation: evaluate.Evaluation) -> Any:
        """Compiles `(params, buffers, batch) -> {name: [sum, weight]}`, once for each shape."""
        batch = next(iter(evaluation.source))
        placed = self.putter(evaluation.batch_size)(
            {key: array[evaluation.rows] for key, array in batch.items()}
        )
        shapes = repr({key: (array.shape, array.dtype) for key, array in placed.items()})
        if shapes not in self._eval_steps:
            state = self.abstract_sharded()
            step = jax.jit(self.raw_eval_step())
            lowered = step.lower(state['params'], state['buffers'], placed)
            self._eval_steps[shapes] = lowered.compile()
        return self._eval_steps[shapes]

    @functools.cached_property
    def eval_params(self) -> Any:
        """Jitted `state -> params` to judge: the average, or what the optimizer says."""
        return jax.jit(self.raw_eval_params, out_shardings=self.shardings['params'])

    def raw_eval_params(self, state: Mapping[str, Any]) -> Any:
        """Returns the parameters to judge, by a pure function to be jitted."""
        if self.config['ema']:
            return ema.params(state['ema'], state['params'])
        choose = self.optimizer(self.stages[0]).eval_params
        return choose(state['optimizer'], state['params'])

    def raw_eval_step(self) -> Any:
        """Returns the evaluation step, a pure function to be jitted."""
        return step_lib.make_eval_step(self.built.graphdef, self.task)
