"""Range checks of optimizer arguments."""

import math

from effjax.core.errors import ConfigError


def fractions(**values: float) -> None:
    """Checks that each value lies in [0, 1).

    Raises:
      ConfigError: naming the argument.
    """
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ConfigError(f'config.optimizer.{name} must be in [0, 1), got {value}.')


def not_negative(**values: float) -> None:
    """Checks that each value is finite and at least 0.

    Raises:
      ConfigError: naming the argument.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f'config.optimizer.{name} must be at least 0, got {value}.')


def positive(**values: float) -> None:
    """Checks that each value is finite and above 0.

    Raises:
      ConfigError: naming the argument.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ConfigError(f'config.optimizer.{name} must be above 0, got {value}.')
