"""The diagonal recurrence on TPUs: each pass goes over memory once."""

from typing import Any

import jax

from effjax.kernels.devices import refuse_tpu
from effjax.kernels.diagonal_scan import planes
from effjax.kernels.diagonal_scan.plan import plan_for


def refuse(x: Any, wide: Any) -> str | None:
    """Returns why the kernels cannot run this call here, or None.

    Args:
      x: inputs [B, T, ...], or their shape and dtype.
      wide: dtype of the arithmetic.
    """
    return refuse_tpu() or planes.refuse(x, wide)


def scan(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(h [B, T, ...] in the dtype of x, last state) of what `planes.scan` takes."""
    del chunk  # 'xla's
    most = planes.longest('pallas_tpu', decay)
    plan = plan_for(x.shape[1], state[0].size, most)
    return planes.scan('tpu_kernels', plan, decay, x, state, reverse)
