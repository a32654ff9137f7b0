"""Shared memory of Hopper GPUs as Pallas (Mosaic GPU) products read it."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def matrix(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory that products and copies can take."""
    columns = 128 // jnp.dtype(dtype).itemsize
    mosaic: Any = plgpu  # whose transforms count as abstract for type checkers
    transforms = (mosaic.TilingTransform((8, columns)), mosaic.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
