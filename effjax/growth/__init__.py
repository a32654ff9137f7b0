"""Growth: operators that make a large model's train state of a small one's.

`grow(state, config_from, config_to, operator, optimizer=..., **arguments) -> state` is pure and
deterministic in its `seed`. An operator is a class `Operator(*, <config arguments>)` with
  `bind(change, seed) -> rule`: checks that it can do a change (`growth.change.Change`) and returns
    `rule(leaf, array, kind) -> array` for parameters ('value') and for averages of gradients
    ('first'), of their squares ('second') and of steps ('step'), so that the optimizer's state
    grows by the same map;
  `view(change)`: None, or what the model is given of its parameters while its stage goes on;
  `preserves_function`, `breaks_symmetry`: what it promises, tested exactly in float64;
  `moments`: whether the optimizer's state is grown or made anew unless told otherwise.
What operators know of a parameter is its metadata (`core.axes`): what its dimensions count, which
of them it sums over, and its role. What a part allows is its `growth_spec`: units that may be
copied, products that silence it. A part without one grows in depth only.

Growth knows no optimizer: the caller passes the large run's, for the form of its state.
"""

from effjax.growth.base import Operator, View
from effjax.growth.change import Change
from effjax.growth.check import differences
from effjax.growth.transition import OPERATORS, grow, plan, transform

__all__ = ['OPERATORS', 'Change', 'Operator', 'View', 'differences', 'grow', 'plan', 'transform']
