"""Transitions: what stands between two stages whose models differ.

A transition is an operator of `effjax.growth`, compiled with the large state's shardings. It is
deterministic in the run's seed and the stage's index, so that a killed run makes it again. LiGO's
has two halves around the stage that learns its maps: `ToMaps` and `FromMaps`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from effjax import growth
from effjax.core.errors import ConfigError
from effjax.core.registry import check_arguments, lookup
from effjax.costs import StepCost, walk
from effjax.growth import ligo
from effjax.training import ema
from effjax.training.learning import SMALL
from effjax.training.stages import LEARNING, Stage

# Of `growth.grow` rather than of an operator.
SHARED = ('moments', 'counts', 'seed')
PURPOSE = 'growth'  # on the ledger


@dataclasses.dataclass(frozen=True)
class Transition:
    """The growth of one stage, checked, before anything is compiled.

    Attributes:
      stage: the stage that it leads to.
      operator: what grows the model.
      change: from which sizes to which.
      shared: `moments`, `counts` and `seed`.
    """

    stage: Stage
    operator: growth.Operator
    change: growth.Change
    shared: Mapping[str, Any]

    def apply(self, state: Any, optimizer: Any) -> Any:
        """Returns the large train state of a small one; a pure function, to be jitted."""
        return growth.transform(
            state, self.change, self.operator, optimizer=optimizer, **self.shared
        )

    @property
    def view(self) -> growth.View | None:
        """What the model is given of its parameters in the stage, where not them all."""
        return self.operator.view(self.change)

    @property
    def moments(self) -> str:
        """What becomes of the optimizer's state: 'grow' or 'reset'."""
        return self.shared.get('moments') or self.operator.moments

    @property
    def words(self) -> str:
        """What it does, for reports: the operator and what it promises."""
        kept = 'keeps' if self.operator.preserves_function else 'does not keep'
        shown = {'grow': 'grown', 'reset': 'made anew'}[self.moments]
        return f'{self.operator.name} ({kept} the function; moments {shown})'

    @property
    def sizes(self) -> tuple[int, int]:
        """Number of parameters of the small model and of the large one."""
        leaves = self.change.leaves.values()
        return sum(math.prod(leaf.old) for leaf in leaves), sum(math.prod(x.new) for x in leaves)


class ToMaps(Transition):
    """From a small model's state to one that learns LiGO's maps (`training.learning`)."""

    operator: ligo.Ligo

    def apply(self, state: Any, optimizer: Any) -> Any:
        """Returns the state of the phase: the small weights frozen, maps in their place."""
        bare = {**state, 'optimizer': {}, 'ema': {}}
        grown = growth.transform(bare, self.change, self.operator, seed=self.shared['seed'])
        maps = self.operator.first_maps(self.change, self.shared['seed'])
        return {
            **grown,
            'params': maps,
            'frozen': {**state['frozen'], SMALL: state['params']},
            'optimizer': optimizer.init(maps),
        }

    @property
    def words(self) -> str:
        """What it does, for reports."""
        lr = self.stage.config['schedule']['peak']
        return (
            f'the maps of ligo, which {self.stage.limit} steps of AdamW at {lr:g} learn (small '
            'weights frozen)'
        )


class FromMaps(Transition):
    """From learned maps to the large model's state; moments and average begin anew."""

    def apply(self, state: Any, optimizer: Any) -> Any:
        """Returns the large train state that the maps make of the frozen small weights."""
        params = ligo.grown(self.change, state['frozen'][SMALL], state['params'])
        return {
            **state,
            'params': params,
            'frozen': {k: v for k, v in state['frozen'].items() if k != SMALL},
            'optimizer': optimizer.init(params),
            'ema': ema.init(params) if self.stage.config['ema'] else {},
        }

    @property
    def words(self) -> str:
        """What it does, for reports."""
        return 'the learned maps of ligo (does not keep the function; moments made anew)'


def operator(stage: Stage) -> growth.Operator:
    """Returns the operator of a stage with `grow`.

    Raises:
      ConfigError: an unknown operator, or an unknown or impossible argument.
    """
    assert stage.grow is not None
    where, kind = f'{stage.where}.grow', stage.grow['kind']
    learning = LEARNING if kind == 'ligo' else ()
    own = {k: v for k, v in stage.grow.items() if k not in ('kind', *SHARED, *learning)}
    component = lookup(growth.OPERATORS, kind, 'growth operator', where)
    check_arguments(component, own, f'growth operator {kind!r}', where)
    for key, known in (('moments', ('grow', 'reset')), ('counts', ('keep', 'reset'))):
        if stage.grow.get(key, known[0]) not in known:
            raise ConfigError(
                f'{where}.{key} must be {" or ".join(map(repr, known))}, got {stage.grow[key]!r}.'
            )
    if kind == 'ligo' and stage.grow.get('moments', 'reset') != 'reset':
        raise ConfigError(
            f"{where}.moments: 'ligo' grows no moments, the large model's begin anew; leave it out."
        )
    if kind == 'ligo' and 'counts' in stage.grow:
        raise ConfigError(
            f"{where}.counts: 'ligo' grows no moments whose steps count; leave it out."
        )
    try:
        return component(**own)
    except ConfigError as e:
        raise ConfigError(f'{where}: {e}') from e


def plan(
    stage: Stage,
    before: Mapping[str, Any],
    built: tuple[Any, Any],
    learned: Transition | None = None,
) -> Transition:
    """Returns a stage's transition, checked as far as no array is needed.

    Args:
      stage: one with `grow`.
      before: the config of the stage, or run, that it grows.
      built: the models of both, as `models.build` returned them.
      learned: what led to the stage before it, where that has learned maps.

    Raises:
      ConfigError: an unknown operator or argument, or a change that it cannot make.
    """
    assert stage.grow is not None
    if stage.maps == 'use':
        assert learned is not None
        return FromMaps(stage, learned.operator, learned.change, learned.shared)
    shared = {k: v for k, v in stage.grow.items() if k in SHARED}
    # Its noise is that of no other stage, and of no other run with another seed.
    shared.setdefault('seed', (stage.config['seed'] * 1_000_003 + stage.index) % 2**31)
    chosen = operator(stage)
    try:
        change = growth.plan(before, stage.config, chosen, built=built)
    except ConfigError as e:
        raise ConfigError(f'{stage.where}.grow: {e}') from e
    made = ToMaps if stage.maps == 'learn' else Transition
    return made(stage, chosen, change, shared)


def compile_transition(
    transition: Transition, optimizer: Any, state: Any, shardings: Any
) -> tuple[Any, StepCost]:
    """Returns (compiled `small state -> large state`, what one call costs).

    Args:
      transition: what to compile.
      optimizer: of the large model's stage.
      state: the small state's shapes with shardings.
      shardings: of the large state.
    """
    grow = functools.partial(transition.apply, optimizer=optimizer)
    flops = walk(grow, state).total or 0
    compiled = jax.jit(grow, out_shardings=shardings).lower(state).compile()
    return compiled, StepCost({PURPOSE: flops}, hardware_flops=flops)
