"""Optimizers by name, from optax, on parameters stacked over layers.

A component is `(leaves, *, <config arguments>) -> Optimizer`: `leaves` is the tree of per-parameter
facts (`Leaf`) that `build` derives from the parameters' metadata and the config's scales, the rest
comes from the config block. The `Optimizer` contract:

  `init(params) -> state`, `update(grads, state, params, lr) -> (updates, state)` with
  `lr` a float32 scalar array; `optax.apply_updates(params, updates)` is the next value.
  `eval_params(state, params)`: the parameters to evaluate (they differ for schedule-free).
  `abstract_state(params)`, `state_shardings(params, shardings)`, `flops(params)`.

The learning rate is no part of an optimizer: the loop computes it from the run's progress and
passes it in. Weight decay is decoupled and multiplied by the learning rate, as in PyTorch. Which
parameters decay, how a parameter is stacked, and which ones are matrices is read from axis names
and metadata, never from the number of dimensions. States are optax's own named tuples of trees:
the path of a moment ends in the path of its parameter (`parameter_of` finds it), which is what
growth and sharding go by.

Sophia is not here: its Hessian estimate needs the loss function or labels sampled from the model
at every tenth step, which a transformation of gradients does not have.
"""

from effjax.core.trees import parameter_of
from effjax.training.optimizers.base import Optimizer
from effjax.training.optimizers.build import build, check
from effjax.training.optimizers.elementwise import adamw, lion, sgd
from effjax.training.optimizers.layerwise import adafactor, lamb
from effjax.training.optimizers.leaves import Leaf, leaf_tree
from effjax.training.optimizers.muon import muon
from effjax.training.optimizers.schedule_free import schedule_free_adamw

__all__ = [
    'Leaf',
    'Optimizer',
    'adafactor',
    'adamw',
    'build',
    'check',
    'lamb',
    'leaf_tree',
    'lion',
    'muon',
    'parameter_of',
    'schedule_free_adamw',
    'sgd',
]
