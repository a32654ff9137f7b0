"""`grow`: the whole train state from a small config to a large one."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from effjax import models
from effjax.core import trees
from effjax.core.config import as_dict
from effjax.core.errors import ConfigError
from effjax.core.registry import check_arguments, lookup
from effjax.growth import check
from effjax.growth.base import Operator, Rule
from effjax.growth.change import Change, LeafChange, between
from effjax.growth.moments import grow_moments

OPERATORS = {
    'stack': 'effjax.growth.depth:Stack',
    'interpolate': 'effjax.growth.depth:Interpolate',
    'append': 'effjax.growth.depth:Append',
    'midas': 'effjax.growth.depth:Midas',
    'identity': 'effjax.growth.depth:Identity',
    'net2net': 'effjax.growth.width:Net2Net',
    'aki': 'effjax.growth.width:Aki',
    'staged': 'effjax.growth.width:Staged',
    'lemon': 'effjax.growth.lemon:Lemon',
    'compound': 'effjax.growth.compound:Compound',
    'ligo': 'effjax.growth.ligo:Ligo',
    'msg': 'effjax.growth.msg:Msg',
}

State = dict[str, Any]


def grow(
    state: Mapping[str, Any],
    config_from: Mapping[str, Any],
    config_to: Mapping[str, Any],
    operator: str,
    *,
    optimizer: Any = None,
    moments: Literal['grow', 'reset'] | None = None,
    counts: Literal['keep', 'reset'] = 'keep',
    seed: int = 0,
    **kw: Any,
) -> State:
    """Returns the train state of the large config, made of the small one's.

    A pure function: it may be traced, under `jit` with the large state's out-shardings. Loss scale,
    step, stage and frozen parameters are handed on; the moving average grows as the parameters do.

    Args:
      state: `{params, buffers, frozen, optimizer, ema, loss_scale, step, stage}`.
      config_from: the complete config of the small model, as `models.build` takes it.
      config_to: the large one's; they may differ in sizes only.
      operator: a name of `OPERATORS`.
      optimizer: the large run's, with `init(params)` (`training.optimizers.build`); needed where
        the state holds an optimizer's.
      moments: 'grow' maps them as the gradient maps, 'reset' makes a fresh state; None asks the
        operator.
      counts: of grown moments, 'keep' carries on, so that they stay averages of many steps;
        'reset' takes what `init` gives.
      seed: of what the operator draws.
      **kw: the operator's own arguments.

    Raises:
      ConfigError: an unknown operator or argument, or a change that it cannot make.
    """
    component = lookup(OPERATORS, operator, 'growth operator')
    check_arguments(component, kw, f'growth operator {operator!r}', 'grow')
    chosen = component(**kw)
    change = plan(config_from, config_to, chosen)
    return transform(
        state, change, chosen, optimizer=optimizer, moments=moments, counts=counts, seed=seed
    )


def plan(
    config_from: Mapping[str, Any],
    config_to: Mapping[str, Any],
    operator: Operator,
    *,
    built: tuple[Any, Any] | None = None,
) -> Change:
    """Returns the change between two configs, checked as far as no array is needed.

    Args:
      config_from: the complete config of the small model.
      config_to: the large one's.
      operator: what is to grow it.
      built: both models as `models.build` returned them, where the caller has them.

    Raises:
      ConfigError: a change that the operator cannot make.
    """
    small, large = as_dict(config_from), as_dict(config_to)
    check.same_architecture(small, large)
    built = built or (models.build(small), models.build(large))
    check.same_dtypes(*built)
    change = between(*built)
    check.sizes(change, changes_eps=operator.changes_eps)

    def checks() -> None:
        operator.bind(change, 0)

    jax.eval_shape(checks)  # what it draws is not needed yet
    return change


def transform(
    state: Mapping[str, Any],
    change: Change,
    operator: Operator,
    *,
    optimizer: Any = None,
    moments: Literal['grow', 'reset'] | None = None,
    counts: Literal['keep', 'reset'] = 'keep',
    seed: int = 0,
) -> State:
    """Returns the large train state; `grow` for a change that has been planned.

    Raises:
      ConfigError: see `grow`.
    """
    _check_state(state, change, moments, counts)
    rule = operator.bind(change, seed)
    params = _grown(state['params'], change.leaves, rule)
    ema = state['ema']
    return {
        **state,
        'params': params,
        'buffers': _grown(state['buffers'], change.buffers, rule),
        'optimizer': _optimizer_state(
            state['optimizer'], params, change, rule, optimizer, moments or operator.moments, counts
        ),
        'ema': {**ema, 'params': _grown(ema['params'], change.leaves, rule)} if ema else ema,
    }


def _grown(tree: Any, leaves: Mapping[str, LeafChange], rule: Rule) -> Any:
    return trees.map_named(lambda name, x: rule(leaves[name], x, 'value'), tree)


def _optimizer_state(
    state: Any, params: Any, change: Change, rule: Rule, optimizer: Any, moments: str, counts: str
) -> Any:
    if not jax.tree.leaves(state):
        return state
    if optimizer is None:
        raise ConfigError(
            "the state holds an optimizer's, which grows too: give grow the large run's optimizer."
        )
    if moments == 'reset':
        return optimizer.init(params)
    expected = jax.eval_shape(optimizer.init, params)
    forms: list[Any] = [jax.tree.structure(tree) for tree in (state, expected)]
    if forms[0] != forms[1]:
        raise ConfigError(
            "the large run's optimizer keeps another state than the small one's; give it the same "
            "optimizer, or make a fresh state with moments='reset'."
        )
    grown = grow_moments(state, change, rule, expected)
    if counts == 'keep':
        return grown
    fresh = trees.flatten(optimizer.init(params))
    return trees.map_named(
        lambda name, x: x if trees.parameter_of(name, change.leaves) else jnp.asarray(fresh[name]),
        grown,
    )


def _check_state(state: Mapping[str, Any], change: Change, moments: Any, counts: str) -> None:
    if moments not in (None, 'grow', 'reset'):
        raise ConfigError(f"moments must be 'grow' or 'reset', got {moments!r}.")
    if counts not in ('keep', 'reset'):
        raise ConfigError(f"counts must be 'keep' or 'reset', got {counts!r}.")
    found = trees.flatten(state['params'])
    for name, leaf in change.leaves.items():
        if name not in found or found[name].shape != leaf.old:
            shape = found[name].shape if name in found else 'missing'
            raise ConfigError(
                f'the state is not of the small config: {name} is {shape}, expected {leaf.old}; '
                'give the config that the checkpoint was trained with.'
            )
