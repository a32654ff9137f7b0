"""The train state: a dict of arrays beside a graphdef, its shapes, shardings and first values.

    {params, buffers, frozen, optimizer, ema, loss_scale, step, stage}

`abstract` and `shardings` describe it without allocating; `initialise` makes it under one jit with
out-shardings, so that nothing is ever whole on one device. A transition between stages may call
both again for another model.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from effjax import models, parallel
from effjax.training import ema as ema_lib

State = dict[str, Any]


def abstract(
    built: Any,
    optimizer: Any,
    loss_scale: Any,
    ema: bool,
    frozen: Mapping[str, models.Built] = MappingProxyType({}),
) -> State:
    """Returns the state's shapes and dtypes.

    Args:
      built: what `effjax.models.build` returned.
      optimizer: see `effjax.training.optimizers`.
      loss_scale: dynamic loss scaling, or None.
      ema: whether a moving average of the parameters is kept.
      frozen: name -> model that the objective needs beside the one that is trained.
    """
    params = built.abstract_state['params']
    return {
        'params': params,
        'buffers': built.abstract_state['buffers'],
        'frozen': {name: model.abstract_state for name, model in frozen.items()},
        'optimizer': jax.eval_shape(optimizer.init, params),
        'ema': jax.eval_shape(ema_lib.init, params) if ema else {},
        'loss_scale': jax.eval_shape(loss_scale.init) if loss_scale else {},
        'step': jax.ShapeDtypeStruct((), jnp.int32),
        'stage': jax.ShapeDtypeStruct((), jnp.int32),
    }


def shardings(
    built: Any,
    optimizer: Any,
    state: State,
    mesh: Mesh,
    frozen: Mapping[str, models.Built] = MappingProxyType({}),
) -> State:
    """Returns a sharding for every leaf: moments and average follow their parameters."""
    replicated = parallel.replicated(mesh)
    params = built.shardings['params']
    return {
        'params': params,
        'buffers': built.shardings['buffers'],
        'frozen': {name: model.shardings for name, model in frozen.items()},
        'optimizer': optimizer.state_shardings(state['params'], params),
        'ema': ema_lib.shardings(params) if state['ema'] else {},
        'loss_scale': jax.tree.map(lambda _: replicated, state['loss_scale']),
        'step': replicated,
        'stage': replicated,
    }


def initialiser(
    built: Any, optimizer: Any, loss_scale: Any, ema: bool
) -> Callable[[jax.Array], State]:
    """Returns `f(key) -> state`, to be jitted with the state's shardings.

    What is frozen is not made but read: `frozen` is empty in it.
    """

    def init(key: jax.Array) -> State:
        _, arrays = models.split(built.make(nnx.Rngs(params=key)))
        return _first(arrays['params'], arrays['buffers'], None, optimizer, loss_scale, ema)

    return init


def with_arrays(
    params: Any,
    buffers: Any,
    moments: Any,
    *,
    optimizer: Any,
    loss_scale: Any,
    ema: bool,
    like: State,
) -> State:
    """Returns the first state of a run whose model has been trained before.

    Args:
      params: the model's.
      buffers: the model's.
      moments: the optimizer's state, None for a new one.
      optimizer: see `effjax.training.optimizers`.
      loss_scale: dynamic loss scaling, or None.
      ema: whether a moving average of the parameters is kept.
      like: shapes and dtypes of the state, to which arrays of another precision are brought.
    """

    def cast(tree: Any, shapes: Any) -> Any:
        return jax.tree.map(lambda x, s: x.astype(s.dtype), tree, shapes)

    params, buffers = cast(params, like['params']), cast(buffers, like['buffers'])
    return _first(params, buffers, moments, optimizer, loss_scale, ema)


def _first(
    params: Any, buffers: Any, moments: Any, optimizer: Any, loss_scale: Any, ema: bool
) -> State:
    return {
        'params': params,
        'buffers': buffers,
        'frozen': {},
        'optimizer': optimizer.init(params) if moments is None else moments,
        'ema': ema_lib.init(params) if ema else {},
        'loss_scale': loss_scale.init() if loss_scale else {},
        'step': jnp.zeros((), jnp.int32),
        'stage': jnp.zeros((), jnp.int32),
    }
