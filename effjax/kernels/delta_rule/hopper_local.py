"""Gradients inside chunks, once both walks of `hopper` are done: large batched products, by XLA.

With N what the tokens wrote, dN its gradient, S the state before a chunk, Z the gradient of the
state behind it, T and G as in `hopper_system`, and masked decays D_ij = e^(G_i - G_j),
    dR = T^T dN,    E = dR N^T D for j < i,    F = do N^T D for j <= i,
    dq = F K + e^G do S^T,    dk = F^T Q - (beta E)^T K + e^(G_C - G) N Z^T - beta M,
    dv = beta dR,             dbeta = <dR, v> - <k, M>,    M = E K + e^G dR S^T,
where M is what of the gradient comes through reading the old values. Decays scale what queries and
keys read and what keys write, and the last one of a chunk all of the state behind it, so that
    dG = <q, dq> - <k, beta M> - <k, the rest of dk>,    and dG_C also has <Z, state behind>.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels.delta_rule.hopper_plan import Plan

_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


class Known(NamedTuple):
    """What the walks leave behind.

    Attributes:
      q, k, v: bfloat16 [B, N * C, H, K or V].
      rows: float32 [B, H, N, ROWS, C].
      inverse: T, bfloat16 [B, N, H, C, C].
      new, states: N [B, N * C, H, V] and S [B, N, H, K, V], bfloat16.
      last: float32 [B, H, K, V], the state behind the last chunk.
      do, dnew: gradients of the outputs and of N, bfloat16 [B, N * C, H, V].
      dstates: Z, bfloat16 [B, N, H, K, V].
    """

    q: Any
    k: Any
    v: Any
    rows: Any
    inverse: Any
    new: Any
    states: Any
    last: Any
    do: Any
    dnew: Any
    dstates: Any


class Grads(NamedTuple):
    """dq, dk, dv like q, k, v; float32 dbeta and the gradient of G, [B, H, N, C]."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dbeta: jax.Array
    dsums: jax.Array


def gradients(plan: Plan, known: Known) -> Grads:
    """The gradients of all chunks."""
    by_chunk = (known.q, known.k, known.v, known.new, known.do, known.dnew)
    q, k, v, new, do, dnew = (_chunks(plan, x) for x in by_chunk)
    coarse, fine, seen, left, beta = jnp.moveaxis(known.rows, (3, 1), (0, 3))  # [B, N, H, C]
    seen_, left_, beta_ = (x.swapaxes(2, 3)[..., None] for x in (seen, left, beta))

    i, j = jnp.indices((plan.size, plan.size))
    over = (coarse[..., None] - coarse[..., None, :]) + (fine[..., None] - fine[..., None, :])
    pairs = jnp.where(i >= j, jnp.exp(jnp.where(i >= j, over, 0.0)), 0.0)
    dright = _einsum('bnhij,bnihv->bnjhv', known.inverse, dnew)
    right = dright.astype(q.dtype)
    erased = _einsum('bnihv,bnjhv->bnhij', right, new) * jnp.where(i > j, pairs, 0.0)
    scores = (_einsum('bnihv,bnjhv->bnhij', do, new) * pairs).astype(q.dtype)

    def read(weights: jax.Array, by: jax.Array) -> jax.Array:
        """Of gradients of what was read with some vectors, those of the vectors."""
        inside = _einsum('bnhij,bnjhk->bnihk', weights.astype(q.dtype), k)
        return inside + seen_ * _einsum('bnihv,bnhkv->bnihk', by, known.states)

    dq, old = read(scores, do), read(erased, right)
    written = _einsum('bnhij,bnihk->bnjhk', scores, q)
    written -= _einsum('bnhij,bnihk->bnjhk', (beta[..., None] * erased).astype(q.dtype), k)
    written += left_ * _einsum('bnjhv,bnhkv->bnjhk', new, known.dstates)
    dsums = _dots(q, dq) - beta * _dots(k, old) - _dots(k, written)
    behind = _dots_of_states(known).swapaxes(1, 2)
    dsums = dsums.at[..., -1].add(behind)
    dk = written - beta_ * old
    dbeta = _dots(v, dright) - _dots(k, old)
    dq, dk, dv = (x.astype(q.dtype).reshape(x.shape[0], -1, *x.shape[3:])
                  for x in (dq, dk, beta_ * dright))  # fmt: skip
    return Grads(dq, dk, dv, dbeta.swapaxes(1, 2), dsums.swapaxes(1, 2))


def _chunks(plan: Plan, x: jax.Array) -> jax.Array:
    """[B, N * C, H, K] -> [B, N, C, H, K]."""
    return x.reshape(x.shape[0], -1, plan.size, *x.shape[2:])


def _dots(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of the vectors of two arrays [B, N, C, H, K], float32 [B, N, H, C]."""
    return jnp.sum(a.astype(jnp.float32) * b, axis=4).swapaxes(2, 3)


def _dots_of_states(known: Known) -> jax.Array:
    """Products of the states behind the chunks with their gradients, [B, H, N]."""
    inner = _einsum('bnhkv,bnhkv->bhn', known.states[:, 1:], known.dstates[:, :-1])
    last = _einsum('bhkv,bhkv->bh', known.last, known.dstates[:, -1])
    return jnp.concatenate([inner, last[..., None]], axis=2)
