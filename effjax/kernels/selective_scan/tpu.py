"""The selective scan on TPUs: states of tokens stay in VMEM, both ways."""

from typing import Any

import jax

from effjax.kernels.devices import refuse_tpu
from effjax.kernels.selective_scan import fused
from effjax.kernels.selective_scan.plan import STATES, tpu_plan


def refuse(u: Any, dt: Any, states: int) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      u: inputs [B, T, D], or their shape and dtype.
      dt: the same of the steps.
      states: of a channel.
    """
    return refuse_tpu() or fused.refuse(u, dt, states, STATES['pallas_tpu'])


def run(u: jax.Array, dt: jax.Array, A: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, D] with the skip, the last state); arguments as of `fused.run` behind the plan."""
    return fused.run('tpu_kernels', tpu_plan(u.shape[1], *A.shape), u, dt, A, *rest)
