"""Transitions: what stands between two stages whose models differ.

A transition is an operator of `effjax.growth`, compiled with the large state's shardings. It is
deterministic in the run's seed and the stage's index, so that a killed run makes it again.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax

from effjax import growth
from effjax.core.errors import ConfigError
from effjax.core.registry import check_arguments, lookup
from effjax.costs import StepCost, walk
from effjax.training.stages import Stage

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
    def words(self) -> str:
        """What it does, for reports: the operator and what it promises."""
        kept = 'keeps' if self.operator.preserves_function else 'does not keep'
        moments = self.shared.get('moments') or self.operator.moments
        shown = {'grow': 'grown', 'reset': 'made anew'}[moments]
        return f'{self.operator.name} ({kept} the function; moments {shown})'


def operator(stage: Stage) -> growth.Operator:
    """Returns the operator of a stage with `grow`.

    Raises:
      ConfigError: an unknown operator, or an unknown or impossible argument.
    """
    assert stage.grow is not None
    where, kind = f'{stage.where}.grow', stage.grow['kind']
    own = {k: v for k, v in stage.grow.items() if k not in ('kind', *SHARED)}
    component = lookup(growth.OPERATORS, kind, 'growth operator', where)
    check_arguments(component, own, f'growth operator {kind!r}', where)
    for key, known in (('moments', ('grow', 'reset')), ('counts', ('keep', 'reset'))):
        if stage.grow.get(key, known[0]) not in known:
            raise ConfigError(
                f'{where}.{key} must be {" or ".join(map(repr, known))}, got {stage.grow[key]!r}.'
            )
    try:
        return component(**own)
    except ConfigError as e:
        raise ConfigError(f'{where}: {e}') from e


def plan(stage: Stage, before: Mapping[str, Any], built: tuple[Any, Any]) -> Transition:
    """Returns a stage's transition, checked as far as no array is needed.

    Args:
      stage: one with `grow`.
      before: the config of the stage, or run, that it grows.
      built: the models of both, as `models.build` returned them.

    Raises:
      ConfigError: an unknown operator or argument, or a change that it cannot make.
    """
    assert stage.grow is not None
    shared = {k: v for k, v in stage.grow.items() if k in SHARED}
    # Its noise is that of no other stage, and of no other run with another seed.
    shared.setdefault('seed', (stage.config['seed'] * 1_000_003 + stage.index) % 2**31)
    chosen = operator(stage)
    try:
        change = growth.plan(before, stage.config, chosen, built=built)
    except ConfigError as e:
        raise ConfigError(f'{stage.where}.grow: {e}') from e
    return Transition(stage, chosen, change, shared)


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
