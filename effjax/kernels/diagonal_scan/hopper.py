"""The diagonal recurrence on Hopper GPUs: each pass goes over memory once."""

import math
from typing import Any

import jax

from effjax.kernels.devices import refuse_hopper
from effjax.kernels.diagonal_scan import planes
from effjax.kernels.diagonal_scan.plan import FEWEST, LANES, plan_for


def refuse(x: Any, wide: Any, *, by_name: bool) -> str | None:
    """Returns why the kernels cannot or, not asked for by name, should not run this call here.

    Args:
      x: inputs [B, T, ...], or their shape and dtype.
      wide: dtype of the arithmetic.
      by_name: they are asked for.
    """
    why = refuse_hopper() or planes.refuse(x, wide)
    if why or by_name:
        return why
    blocks = x.shape[0] * -(-math.prod(x.shape[2:]) // LANES)
    if blocks < FEWEST:
        return (
            f'it has {blocks} blocks of 128 channels of a row, with fewer than {FEWEST} the '
            "parallel prefix of 'xla' is faster"
        )
    return None


def scan(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(h [B, T, ...] in the dtype of x, last state) of what `planes.scan` takes."""
    del chunk  # 'xla's
    most = planes.longest('pallas_gpu', decay)
    plan = plan_for(x.shape[1], state[0].size, most)
    return planes.scan('hopper_kernels', plan, decay, x, state, reverse)
