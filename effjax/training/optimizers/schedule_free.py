"""Schedule-free AdamW: averaging in place of a decaying learning rate."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from effjax.training.optimizers import checks
from effjax.training.optimizers.base import Optimizer, scaled_step


def schedule_free_adamw(
    leaves: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    weight_power: float = 2.0,
) -> Optimizer:
    """Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682).

    Gradients are taken at an interpolation of the last iterate and the average; the average is
    evaluated (`eval_params`). Use a constant schedule with warm-up.

    Args:
      leaves: tree of `Leaf`.
      b1: weight of the average in the point where gradients are taken; above 0.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decay at the point where gradients are taken, times the learning rate.
      weight_power: an iterate weighs `max(lr so far) ** weight_power` in the average.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(b1=b1, b2=b2)
    checks.positive(b1=b1, eps=eps)
    checks.not_negative(weight_decay=weight_decay, weight_power=weight_power)
    rms = optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    return ScheduleFree(leaves, rms, weight_decay, b1, weight_power)


@dataclasses.dataclass(frozen=True)
class ScheduleFree(Optimizer):
    """`Optimizer` around `optax.contrib.schedule_free`, which needs the learning rate inside.

    Attributes:
      b1: weight of the average in the point where gradients are taken.
      weight_power: exponent of the learning rate in an iterate's weight.
    """

    b1: float = 0.9
    weight_power: float = 2.0

    def init(self, params: Any) -> Any:
        chex.assert_trees_all_equal_structs(self.leaves, params)
        return self._transform(jnp.zeros(())).init(params)

    def update(self, grads: Any, state: Any, params: Any, lr: jax.Array) -> tuple[Any, Any]:
        chex.assert_trees_all_equal_shapes(grads, params)
        chex.assert_rank(lr, 0)
        return self._transform(lr).update(grads, state, params)

    def eval_params(self, state: Any, params: Any) -> Any:
        """Returns the average of the iterates."""
        return optax.contrib.schedule_free_eval_params(state, params)

    def _transform(self, lr: jax.Array) -> optax.GradientTransformation:
        def step(directions: Any, params: Any) -> Any:
            return jax.tree.map(
                lambda leaf, d, p: scaled_step(leaf, d, p, lr, self.weight_decay),
                self.leaves,
                directions,
                params,
            )

        return optax.contrib.schedule_free(
            optax.chain(self.direction, optax.stateless(step)),
            learning_rate=lr,
            b1=self.b1,
            weight_lr_power=self.weight_power,
        )
