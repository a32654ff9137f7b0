"""One chunk of one head inside the TPU kernels, with a decay a token or none.

With G the running sums of log-decays in the chunk and S the state before it,
    A_ij = (q_i k_j) e^(G_i - G_j) for j <= i,
    o = A v + e^G (q S),    S' = e^(G_C) S + k^T (e^(G_C - G) v).
With E the gradient of S', and do that of o,
    dA = do v^T,    dscores_ij = dA_ij e^(G_i - G_j),
    dq = dscores k + e^G (do S^T),    dk = dscores^T q + (e^(G_C - G) v) E^T,
    dv = A^T do + e^(G_C - G) (k E),    dS = e^(G_C) E + (e^G q)^T do.
The gradient of G takes the rows of dA * A and gives its columns, from one float32 matrix: where
they should cancel they do.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels.decays import Sum

_NOTHING = -104.0  # exp of less is 0 in float32
_LEFT, _RIGHT = ((0,), (0,)), ((1,), (1,))  # what to contract: rows, or columns, of both


class Decay(NamedTuple):
    """Decays inside a chunk of C tokens.

    Attributes:
      pairs: [C, C], from each token to each later one, 0 elsewhere.
      seen: [C, 1], from the chunk's begin to each token.
      left: [C, 1], from each token to the chunk's end.
      whole: [1, 1], over the chunk.
      none: nothing decays; the last three are 1.
    """

    pairs: jax.Array
    seen: Any = 1.0
    left: Any = 1.0
    whole: Any = 1.0
    none: bool = False


class Head(NamedTuple):
    """What the backward pass reads: q, k [C, K], v, do [C, V], S and E [K, V]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    state: jax.Array
    dafter: jax.Array


class Grads(NamedTuple):
    """Gradients of a head; with decays, of G where it is read and written too, [1, C]."""

    dv: jax.Array
    dstate: jax.Array
    rows: Any = None
    columns: Any = None


def dot(a: jax.Array, b: jax.Array, contract=((1,), (0,))) -> jax.Array:
    """A product with float32 sums; of float32 factors with all their bits."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def exp(x: jax.Array) -> jax.Array:
    """e^x, exactly 0 where float32 has nothing smaller: documents rely on it."""
    return jnp.where(x < _NOTHING, 0.0, jnp.exp(x))


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of queries and keys, float32 [C, C]."""
    return dot(q, k, _RIGHT)


def decays(size: int, block: int, strict: bool, refs: Any, head: int) -> Decay:
    """The decays of a head, from references to sums [rows, C], coarse and fine."""
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
    mask = j < i if strict else j <= i
    if not refs:
        return Decay(jnp.where(mask, 1.0, 0.0), none=True)
    total = Sum(*(r[head : head + 1, :] for r in refs))
    seen = Sum(*(r[block + head : block + head + 1, :] for r in refs)) if strict else total
    end = total.map(lambda x: _at_end(x, size))
    rows, columns = seen.map(as_column), total.map(as_column)
    # Masked before the exponential too: above the diagonal it would overflow.
    pairs = jnp.where(mask, exp(jnp.where(mask, rows.over(total), 0.0)), 0.0)
    return Decay(
        pairs,
        exp(rows.coarse + rows.fine),
        exp(end.over(columns)),
        exp(end.coarse + end.fine),
    )


def forward(q, k, v, scores, decay: Decay, state) -> tuple[jax.Array, jax.Array]:
    """(o [C, V], the state after the chunk [K, V]), float32."""
    old = dot(q, state.astype(q.dtype))
    written = v
    if not decay.none:
        old, state = decay.seen * old, decay.whole * state
        written = (decay.left * v).astype(v.dtype)
    o = dot((scores * decay.pairs).astype(v.dtype), v) + old
    return o, state + dot(k, written, _LEFT)


@dataclasses.dataclass
class Group:
    """Sums of dq, dk and dscores over the value heads that share a query head."""

    dq: Any = 0.0
    dk: Any = 0.0
    dscores: Any = 0.0

    def add(self, dq: jax.Array, dk: jax.Array, dscores: jax.Array) -> None:
        self.dq, self.dk = self.dq + dq, self.dk + dk
        self.dscores = self.dscores + dscores

    def finish(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(dq, dk) [C, K], float32."""
        dscores = self.dscores.astype(q.dtype)
        return self.dq + dot(dscores, k), self.dk + dot(dscores, q, _LEFT)


def backward(head: Head, scores: jax.Array, decay: Decay, group: Group) -> Grads:
    """The gradients of one head; those of its query head are added to `group`."""
    q, k, v, dtype = head.q, head.k, head.v, head.v.dtype
    do, state, dafter = (x.astype(dtype) for x in (head.do, head.state, head.dafter))
    weights = scores * decay.pairs
    dweights = dot(do, v, _RIGHT)
    read, written, dstate = q, v, head.dafter
    dq_old, dv_new = dot(do, state, _RIGHT), dot(k, dafter)
    if not decay.none:
        read, written = (decay.seen * q).astype(dtype), (decay.left * v).astype(dtype)
        dq_old, dv_new = decay.seen * dq_old, decay.left * dv_new
        dstate = decay.whole * dstate
    dk_new = dot(written, dafter, _RIGHT)
    group.add(dq_old, dk_new, dweights * decay.pairs)
    dv = dot(weights.astype(dtype), do, _LEFT) + dv_new
    rows = columns = None
    if not decay.none:
        flow = dweights * weights
        kept = jnp.sum(jnp.sum(dstate * head.state, 0, keepdims=True), 1, keepdims=True)
        out = jnp.sum(dk_new * k, axis=1, keepdims=True)
        rows = as_row(jnp.sum(dq_old * q, axis=1, keepdims=True) + _over_columns(flow))
        ends = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1) == rows.shape[1] - 1
        whole = kept + jnp.sum(out, axis=0, keepdims=True)
        columns = jnp.where(ends, whole, 0.0) - jnp.sum(flow, axis=0, keepdims=True) - as_row(out)
    return Grads(dv, dstate + dot(read, do, _LEFT), rows, columns)


def write_sums(ref: Any, grads: Grads, head: int, block: int, strict: bool) -> None:
    """Writes the gradients of a head's sums where `decays` read them."""
    if strict:
        ref[head : head + 1, :] = grads.columns
        ref[block + head : block + head + 1, :] = grads.rows
    else:
        ref[head : head + 1, :] = grads.rows + grads.columns


def _over_columns(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _at_end(row: jax.Array, size: int) -> jax.Array:
    """The last of [1, C], as [1, 1]."""
    last = jax.lax.broadcasted_iota(jnp.int32, row.shape, 1) == size - 1
    return jnp.sum(jnp.where(last, row, 0.0), axis=1, keepdims=True)


def as_column(row: jax.Array) -> jax.Array:
    """[1, C] -> [C, 1], exactly."""
    return jnp.sum(jnp.where(_eye(row.shape[1]), row, 0.0), axis=1, keepdims=True)


def as_row(column: jax.Array) -> jax.Array:
    """[C, 1] -> [1, C], exactly."""
    return jnp.sum(jnp.where(_eye(column.shape[0]), column, 0.0), axis=0, keepdims=True)


def _eye(size: int) -> jax.Array:
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return i == jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
