"""The phase in which LiGO learns its maps, as a stage like any other (`stages.Stage.maps`).

Its parameters are the maps, with an optimizer of their own, and its model is the large one, whose
weights a view makes of the maps and of the small weights, which are kept in `frozen['small']`:

    {params: maps, frozen: {small: ...}, buffers: the large model's, optimizer: of the maps,
     ema: {}, loss_scale, step, stage}

Every step makes the weights anew, forward and backward, which the ledger shows as `growth`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from effjax import growth, models, parallel
from effjax.core.axes import Meta
from effjax.core.cost import Cost
from effjax.costs import walk
from effjax.growth import ligo
from effjax.training.step import View

SMALL = 'small'  # where the frozen weights are in the state's `frozen`
PART = 'growth'  # of a step's cost


def view_of(change: growth.Change, large: models.Built) -> View:
    """Returns `view(maps, frozen, progress) -> the large model's parameters`, placed as its own."""
    placed = large.shardings['params']

    def view(maps: Any, frozen: Any, progress: Any) -> Any:
        del progress
        with jax.named_scope(PART):
            params = ligo.grown(change, frozen[SMALL], maps)
        return jax.lax.with_sharding_constraint(params, placed)

    return view


def as_trained(
    operator: ligo.Ligo, change: growth.Change, large: models.Built, mesh: Mesh
) -> models.Built:
    """Returns the large model with maps in the place of its parameters, for the train state.

    Maps of the width are as large as weights, so their rows are sharded as the model's width is.
    """
    maps = jax.eval_shape(lambda: operator.first_maps(change, 0))
    meta = {
        'depth': {name: Meta(('layers', None)) for name in maps['depth']},
        'width': {
            name: Meta(('layers', 'embed', None)[3 - m.ndim :]) for name, m in maps['width'].items()
        },
    }
    shardings, fallbacks = parallel.shardings(meta, maps, mesh, large.rules)
    return dataclasses.replace(
        large,
        abstract_state={**large.abstract_state, 'params': maps},
        shardings={**large.shardings, 'params': shardings},
        meta={**large.meta, 'params': meta},
        fallbacks=(*large.fallbacks, *fallbacks),
    )


def cost(view: View, maps: Any, small: Any) -> Cost:
    """Returns what making the large weights once costs.

    Args:
      view: see `view_of`.
      maps: their shapes.
      small: the shapes of the small weights.
    """
    progress = jax.ShapeDtypeStruct((2,), jnp.float32)
    return Cost(matmul=float(walk(view, maps, {SMALL: small}, progress).total or 0))
