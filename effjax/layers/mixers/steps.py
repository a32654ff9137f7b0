"""The steps that state spaces start with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def step_bias(rngs: nnx.Rngs, size: int, dtype: Any) -> jax.Array:
    """Returns the inverse softplus of steps drawn log-uniform from 1e-3 to 0.1, at least 1e-4."""
    low, high = math.log(1e-3), math.log(0.1)
    step = jnp.exp(jax.random.uniform(rngs.params(), (size,), jnp.float32, low, high))
    step = jnp.maximum(step, 1e-4)
    return (step + jnp.log(-jnp.expm1(-step))).astype(dtype)
