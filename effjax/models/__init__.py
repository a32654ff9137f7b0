"""Models: parts assembled from a config.

`build(config) -> Built` unpacks as (graphdef, abstract_state, shardings) and is the only way in:
training, planning, restoring, growing and converting all call it. A model is an NNX module
`Model(setup, *, <config args>, rngs)` that holds only arrays and static facts; its state is plain
nested dicts dict(params=, buffers=), its forward pass is pure, and it has
  `__call__(inputs, info) -> (outputs, aux)`: `aux` maps a name to a (sum, weight) pair;
  `cost(batch, seq_len) -> {part: Cost}`, static, also of an abstract module;
  `body.describe()`: how each segment of blocks runs.
A decoder adds `head_weight`, `logits`, `init_state`, `prefill`, `step`; `models.decode` generates.
"""

from effjax.models.build import MODELS, Built, build, init_params, merge, split

__all__ = ['MODELS', 'Built', 'build', 'init_params', 'merge', 'split']
