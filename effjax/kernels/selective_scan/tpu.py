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


def run(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None,
    state: jax.Array,
    fresh: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, D] with the skip, the last state); see `fused.run`."""
    plan = tpu_plan(u.shape[1], *A.shape)
    return fused.run('tpu_kernels', plan, u, dt, A, B, C, D, state, fresh)
