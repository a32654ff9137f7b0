"""The selective scan on Hopper GPUs: states of tokens stay in registers and shared memory."""

from typing import Any

import jax

from effjax.kernels.devices import refuse_hopper
from effjax.kernels.selective_scan import fused
from effjax.kernels.selective_scan.plan import ROWS_SHARED, STATES, hopper_plan
from effjax.kernels.sizes import tuned


def refuse(u: Any, dt: Any, states: int) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      u: inputs [B, T, D], or their shape and dtype.
      dt: the same of the steps.
      states: of a channel.
    """
    return refuse_hopper() or fused.refuse(u, dt, states, STATES['pallas_gpu'])


def run(u: jax.Array, dt: jax.Array, A: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, D] with the skip, the last state); arguments as of `fused.run` behind the plan."""
    found = tuned('selective_scan', f'states={A.shape[1]}', {'rows': ROWS_SHARED})
    plan = hopper_plan(u.shape[1], A.shape[0], A.shape[1], found['rows'])
    return fused.run('hopper_kernels', plan, u, dt, A, *rest)
