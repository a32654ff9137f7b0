"""Muon for matrices, AdamW for everything else, told apart by axis names."""

import dataclasses
import math
from typing import Any, Literal

import jax
import optax

from effjax.core.errors import ConfigError
from effjax.training.optimizers import checks
from effjax.training.optimizers.base import Optimizer
from effjax.training.optimizers.leaves import Leaf


def muon(
    leaves: Any,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    rms: float = 0.2,
    weight_decay: float = 0.1,
    adam_lr_scale: float = 1.0,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-8,
    mu_dtype: Literal['float32', 'bfloat16'] | None = None,
) -> Optimizer:
    """Muon (Jordan et al. 2024): orthogonalised momentum, with AdamW beside it.

    A parameter is a matrix when it maps one hidden space to another, heads and head dimension
    being one (`Leaf.matrix`); each layer and expert of a stack is orthogonalised by itself.
    Embeddings, heads, routers, norms and biases get AdamW.

    Args:
      leaves: tree of `Leaf`.
      momentum: decay of the momentum.
      nesterov: Nesterov's momentum.
      ns_steps: Newton-Schulz iterations.
      rms: scale of a matrix's step, `rms * sqrt(max(inputs, outputs))`: with 0.2 its size is that
        of an AdamW step, and both share one learning rate (Liu et al. 2025, arXiv:2502.16982).
        0: the original scale, `sqrt(max(1, outputs / inputs))`.
      weight_decay: decoupled decay, multiplied by the learning rate.
      adam_lr_scale: factor on the learning rate of what is no matrix.
      adam_b1: decay of AdamW's first moment.
      adam_b2: decay of AdamW's second moment.
      adam_eps: added to the root of AdamW's second moment.
      mu_dtype: dtype of momentum and first moment; None keeps the parameters'.

    Raises:
      ConfigError: an argument out of range, or a model without any matrix.
    """
    checks.fractions(momentum=momentum, adam_b1=adam_b1, adam_b2=adam_b2)
    checks.positive(ns_steps=ns_steps, adam_eps=adam_eps)
    checks.not_negative(rms=rms, weight_decay=weight_decay, adam_lr_scale=adam_lr_scale)
    if not any(leaf.matrix for leaf in jax.tree.leaves(leaves)):
        raise ConfigError("config.optimizer: muon finds no matrix in the model; use 'adamw'.")
    matrices = optax.contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=momentum,
        nesterov=nesterov,
        mu_dtype=mu_dtype,
        weight_dimension_numbers=jax.tree.map(_dimensions, _select(leaves, leaves, True)),
    )
    rest = optax.scale_by_adam(b1=adam_b1, b2=adam_b2, eps=adam_eps, mu_dtype=mu_dtype)
    scaled = jax.tree.map(
        lambda leaf: leaf if leaf.matrix else dataclasses.replace(leaf, lr=leaf.lr * adam_lr_scale),
        leaves,
    )
    return Optimizer(scaled, _by_kind(leaves, matrices, rest, rms), weight_decay)


def _by_kind(
    leaves: Any,
    matrices: optax.GradientTransformation,
    rest: optax.GradientTransformation,
    rms: float,
) -> optax.GradientTransformation:
    """Applies `matrices` to matrices and `rest` to the others; state {'muon', 'adam'}."""

    def init(params: Any) -> Any:
        return {
            'muon': matrices.init(_select(leaves, params, True)),
            'adam': rest.init(_select(leaves, params, False)),
        }

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        chosen = _select(leaves, leaves, True)
        steps, muon_state = matrices.update(_select(leaves, grads, True), state['muon'])
        steps = jax.tree.map(lambda leaf, s: s * _size(leaf, s.shape, rms), chosen, steps)
        others, adam_state = rest.update(_select(leaves, grads, False), state['adam'])
        return _merge(leaves, steps, others), {'muon': muon_state, 'adam': adam_state}

    return optax.GradientTransformation(init, update)


def _dimensions(leaf: Leaf) -> optax.contrib.MuonDimensionNumbers:
    inputs, outputs = leaf.groups
    return optax.contrib.MuonDimensionNumbers(reduction_axis=inputs, output_axis=outputs)


def _size(leaf: Leaf, shape: tuple[int, ...], rms: float) -> float:
    inputs, outputs = leaf.view(shape)[leaf.stack :]
    if rms:
        return rms * math.sqrt(max(inputs, outputs))
    return math.sqrt(max(1.0, outputs / inputs))


def _select(leaves: Any, tree: Any, matrix: bool) -> dict[str, Any]:
    """Returns the nested dict of only the matrices, or of only the others."""
    out = {}
    for key, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            if leaf.matrix == matrix:
                out[key] = tree[key]
        elif inner := _select(leaf, tree[key], matrix):
            out[key] = inner
    return out


def _merge(leaves: Any, matrices: Any, others: Any) -> dict[str, Any]:
    """Undoes `_select`."""
    out = {}
    for key, leaf in leaves.items():
        if isinstance(leaf, Leaf):
            out[key] = matrices[key] if leaf.matrix else others[key]
        else:
            out[key] = _merge(leaf, matrices.get(key, {}), others.get(key, {}))
    return out
