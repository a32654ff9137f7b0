"""A moving average of the parameters, as a pure function on dicts of arrays."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec


def init(params: Any) -> dict[str, Any]:
    """Returns the average's state: {'params': float32 copies, 'count': int32 updates so far}."""
    return {
        'params': jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params),
        'count': jnp.zeros((), jnp.int32),
    }


def update(ema: dict[str, Any], params: Any, decay: float, *, bias_free: bool = True) -> Any:
    """Returns the state after averaging `params` in.

    Args:
      ema: state of `init` or `update`.
      params: the parameters after a step.
      decay: weight of the average so far, in [0, 1).
      bias_free: give the average the weights of `sum_i decay ** (t - i) * params_i` divided by
        their sum, so that the initial parameters never count. Without it the average starts at
        the initial parameters and forgets them over some `1 / (1 - decay)` steps.
    """
    chex.assert_trees_all_equal_shapes(ema['params'], params)
    keep: Any = decay
    if bias_free:
        # The debiased sum of t + 1 terms as a running average of that of t terms. expm1 because
        # 1 - 0.9999 ** t loses digits in float32.
        t = ema['count'].astype(jnp.float32)
        log = jnp.log(jnp.float32(decay)) if decay else jnp.float32(-jnp.inf)
        done, now = -jnp.expm1(jnp.where(t > 0, t * log, 0.0)), -jnp.expm1((t + 1) * log)
        keep = decay * done / now
    averaged = jax.tree.map(lambda e, p: e + (1 - keep) * (p - e), ema['params'], params)
    return {'params': averaged, 'count': ema['count'] + 1}


def params(ema: dict[str, Any], like: Any) -> Any:
    """Returns the averaged parameters in the dtypes of `like`."""
    return jax.tree.map(lambda e, p: e.astype(p.dtype), ema['params'], like)


def shardings(param_shardings: Any) -> dict[str, Any]:
    """Returns the state's shardings: the average as the parameters, the count replicated."""
    mesh = jax.tree.leaves(param_shardings)[0].mesh
    return {'params': param_shardings, 'count': NamedSharding(mesh, PartitionSpec())}
