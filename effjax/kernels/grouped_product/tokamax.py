"""tokamax's grouped product on GPUs and TPUs, where the extra `effjax[tokamax]` is installed."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.devices import refuse_mesh

IMPLEMENTATION = 'mosaic'  # of tokamax; by itself it would go on to XLA without a word


def refuse(x: Any) -> str | None:
    """Returns why tokamax cannot run this call here, or None.

    Args:
      x: rows [M, K], or their shape and dtype.
    """
    if choice.platform() not in ('gpu', 'tpu'):
        return f'it needs a GPU or a TPU, not {choice.platform()}'
    if importlib.util.find_spec('tokamax') is None:
        return 'it needs the package tokamax, which effjax[tokamax] installs'
    if x.dtype != jnp.bfloat16:
        return f'it takes bfloat16, not {x.dtype.name}'
    return refuse_mesh()


def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns y [M, N]; see `op.grouped_product`."""
    import tokamax  # takes long, and may not be there

    inside = jnp.arange(x_MK.shape[0])[:, None] < jnp.sum(sizes_E)
    implementation: Any = IMPLEMENTATION
    # Rows behind the groups are undefined in kernels, there and back: hence both masks.
    rows = jnp.where(inside, x_MK, 0)
    y = tokamax.ragged_dot(rows, w_EKN, sizes_E, implementation=implementation)
    return jnp.where(inside, y, 0).astype(x_MK.dtype)
