"""The contract of a growth operator."""

from collections.abc import Callable
from typing import Literal

import jax

from effjax.growth.change import Change, LeafChange

# What an array is: a parameter's values; an average of its gradients, of their squares, or of steps
# that an optimizer has already brought to size.
Kind = Literal['value', 'first', 'second', 'step']
Rule = Callable[[LeafChange, jax.Array, Kind], jax.Array]


class Operator:
    """Maps a small model's parameters, and what an optimizer keeps of each, to a large one's.

    A subclass's keyword-only arguments are its config. `bind` checks that it can do a change and
    returns the rule for one array. Rules are pure, may be traced, and compute at least in float32.

    Attributes:
      preserves_function: the large model computes what the small one did, exactly.
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
