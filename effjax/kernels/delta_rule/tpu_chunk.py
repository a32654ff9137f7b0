"""One chunk of one head inside the TPU kernels: the system solved, the rest a linear recurrence.

With G the running sums of log-decays in the chunk, S the state before it and beta on a diagonal,
    (I + A) N = R,    R = beta (V - e^G K S),    A_ij = beta_i e^(G_i - G_j) k_i . k_j  for j < i,
the rows of N are what the tokens write in place of V: outputs and the next state are those of
linear attention with N for its values, and so are their gradients. From that of N,
    dR = (I + A)^-T dN,    dA = -dR N^T  below the diagonal,
and those of beta, V, K, G and S follow. All sums are float32, as are all factors but inputs that
meet each other.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels.delta_rule.tpu_plan import LEAF
from effjax.kernels.linear_recurrence import tpu_scalar as scalar
from effjax.kernels.linear_recurrence.tpu_scalar import as_row, dot

_LEFT, _RIGHT = ((0,), (0,)), ((1,), (1,))  # what to contract: rows, or columns, of both


class Head(NamedTuple):
    """Inputs of one head in a chunk: q, k [C, K], v [C, V] as they come, beta [C, 1], decays."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    decay: scalar.Decay


class Solved(NamedTuple):
    """A chunk's system and what solves it, float32.

    Attributes:
      pairs: [C, C], decays from each token to each later one, 0 on the diagonal too.
      keys: [C, C], products of keys times `pairs`: A without beta.
      inverse: [C, C], (I + A)^-1.
      old: [C, V], e^G K S, what the state before the chunk holds for each key.
      new: [C, V], N.
    """

    pairs: jax.Array
    keys: jax.Array
    inverse: jax.Array
    old: jax.Array
    new: jax.Array


class Grads(NamedTuple):
    """Gradients: dq, dk [C, K], dv [C, V], dbeta [1, C], of G [1, C] or None, of S [K, V]."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dsums: jax.Array | None
    dstate: jax.Array


def forward(head: Head, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(o [C, V], the state after the chunk [K, V]), float32."""
    new = _solve(head, state).new
    scores = scalar.scores(head.q, head.k)
    return scalar.forward(_wide(head.q), _wide(head.k), new, scores, head.decay, state)


def backward(head: Head, do: jax.Array, state: jax.Array, dafter: jax.Array) -> Grads:
    """The gradients of one head from those of its outputs and of the state after the chunk."""
    q, k, v, beta, decay = _wide(head.q), _wide(head.k), _wide(head.v), head.beta, head.decay
    solved, group = _solve(head, state), scalar.Group()
    known = scalar.Head(q, k, solved.new, do, state, dafter)
    grads = scalar.backward(known, scalar.scores(head.q, head.k), decay, group)
    dq, dk = group.finish(q, k)
    dright = dot(solved.inverse, grads.dv, _LEFT)
    dv = beta * dright  # and -dv is the gradient of `old`
    dsystem = jnp.where(_below(v.shape[0]), -dot(dright, solved.new, _RIGHT), 0.0)
    dbeta = _over_columns(dright * (v - solved.old)) + _over_columns(dsystem * solved.keys)
    dkeys = dsystem * beta * solved.pairs
    dread = decay.seen * dv
    dk = dk + dot(dkeys, k) + dot(dkeys, k, _LEFT) - dot(dread, state, _RIGHT)
    dsums = None
    if not decay.none:
        flow = dsystem * beta * solved.keys
        read = as_row(_over_columns(flow) - _over_columns(dv * solved.old))
        dsums = grads.rows + grads.columns + read - jnp.sum(flow, axis=0, keepdims=True)
    return Grads(dq, dk, dv, as_row(dbeta), dsums, grads.dstate - dot(k, dread, _LEFT))


def _solve(head: Head, state: jax.Array) -> Solved:
    k, beta, decay = head.k, head.beta, head.decay
    pairs = jnp.where(_below(k.shape[0]), decay.pairs, 0.0)
    keys = dot(k, k, _RIGHT) * pairs
    inverse = invert(beta * keys)
    old = decay.seen * dot(_wide(k), state)
    return Solved(pairs, keys, inverse, old, dot(inverse, beta * (_wide(head.v) - old)))


def invert(system: jax.Array) -> jax.Array:
    """(I + A)^-1 of a float32 A [C, C] below the diagonal, C a leaf doubled some times.

    Leaves are eliminated column by column, all side by side; two neighbours become one by
        [P 0; Q R]^-1 = [P^-1 0; -R^-1 Q P^-1 R^-1].
    The shorter way, a product of I + A^(2^n), cancels: for one key throughout A^n has entries like
    binomial coefficients, and the inverse has none above 1.
    """
    size = system.shape[0]
    i, j = _indices(size)
    inverse = jnp.where(i == j, 1.0, 0.0)
    for s in range(LEAF - 1):
        column = _over_columns(jnp.where(j == (i & -LEAF) + s, system, 0.0))
        leaves = inverse.reshape(-1, LEAF, size)
        row = jnp.broadcast_to(jax.lax.slice_in_dim(leaves, s, s + 1, axis=1), leaves.shape)
        inverse = inverse - column * row.reshape(size, size)
    half = LEAF
    while half < size:
        beside = ((i & -2 * half) == (j & -2 * half)) & ((j & half) == 0)
        cross = _second(jnp.where(beside, system, 0.0), half)
        right = _as_second(dot(cross, inverse), half)
        inverse = inverse - _as_second(dot(_second(inverse, half), right), half)
        half *= 2
    return inverse


def _second(x: jax.Array, half: int) -> jax.Array:
    """The rows of each second block of `half` rows: [C, C] -> [C / 2, C]."""
    blocks = x.reshape(-1, 2, half, x.shape[1])
    return jax.lax.slice_in_dim(blocks, 1, 2, axis=1).reshape(-1, x.shape[1])


def _as_second(x: jax.Array, half: int) -> jax.Array:
    """Puts rows back where `_second` took them, zeros between: [C / 2, C] -> [C, C]."""
    blocks = x.reshape(-1, 1, half, x.shape[1])
    return jnp.concatenate([jnp.zeros_like(blocks), blocks], axis=1).reshape(-1, x.shape[1])


def _indices(size: int) -> tuple[jax.Array, jax.Array]:
    """Row and column of each element of [C, C]."""
    shape = size, size
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return rows, columns


def _below(size: int) -> jax.Array:
    i, j = _indices(size)
    return j < i


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _over_columns(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)
