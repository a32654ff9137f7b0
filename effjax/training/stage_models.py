"""The models of a run's stages, without arrays: their train states, and what leads to each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from effjax import models
from effjax.core import trees
from effjax.core.cost import Cost
from effjax.core.errors import ConfigError
from effjax.training import learning, optimizers, transitions
from effjax.training import state as state_lib
from effjax.training.stages import Stage
from effjax.training.step import View


@dataclasses.dataclass(frozen=True, eq=False)  # one is another only if it is the same
class StageModel:
    """The model of one or several stages, without arrays.

    Attributes:
      built: what `models.build` returned.
      abstract: shapes and dtypes of the train state.
      shardings: a sharding for each of its leaves.
      view: what the model is given of the state's parameters (`step.View`); None: them all.
      meta: metadata of the state's parameters, where they are not the model's.
      extra: what a view computes: part -> cost of a forward pass.
    """

    built: models.Built
    abstract: dict[str, Any]
    shardings: dict[str, Any]
    view: View | None = None
    meta: Any = None
    extra: Mapping[str, Cost] = dataclasses.field(default_factory=dict)

    @property
    def params(self) -> int:
        """Number of parameters."""
        return trees.count(self.built.abstract_state['params'])

    def abstract_sharded(self) -> dict[str, Any]:
        """Returns the state's shapes with shardings: what a restore needs."""
        return with_shardings(self.abstract, self.shardings)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Returns shape structs with their shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )


def stage_optimizer(stage: Stage, meta: Any) -> Any:
    """Returns the optimizer with a stage's settings.

    Args:
      stage: the stage.
      meta: a `core.axes.Meta` for each parameter.
    """
    config = stage.config
    return optimizers.build(
        config['optimizer'],
        meta=meta,
        lr_scales=config['lr_scales'],
        decay_scales=config['decay_scales'],
    )


class StageModels:
    """Makes the models of all stages, each for the longest rows that any stage will ask for.

    Args:
      config: the resolved config.
      stages: the run's stages.
      mesh: the devices.
      loss_scale: dynamic loss scaling, or None.
      frozen: name -> model that the objective needs beside those.
      record: the longest rows.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        stages: Sequence[Stage],
        mesh: Mesh,
        loss_scale: Any,
        frozen: Mapping[str, models.Built],
        record: int,
    ):
        self._config, self._stages, self._mesh = config, stages, mesh
        self._loss_scale, self._frozen, self._record = loss_scale, frozen, record

    def make(
        self, source: tuple[Mapping[str, Any], StageModel] | None
    ) -> tuple[list[StageModel], dict[int, transitions.Transition]]:
        """Returns the model of each stage, and stage's index -> what leads to it.

        Stages whose models and views are equal share one.

        Args:
          source: config and model of a run that the first stage begins from, or None.

        Raises:
          ConfigError: a change that an operator cannot make, an optimizer that changes the form of
            its state, or a stage that may end before its view shows all.
        """
        out: list[StageModel] = []
        led: dict[int, transitions.Transition] = {}
        for stage in self._stages:
            if out and stage.grow is None:
                out.append(out[-1])
                continue
            built = self._build(stage.config['model'])
            before = (self._stages[stage.index - 1].config, out[-1]) if out else source
            if stage.grow is not None and before is not None:
                pair, learned = (before[1].built, built), led.get(stage.index - 1)
                led[stage.index] = transitions.plan(stage, before[0], pair, learned)
            if stage.maps == 'learn':
                assert before is not None
                out.append(self._learning(led[stage.index], built, before[1]))
            else:
                out.append(StageModel(built, *self._state(stage, built)))
            if before is not None and stage.grow is not None and not stage.maps:
                _check_moments(led[stage.index], before[1], out[-1])
        self._check_optimizers(out)
        for index, transition in led.items():
            # A stage without growth behind one with a view has the same model, and sees it all.
            view = _view(transition)
            if view is not None:
                out[index] = dataclasses.replace(out[index], view=view)
        return out, led

    def of_source(self, block: Mapping[str, Any]) -> StageModel:
        """Returns the model of a run that this one begins from, with the state of this one."""
        built = self._build(block)
        return StageModel(built, *self._state(self._first_kept(), built))

    def source_optimizer(self, model: StageModel) -> Any:
        """Returns this run's optimizer for the model of `of_source`."""
        return stage_optimizer(self._first_kept(), model.built.meta['params'])

    def _first_kept(self) -> Stage:
        """Returns the first stage with the run's optimizer, which one that learns maps has not."""
        return next(stage for stage in self._stages if stage.maps != 'learn')

    def _build(self, block: Mapping[str, Any]) -> models.Built:
        longest = {**self._config, 'model': block, 'seq_len': self._record}
        return models.build(longest, mesh=self._mesh)

    def _state(self, stage: Stage, built: models.Built) -> tuple[Any, Any]:
        """Returns shapes and shardings of the train state of a model."""
        optimizer = stage_optimizer(stage, built.meta['params'])
        average = bool(stage.config['ema'])
        abstract = state_lib.abstract(built, optimizer, self._loss_scale, average, self._frozen)
        shardings = state_lib.shardings(built, optimizer, abstract, self._mesh, self._frozen)
        return abstract, shardings

    def _learning(
        self, transition: transitions.Transition, built: models.Built, before: StageModel
    ) -> StageModel:
        """Returns the model of a stage that learns the maps from the one before it."""
        assert isinstance(transition, transitions.ToMaps)
        stage, change = transition.stage, transition.change
        trained = learning.as_trained(transition.operator, change, built, self._mesh)
        abstract, shardings = self._state(stage, trained)
        for state, small in ((abstract, before.abstract), (shardings, before.shardings)):
            state['frozen'] = {**small['frozen'], learning.SMALL: small['params']}
        view = learning.view_of(change, built)
        cost = learning.cost(view, abstract['params'], before.abstract['params'])
        return StageModel(
            dataclasses.replace(built, fallbacks=trained.fallbacks),
            abstract,
            shardings,
            view,
            trained.meta['params'],
            {learning.PART: cost.times(stage.config['accumulate'])},
        )

    def _check_optimizers(self, made: Sequence[StageModel]) -> None:
        """Checks that every stage's optimizer keeps the state that the first one made."""
        for stage in self._stages[1:]:
            model = made[stage.index]
            first = trees.flatten(model.abstract['optimizer'])
            structure: Any = jax.tree.structure(model.abstract['optimizer'])
            optimizer = stage_optimizer(stage, model.meta or model.built.meta['params'])
            state = optimizer.abstract_state(model.abstract['params'])
            wrong = trees.differences(first, trees.flatten(state))
            wrong += [] if jax.tree.structure(state) == structure else ['other parts']
            if wrong:
                raise ConfigError(
                    f"{stage.where}.optimizer changes the form of the optimizer's "
                    f'state ({wrong[0]}), which goes on from stage to stage; set what it stores '
                    'in config.optimizer, for all stages.'
                )


def _check_moments(
    transition: transitions.Transition, before: StageModel, after: StageModel
) -> None:
    """Checks that moments which are grown have the form that the stage's optimizer keeps."""
    if transition.moments == 'reset':
        return
    forms: list[Any] = [jax.tree.structure(m.abstract['optimizer']) for m in (before, after)]
    if forms[0] != forms[1]:
        raise ConfigError(
            f'{transition.stage.where}.optimizer keeps another state than the stage before, whose '
            'moments it grows; set what it stores in config.optimizer, for all stages, or '
            "grow.moments='reset'."
        )


def _view(transition: transitions.Transition) -> View | None:
    """Returns the view of a stage that lets growth in by and by."""
    view, stage = transition.view, transition.stage
    if view is not None and stage.until is not None:
        raise ConfigError(
            f'{stage.where}.until would end the stage before {transition.operator.name!r} has let '
            'all of the growth in; give until to a stage behind it.'
        )
    return view
