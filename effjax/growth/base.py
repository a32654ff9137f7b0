"""The contract of a growth operator."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from effjax.growth.change import Change, LeafChange

# What an array is: a parameter's values; an average of its gradients, of their squares, or of steps
# that an optimizer has already brought to size.
Kind = Literal['value', 'first', 'second', 'step']
Rule = Callable[[LeafChange, jax.Array, Kind], jax.Array]
# What a model is given of its parameters: `view(params, frozen, progress) -> params`, pure and
# differentiable in the first; `progress` is [2], the shares of the run and of the stage done.
View = Callable[[Any, Any, jax.Array], Any]


class Operator:
    """Maps a small model's parameters, and what an optimizer keeps of each, to a large one's.

    A subclass's keyword-only arguments are its config. `bind` checks that it can do a change and
    returns the rule for one array. Rules are pure, may be traced, and compute at least in float32.

    Attributes:
      preserves_function: the large model computes what the small one did, exactly; given `view`,
        where there is one, at the start of its stage.
      breaks_symmetry: units that are copies of each other do not stay so in training.
      moments: what becomes of the optimizer's state unless told otherwise: 'grow' or 'reset'.
    """

    name: str = ''
    preserves_function: bool = False
    breaks_symmetry: bool = True
    moments: Literal['grow', 'reset'] = 'grow'
    # Whether norms may have another eps in the large model.
    changes_eps: bool = False

    def bind(self, change: Change, seed: int) -> Rule:
        """Returns the rule `(leaf, array, kind) -> array` of a change.

        Args:
          change: from where to where.
          seed: what it draws, it draws from this and the names of leaves and units.

        Raises:
          ConfigError: the operator cannot do this change; the sentence says what can.
        """
        raise NotImplementedError

    def view(self, change: Change) -> View | None:
        """Returns what the large model is given of its parameters in the stage that it begins.

        Args:
          change: one that has been planned.

        Returns:
          None where the model is given them all, from the first step on.
        """
        del change
        return None
