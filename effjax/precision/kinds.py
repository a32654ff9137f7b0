"""The kinds of precision a config can name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from effjax.core.policy import Policy
from effjax.core.registry import arguments, check_block
from effjax.precision.loss_scale import DynamicLossScale


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a run computes.

    Attributes:
      policy: dtypes of master parameters (and optimizer moments) and of products.
      loss_scale: dynamic loss scaling, or None where gradients cannot underflow.
    """

    policy: Policy
    loss_scale: DynamicLossScale | None = None


def build(block: Mapping[str, Any], path: str = 'config.precision') -> Precision:
    """Builds the precision that a block such as `dict(kind='bf16')` names.

    Raises:
      ConfigError: unknown kind or argument, a value of the wrong type or out of range.
    """
    from effjax.precision import PRECISIONS

    component = check_block(PRECISIONS, block, 'precision', path)
    return component(**arguments(block))


def fp32() -> Precision:
    """Everything in float32."""
    return Precision(Policy('float32', 'float32'))


def bf16() -> Precision:
    """Products in bfloat16, master parameters and moments in float32 (arXiv:1905.12322)."""
    return Precision(Policy('float32', 'bfloat16'))


def bf16_params() -> Precision:
    """Everything in bfloat16, parameters and moments included.

    Half the memory of master weights, at a price: an update smaller than half a unit in the last
    place (2^-9 of the weight) is lost, so training stagnates as the learning rate falls. Here to
    show that price.
    """
    return Precision(Policy('bfloat16', 'bfloat16'))


def fp16(
    *,
    initial: float = 2.0**15,
    growth: float = 2.0,
    backoff: float = 0.5,
    interval: int = 2000,
    minimum: float = 1.0,
) -> Precision:
    """Products in float16, master parameters in float32, the loss scaled (arXiv:1710.03740).

    Args:
      initial: scale at the start.
      growth: factor on the scale after `interval` steps with finite gradients.
      backoff: factor on the scale after a step whose gradients are not finite.
      interval: clean steps before the scale grows.
      minimum: the lowest scale.

    Raises:
      ConfigError: an argument out of range.
    """
    scale = DynamicLossScale(initial, growth, backoff, interval, minimum)
    return Precision(Policy('float32', 'float16'), scale)
