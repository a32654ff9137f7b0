"""Optimizers that treat each weight by itself: stacking layers changes nothing for them."""

from typing import Any, Literal

import optax

from effjax.training.optimizers import checks
from effjax.training.optimizers.base import Optimizer


def adamw(
    leaves: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    nesterov: bool = False,
    mu_dtype: Literal['float32', 'bfloat16'] | None = None,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Args:
      leaves: tree of `Leaf`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, multiplied by the learning rate.
      nesterov: Nesterov's momentum in the first moment (NAdam).
      mu_dtype: dtype of the first moment; None keeps the parameters'.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(b1=b1, b2=b2)
    checks.positive(eps=eps)
    checks.not_negative(weight_decay=weight_decay)
    direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, nesterov=nesterov, mu_dtype=mu_dtype)
    return Optimizer(leaves, direction, weight_decay)


def lion(
    leaves: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 1.0,
    mu_dtype: Literal['float32', 'bfloat16'] | None = None,
) -> Optimizer:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum.

    Its learning rate is usually 3 to 10 times smaller than AdamW's, its decay as much larger.

    Args:
      leaves: tree of `Leaf`.
      b1: weight of the momentum in the step.
      b2: decay of the momentum.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mu_dtype: dtype of the momentum; None keeps the parameters'.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(b1=b1, b2=b2)
    checks.not_negative(weight_decay=weight_decay)
    direction = optax.scale_by_lion(b1=b1, b2=b2, mu_dtype=mu_dtype)
    return Optimizer(leaves, direction, weight_decay)


def sgd(
    leaves: Any,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    mu_dtype: Literal['float32', 'bfloat16'] | None = None,
) -> Optimizer:
    """Stochastic gradient descent with (heavy-ball or Nesterov) momentum.

    Args:
      leaves: tree of `Leaf`.
      momentum: decay of the accumulated gradient; 0 keeps no state.
      nesterov: look one step ahead.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mu_dtype: dtype of the accumulated gradient; None keeps the parameters'.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(momentum=momentum)
    checks.not_negative(weight_decay=weight_decay)
    direction = optax.identity()
    if momentum:
        direction = optax.trace(decay=momentum, nesterov=nesterov, accumulator_dtype=mu_dtype)
    return Optimizer(leaves, direction, weight_decay)
