"""One chunk of one head inside the TPU kernels: a system solved, the rest a linear recurrence.

With G the running sums of log-decays in the chunk, S the state before it, r and w what the
transition reads with and writes to, and (x, y) the decayed products of x_i with y_j, the rows of N,
what each token's transition reads of the state before it, solve
    (I - (r, w)) N = (r, k) v + (r e^(G before)) S,    (r, .) for j < i,
and then keys k with values v and keys w with values N are written alike:
    o = (q, k) v + (q, w) N + (q e^G) S,    S' = e^(G_C) S + k'^T v + w'^T N,    (q, .) for j <= i,
with k' and w' times their decays to the chunk's end. From the gradient of N, of both lines,
    dR = (I - (r, w))^-T dN,    d(r, w) = dR N^T,    d(r, k) = dR v^T,
and those of inputs follow. All sums are float32, as are all factors but inputs that meet each
other; the gradient of G is x dx where it is read and -y dy where it is written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels.delta_rule.tpu_chunk import invert
from effjax.kernels.linear_recurrence import tpu_vector as vector
from effjax.kernels.linear_recurrence.tpu_scalar import as_column, as_row, dot, exp

_LEFT, _RIGHT = ((0,), (0,)), ((1,), (1,))  # what to contract: rows, or columns, of both


class Head(NamedTuple):
    """Inputs of one head in a chunk: all [C, K], but v [C, V]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    read: jax.Array
    write: jax.Array

    @property
    def columns(self) -> vector.Columns:
        return self.k, self.write


class Grads(NamedTuple):
    """Gradients of a head's inputs, of the state before the chunk, of sums [C, K]; float32."""

    inputs: Head
    dstate: jax.Array
    dseen: jax.Array
    dtotal: jax.Array


class _Ends(NamedTuple):
    """Decays, from a chunk's begin to what is read [C, K] twice, to its end [C, K], over it."""

    read: jax.Array
    query: jax.Array
    left: jax.Array
    whole: jax.Array  # [K, 1]


class _Solved(NamedTuple):
    """(r, k) [C, C], the system's inverse [C, C], r from the chunk's begin [C, K], N [C, V]."""

    by_key: jax.Array
    inverse: jax.Array
    read: jax.Array
    found: jax.Array


def forward(head: Head, sums: vector.Sums, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(o [C, V], the state after the chunk [K, V]), float32."""
    ends, v = _ends(sums), _wide(head.v)
    found = _solve(head, sums, ends, state).found
    q_key, q_write = vector.weights(head.q, head.columns, _own(sums), False)
    o = dot(q_key, v) + dot(q_write, found) + dot(head.q * ends.query, state)
    after = dot(head.k * ends.left, v, _LEFT) + dot(head.write * ends.left, found, _LEFT)
    return o, ends.whole * state + after


def backward(
    head: Head, sums: vector.Sums, do: jax.Array, state: jax.Array, dafter: jax.Array
) -> Grads:
    """The gradients of one head from those of its outputs and of the state after the chunk."""
    ends, v, do = _ends(sums), _wide(head.v), _wide(do)
    solved = _solve(head, sums, ends, state)
    found, columns = solved.found, head.columns
    dweights = [dot(do, v, _RIGHT), dot(do, found, _RIGHT)]
    (q_key, q_write), dq, of_q = vector.weights_backward(
        head.q, columns, _own(sums), False, dweights
    )
    key, write = head.k * ends.left, head.write * ends.left
    dfound = dot(q_write, do, _LEFT) + dot(write, dafter)
    dright = dot(solved.inverse, dfound, _LEFT)
    dweights = [dot(dright, v, _RIGHT), dot(dright, found, _RIGHT)]
    _, dread, of_read = vector.weights_backward(head.read, columns, sums, True, dweights)
    dv = dot(q_key, do, _LEFT) + dot(key, dafter) + dot(solved.by_key, dright, _LEFT)

    dq = dq + ends.query * dot(do, state, _RIGHT)
    dread = dread + ends.read * dot(dright, state, _RIGHT)
    end_key, end_write = (ends.left * dot(x, dafter, _RIGHT) for x in (v, found))
    dk, dwrite = of_q[0] + of_read[0] + end_key, of_q[1] + of_read[1] + end_write
    kept = ends.whole * dafter
    dend = as_row(jnp.sum(kept * state, axis=1, keepdims=True))
    dend = dend + jnp.sum(end_key * head.k + end_write * head.write, axis=0, keepdims=True)
    last = jax.lax.broadcasted_iota(jnp.int32, dk.shape, 0) == dk.shape[0] - 1
    dtotal = jnp.where(last, dend, 0.0) + dq * head.q - dk * head.k - dwrite * head.write
    dstate = kept + dot(head.q * ends.query, do, _LEFT) + dot(solved.read, dright, _LEFT)
    return Grads(Head(dq, dk, dv, dread, dwrite), dstate, dread * head.read, dtotal)


def _own(sums: vector.Sums) -> vector.Sums:
    """The sums as queries read them: their own token's is among them."""
    return sums._replace(seen=sums.total)


def _ends(sums: vector.Sums) -> _Ends:
    read, query, whole = (exp(s.coarse + s.fine) for s in (sums.seen, sums.total, sums.end))
    return _Ends(read, query, exp(sums.end.over(sums.total)), as_column(whole))


def _solve(head: Head, sums: vector.Sums, ends: _Ends, state: jax.Array) -> _Solved:
    by_key, by_write = vector.weights(head.read, head.columns, sums, True)
    inverse, read = invert(-by_write), head.read * ends.read
    right = dot(by_key, _wide(head.v)) + dot(read, state)
    return _Solved(by_key, inverse, read, dot(inverse, right))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
