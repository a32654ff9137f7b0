"""Dynamic loss scaling for float16: pure functions on a dict of scalars."""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from effjax.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """Loss scaling (Micikevicius et al. 2018, arXiv:1710.03740).

    The loss is multiplied by a scale before the backward pass, so that small gradients do not
    underflow in float16, and the gradients are divided by it. Gradients that overflowed mark a
    step to be skipped: the parameters, the moments and their count stay, and the scale falls.
    Powers of two lose no digits.

    Attributes:
      initial: scale at the start.
      growth: factor on the scale after `interval` clean steps in a row.
      backoff: factor on the scale after a step that is not finite.
      interval: clean steps before the scale grows.
      minimum: the lowest scale.
    """

    initial: float = 2.0**15
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    minimum: float = 1.0

    def __post_init__(self) -> None:
        if not self.growth > 1 or not 0 < self.backoff < 1:
            raise ConfigError(
                'config.precision: growth must be above 1 and backoff between 0 and 1, got '
                f'{self.growth} and {self.backoff}.'
            )
        if not 0 < self.minimum <= self.initial < float('inf') or self.interval < 1:
            raise ConfigError(
                'config.precision needs 0 < minimum <= initial and an interval of at least 1, got '
                f'{self.minimum}, {self.initial} and {self.interval}.'
            )

    def init(self) -> dict[str, jax.Array]:
        """Returns {'scale': float32, 'good_steps': int32, 'skipped': int32}, all scalars."""
        return {
            'scale': jnp.asarray(self.initial, jnp.float32),
            'good_steps': jnp.zeros((), jnp.int32),
            'skipped': jnp.zeros((), jnp.int32),
        }

    def update(self, state: dict[str, jax.Array], finite: jax.Array) -> dict[str, jax.Array]:
        """Returns the state after a step.

        Args:
          state: the state that the step used.
          finite: boolean scalar, whether all its gradients were finite; otherwise the caller
            skips the step.
        """
        chex.assert_rank(finite, 0)
        scale, good = state['scale'], state['good_steps'] + 1
        grown = jnp.where(good >= self.interval, scale * self.growth, scale)
        lowered = jnp.maximum(scale * self.backoff, self.minimum)
        return {
            'scale': jnp.where(finite, grown, lowered),
            'good_steps': jnp.where(finite & (good < self.interval), good, 0),
            'skipped': state['skipped'] + jnp.where(finite, 0, 1),
        }
