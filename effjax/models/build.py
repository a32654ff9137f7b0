"""`build(config)`: the one seam by which everything else sees a model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from effjax import parallel, precision
from effjax.core import axes
from effjax.core.config import as_dict
from effjax.core.registry import arguments, check_block
from effjax.models.setup import Execution, Setup

MODELS = {
    'decoder': 'effjax.models.decoder:Decoder',
    'encoder': 'effjax.models.encoder:Encoder',
    'vit': 'effjax.models.vit:ViT',
}

Tree = Any


@dataclasses.dataclass(frozen=True)
class Built:
    """A model without arrays. Unpacks as (graphdef, abstract_state, shardings).

    Attributes:
      graphdef: the model's structure.
      abstract_state: dict(params=, buffers=) of nested dicts of shape structs.
      shardings: the same tree with a NamedSharding for each leaf.
      meta: dict(params=, buffers=) with a `core.axes.Meta` for each leaf.
      model: the abstract module: for costs, never for a forward pass.
      make: `make(rngs)` builds the real module.
      rules: logical axis -> mesh axes, for `parallel.mesh_context`.
      fallbacks: a sentence for each axis that could not be sharded by its rule.
    """

    graphdef: Any
    abstract_state: Tree
    shardings: Tree
    meta: Tree
    model: Any
    make: Callable[[nnx.Rngs], nnx.Module]
    rules: Mapping[str, tuple[str, ...]]
    fallbacks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.graphdef, self.abstract_state, self.shardings))


def split(model: nnx.Module) -> tuple[Any, Tree]:
    """Returns (graphdef, dict(params=, buffers=)) with plain nested dicts of arrays."""
    graphdef, *states = nnx.split(model, nnx.Param, axes.Buffer)
    params, buffers = map(nnx.to_pure_dict, states)
    return graphdef, {'params': params, 'buffers': buffers}


def merge(graphdef: Any, state: Mapping[str, Tree]) -> Any:
    """Returns the module with the arrays of `state`, the inverse of `split`."""
    return nnx.merge(graphdef, state['params'], state['buffers'])


def build(config: Mapping[str, Any], *, mesh: jax.sharding.Mesh | None = None) -> Built:
    """Returns a config's model, abstractly: no device memory is used, nothing is compiled.

    Args:
      config: a complete config (`core.config.defaults`).
      mesh: the devices it will live on; None makes the config's mesh.

    Raises:
      ConfigError: an unknown kind or argument, or values that do not fit together.
    """
    config = as_dict(config)
    component = check_block(MODELS, config['model'], 'model', 'config.model')
    setup = _setup(config)
    args = arguments(config['model'])

    def make(rngs: nnx.Rngs) -> nnx.Module:
        return component(setup, **args, rngs=rngs)

    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    params, buffers = nnx.state(model, nnx.Param), nnx.state(model, axes.Buffer)
    meta = {'params': axes.metadata(params), 'buffers': axes.metadata(buffers)}
    graphdef, abstract = split(model)
    rules = parallel.make_rules(config['sharding'])
    if mesh is None:
        mesh = parallel.make_mesh(config['mesh'])
    shardings, fallbacks = parallel.shardings(meta, abstract, mesh, rules)
    return Built(graphdef, abstract, shardings, meta, model, make, rules, tuple(fallbacks))


def init_params(built: Built, key: jax.Array) -> Tree:
    """Returns dict(params=, buffers=), initialised under one `jit` and born sharded.

    The values depend on `key` only, not on the mesh or on how layers run.
    """

    def init(key: jax.Array) -> Tree:
        return split(built.make(nnx.Rngs(params=key)))[1]

    return jax.jit(init, out_shardings=built.shardings)(key)


def _setup(config: Mapping[str, Any]) -> Setup:
    return Setup(
        policy=precision.build(config['precision']).policy,
        execution=Execution.of(config['execution']),
        seq_len=config['seq_len'],
    )
