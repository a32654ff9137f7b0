"""tokamax's grouped product on GPUs and TPUs, where the extra `effjax[tokamax]` is installed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.devices import refuse_tokamax
from effjax.kernels.grouped_product.xla import masked

IMPLEMENTATION = 'mosaic'  # of tokamax; by itself it would go on to XLA without a word


def refuse(x: Any) -> str | None:
    """Returns why tokamax cannot run this call here, or None.

    Args:
      x: rows [M, K], or their shape and dtype.
    """
    why = refuse_tokamax()
    if why is None and x.dtype != jnp.bfloat16:
        why = f'it takes bfloat16, not {x.dtype.name}'
    return why


def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns y [M, N]; see `op.grouped_product`."""
    import tokamax  # takes long, and may not be there

    run: Any = functools.partial(tokamax.ragged_dot, implementation=IMPLEMENTATION)
    return masked(run, x_MK, w_EKN, sizes_E).astype(x_MK.dtype)
