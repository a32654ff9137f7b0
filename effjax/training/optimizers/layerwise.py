"""Optimizers that read a whole parameter at once, run separately for each stacked layer.

Adafactor factors a matrix's second moment and LAMB measures a matrix's norm: applied to weights
stacked over layers they would mix the layers. `layerwise` maps them over the stack instead.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from effjax.training.optimizers import checks
from effjax.training.optimizers.base import Optimizer
from effjax.training.optimizers.leaves import Leaf


def adafactor(
    leaves: Any,
    *,
    decay_rate: float = 0.8,
    min_factored: int = 128,
    clip: float = 1.0,
    parameter_scale: bool = True,
    momentum: float = 0.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Adafactor (Shazeer and Stern 2018, arXiv:1804.04235).

    Heads and head dimension count as one dimension, so that attention's projections are factored
    as the matrices they are.

    Args:
      leaves: tree of `Leaf`.
      decay_rate: exponent of the second moment's decay, `1 - t ** -decay_rate`.
      min_factored: factor only matrices whose dimensions both reach this.
      clip: bound on a parameter's root-mean-square step; 0 switches it off.
      parameter_scale: multiply the step by the parameter's own root mean square (at least 1e-3).
      momentum: decay of a moving average of the steps; 0 keeps none.
      eps: added to squared gradients.
      weight_decay: decoupled decay, multiplied by the learning rate.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(momentum=momentum)
    checks.positive(decay_rate=decay_rate, min_factored=min_factored, eps=eps)
    checks.not_negative(clip=clip, weight_decay=weight_decay)
    parts = [
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=min_factored, epsilon=eps
        )
    ]
    if clip:
        parts.append(optax.clip_by_block_rms(clip))
    if parameter_scale:
        parts.append(optax.scale_by_param_block_rms())
    if momentum:
        parts.append(optax.ema(momentum, debias=False))
    tx = optax.chain(*parts)
    return Optimizer(leaves, layerwise(lambda leaf: tx, leaves, joined=True), weight_decay)


def lamb(
    leaves: Any,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.01,
) -> Optimizer:
    """LAMB (You et al. 2020, arXiv:1904.00962): Adam, each step scaled to its parameter's norm.

    Decay belongs to the step that is scaled, so it is applied inside.

    Args:
      leaves: tree of `Leaf`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decay added before the step is scaled by the trust ratio.

    Raises:
      ConfigError: an argument out of range.
    """
    checks.fractions(b1=b1, b2=b2)
    checks.positive(eps=eps)
    checks.not_negative(weight_decay=weight_decay)

    def make(leaf: Leaf) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
            optax.add_decayed_weights(weight_decay * leaf.decay),
            optax.scale_by_trust_ratio(),
        )

    return Optimizer(leaves, layerwise(make, leaves))


def layerwise(
    make: Callable[[Leaf], optax.GradientTransformation], leaves: Any, *, joined: bool = False
) -> optax.GradientTransformation:
    """Returns a transformation that treats every layer (and expert) of a stack by itself.

    Its state has the structure that `make(leaf).init(params)` has over the whole tree; moments of
    stacked parameters are stacked, and counts are shared.

    Args:
      make: the transformation of one parameter; the structure of its state must not depend on it.
      leaves: tree of `Leaf`.
      joined: whether the transformation sees joined dimensions flattened (`Leaf.view`).
    """
    facts: list[Leaf]
    treedef: Any
    outer: Any
    facts, treedef = jax.tree.flatten(leaves)
    transforms = [make(leaf) for leaf in facts]
    # Counts are what is scalar in the state of a matrix.
    probe = jax.eval_shape(transforms[0].init, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    probed, outer = jax.tree.flatten(probe)
    axes = outer.unflatten([0 if x.ndim else None for x in probed])

    def view(leaf: Leaf, x: jax.Array) -> jax.Array:
        return x.reshape(leaf.view(x.shape)) if joined else x

    def init(params: Any) -> Any:
        states = []
        for leaf, tx, p in zip(facts, transforms, treedef.flatten_up_to(params), strict=True):
            f = tx.init
            for _ in range(leaf.stack):
                f = jax.vmap(f, out_axes=axes)
            states.append(f(view(leaf, p)))
        return _join(states, probed, outer, treedef)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, states = [], []
        rows = zip(
            facts,
            transforms,
            treedef.flatten_up_to(grads),
            _split(state, probed, outer, treedef),
            treedef.flatten_up_to(params),
            strict=True,
        )
        for leaf, tx, g, s, p in rows:
            f = tx.update
            for _ in range(leaf.stack):
                f = jax.vmap(f, in_axes=(0, axes, 0), out_axes=(0, axes))
            u, s = f(view(leaf, g), s, view(leaf, p))
            updates.append(u.reshape(g.shape))
            states.append(s)
        return treedef.unflatten(updates), _join(states, probed, outer, treedef)

    return optax.GradientTransformation(init, update)


def _join(states: list[Any], probed: list[Any], outer: Any, treedef: Any) -> Any:
    """Turns one state a parameter into one state of trees, taking the first count."""
    columns = zip(*(outer.flatten_up_to(s) for s in states), strict=True)
    return outer.unflatten(
        [treedef.unflatten(c) if x.ndim else c[0] for x, c in zip(probed, columns, strict=True)]
    )


def _split(state: Any, probed: list[Any], outer: Any, treedef: Any) -> list[Any]:
    """Undoes `_join`."""
    columns = [
        treedef.flatten_up_to(c) if x.ndim else [c] * treedef.num_leaves
        for x, c in zip(probed, outer.flatten_up_to(state), strict=True)
    ]
    return [outer.unflatten(row) for row in zip(*columns, strict=True)]
