"""Dtype policy: which dtype parameters are stored in and which one products run in."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dtypes of one run, as names so that the policy can be hashed, compared and saved.

    Attributes:
      param: dtype of the master parameters and optimizer moments.
      compute: dtype of products and activations. Norm statistics, softmax, losses, log-decays
        and recurrent states are float32 whatever this says.
    """

    param: str = 'float32'
    compute: str = 'float32'

    @property
    def param_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.param)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.compute)

    def cast(self, x: jax.Array) -> jax.Array:
        """Casts a parameter or activation to the compute dtype."""
        return x.astype(self.compute_dtype)
