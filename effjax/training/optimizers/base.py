"""`Optimizer`: a direction from optax, then learning rate and decoupled decay in one pass."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from effjax.training.optimizers.flops import arithmetic
from effjax.training.optimizers.leaves import Leaf
from effjax.training.optimizers.sharding import shardings_of


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer of a tree of parameters: `update = -lr * scale * (direction + decay * params)`.

    The direction, the decay and the scaling are elementwise after one another, so that under `jit`
    the update of a parameter is one pass over gradient, moments and parameter.

    Attributes:
      leaves: tree of `Leaf`, one a parameter.
      direction: gradients -> unscaled step; its state is the optimizer's state.
      weight_decay: decoupled weight decay, multiplied by each leaf's `decay` and by `lr`.
    """

    leaves: Any
    direction: optax.GradientTransformation
    weight_decay: float = 0.0

    def init(self, params: Any) -> Any:
        """Returns the state for parameters; moments are zeros in the parameters' dtypes."""
        chex.assert_trees_all_equal_structs(self.leaves, params)
        return self.direction.init(params)

    def update(self, grads: Any, state: Any, params: Any, lr: jax.Array) -> tuple[Any, Any]:
        """Returns the updates to add to the parameters, and the next state.

        Args:
          grads: gradients, shaped like the parameters.
          state: as `init` or the last `update` returned it.
          params: parameters.
          lr: learning rate, a scalar.
        """
        chex.assert_trees_all_equal_shapes(grads, params)
        chex.assert_rank(lr, 0)
        directions, state = self.direction.update(grads, state, params)
        updates = jax.tree.map(
            lambda leaf, d, p: scaled_step(leaf, d, p, lr, self.weight_decay),
            self.leaves,
            directions,
            params,
        )
        return updates, state

    def eval_params(self, state: Any, params: Any) -> Any:
        """Returns the parameters to evaluate and to report: here, the parameters themselves."""
        del state
        return params

    def abstract_state(self, params: Any) -> Any:
        """Returns the state's shapes and dtypes for parameters or their shapes."""
        return jax.eval_shape(self.init, params)

    def state_shardings(self, params: Any, shardings: Any) -> Any:
        """Returns a sharding for each array of the state.

        A moment is sharded as its parameter, a factored moment as the dimensions it keeps, and
        everything else (counts) is replicated.

        Args:
          params: parameters or their shapes.
          shardings: tree of `NamedSharding`, as the parameters.
        """
        return shardings_of(self.abstract_state(params), params, shardings, self.leaves)

    def flops(self, params: Any) -> float:
        """Returns the arithmetic of one update, a ledger line apart from the model's FLOPs.

        Convention: a product counts 2 m n k; any other arithmetic on arrays (add, multiply,
        divide, root, sign, maximum, sums) counts 1 an element, and the addition of the update to
        the parameter counts too; selections, casts and moves count 0.

        Args:
          params: parameters or their shapes.
        """
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        state = self.abstract_state(params)

        def step(grads, state, params, lr):
            updates, state = self.update(grads, state, params, lr)
            return optax.apply_updates(params, updates), state

        lr = jax.ShapeDtypeStruct((), jnp.float32)
        return arithmetic(jax.make_jaxpr(step)(params, state, params, lr).jaxpr)


def scaled_step(leaf: Leaf, direction: Any, param: Any, lr: Any, weight_decay: float) -> jax.Array:
    """Returns `-lr * leaf.lr * (direction + weight_decay * leaf.decay * param)`."""
    decay = weight_decay * leaf.decay
    if decay:
        direction = direction + decay * param
    return -(lr * leaf.lr) * direction
