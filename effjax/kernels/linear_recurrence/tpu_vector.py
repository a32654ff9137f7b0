"""One chunk of one head inside the TPU kernels, where each key dimension decays by itself.

The products of queries and keys contain the decay, so that a chunk is halved again and again: its
right halves read the left ones through the decay to and from their border, one product a level,
down to leaves of 8 tokens, whose pairs are formed one by one (the secondary chunks of GLA, arXiv
2312.06635). With A the result, G the running sums in the chunk and S the state before it,
    o = A v + (q e^G) S,    S' = e^(G_C) S + (k e^(G_C - G))^T v.
The gradient of G is q dq where it is read and -k dk where it is written, in float32: borders
receive and give the same.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels.decays import Sum
from effjax.kernels.linear_recurrence.tpu_plan import LEAF
from effjax.kernels.linear_recurrence.tpu_scalar import Head, as_column, as_row, dot, exp

_LEFT, _RIGHT = ((0,), (0,)), ((1,), (1,))  # what to contract: rows, or columns, of both
Columns = tuple[jax.Array, ...]  # keys of one or several kinds, [C, K] each


class Sums(NamedTuple):
    """Running sums [C, K] of a head: `total` with each token, `seen` what it reads; [1, K] last."""

    total: Sum
    seen: Sum
    end: Sum


class Grads(NamedTuple):
    """Gradients of a head, float32; of the sums [C, K] where they are read and written."""

    dq: jax.Array
    dk: jax.Array
    dv: jax.Array
    dstate: jax.Array
    dseen: jax.Array
    dtotal: jax.Array


def load(refs: Any, head: int, block: int, key_dim: int, strict: bool) -> Sums:
    """The sums of a head from references [C, kinds * block * K], coarse and fine."""

    def of(kind: int) -> Sum:
        at = (kind * block + head) * key_dim
        return Sum(*(r[:, at : at + key_dim] for r in refs))

    total = of(0)
    at, last = head * key_dim, refs[0].shape[0] - 1
    end = Sum(*(r[last : last + 1, at : at + key_dim] for r in refs))
    return Sums(total, of(1) if strict else total, end)


def weights(q, columns: Columns, sums: Sums, strict: bool) -> list[jax.Array]:
    """The decayed products of queries with keys of one or several kinds [C, C], float32."""
    found = _leaves(q, columns, sums, strict)
    for level in _levels(q, columns, sums):
        scores = (dot(level.q, k, _RIGHT) for k in level.columns)
        found = [w + jnp.where(level.mask, x, 0.0) for w, x in zip(found, scores, strict=True)]
    return found


def weights_backward(
    q, columns: Columns, sums: Sums, strict: bool, dweights: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """(the weights again, the gradient of queries, those of the columns).

    Args:
      q, columns, sums, strict: as `weights` takes them.
      dweights: gradients of the weights [C, C], float32, of any value where a token may not look.
    """
    found, dq, dcolumns = _leaves_backward(q, columns, sums, strict, dweights)
    for level in _levels(q, columns, sums):
        for n, k in enumerate(level.columns):
            found[n] = found[n] + jnp.where(level.mask, dot(level.q, k, _RIGHT), 0.0)
            dscores = jnp.where(level.mask, dweights[n], 0.0).astype(q.dtype)
            # What is scaled with 0 comes back with 0: rows of left halves, columns of right ones.
            dq = dq + jnp.where(level.right, level.decay * dot(dscores, k), 0.0)
            back = level.decay * dot(dscores, level.q, _LEFT)
            dcolumns[n] = dcolumns[n] + jnp.where(level.right, 0.0, back)
    return found, dq, dcolumns


def forward(q, k, v, sums: Sums, state, strict: bool) -> tuple[jax.Array, jax.Array]:
    """(o [C, V], the state after the chunk [K, V]), float32."""
    (pairs,) = weights(q, (k,), sums, strict)
    read, written, whole = _ends(q, k, sums)
    o = dot(pairs.astype(v.dtype), v) + dot(read, state.astype(q.dtype))
    return o, whole * state + dot(written, v, _LEFT)


def backward(head: Head, sums: Sums, strict: bool) -> Grads:
    """The gradients of one head."""
    q, k, v, dtype = head.q, head.k, head.v, head.v.dtype
    do, state, dafter = (x.astype(dtype) for x in (head.do, head.state, head.dafter))
    (pairs,), dq, (dk,) = weights_backward(q, (k,), sums, strict, [dot(do, v, _RIGHT)])
    read, written, whole = _ends(q, k, sums)
    dq = dq + exp(sums.seen.coarse + sums.seen.fine) * dot(do, state, _RIGHT)
    dk_new = exp(sums.end.over(sums.total)) * dot(v, dafter, _RIGHT)
    dv = dot(pairs.astype(dtype), do, _LEFT) + dot(written, dafter)
    kept = whole * head.dafter
    dend = as_row(jnp.sum(kept * head.state, axis=1, keepdims=True))
    dend = dend + jnp.sum(dk_new * k, axis=0, keepdims=True)
    dk = dk + dk_new
    last = jax.lax.broadcasted_iota(jnp.int32, dk.shape, 0) == dk.shape[0] - 1
    dtotal = jnp.where(last, dend, 0.0) - dk * k
    return Grads(dq, dk, dv, kept + dot(read, do, _LEFT), dq * q, dtotal)


def write_sums(ref: Any, grads: Any, head: int, block: int, strict: bool) -> None:
    """Writes the gradients of a head's sums, `dtotal` and `dseen`, where `load` reads them."""
    width = grads.dtotal.shape[1]
    at = slice(head * width, (head + 1) * width)
    if strict:
        ref[:, at] = grads.dtotal
        ref[:, slice(at.start + block * width, at.stop + block * width)] = grads.dseen
    else:
        ref[:, at] = grads.dtotal + grads.dseen


def _ends(q, k, sums: Sums) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries from the chunk's begin, keys to its end [C, K], the decay over it [K, 1]."""
    read = (q * exp(sums.seen.coarse + sums.seen.fine)).astype(q.dtype)
    written = (k * exp(sums.end.over(sums.total))).astype(k.dtype)
    return read, written, as_column(exp(sums.end.coarse + sums.end.fine))


class _Level(NamedTuple):
    """One halving: q of right halves and k of left ones through their border, 0 elsewhere."""

    q: jax.Array
    columns: Columns
    decay: jax.Array  # [C, K], of either
    right: jax.Array  # [C, 1], which tokens stand in right halves
    mask: jax.Array  # [C, C], right halves by their left ones


def _levels(q, columns: Columns, sums: Sums) -> Iterator[_Level]:
    size = q.shape[0]
    half = size // 2
    while half >= LEAF:
        i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (size, size), 1)
        pair = 2 * half - 1  # sizes are powers of two: bits tell the pair and the side
        together = (i | pair) == (j | pair)
        mask = together & ((i & half) != 0) & ((j & half) == 0)
        token = jax.lax.broadcasted_iota(jnp.int32, q.shape, 0)
        right = (token & half) != 0
        border = sums.total.map(functools.partial(_of_row, span=2 * half, row=half - 1))
        down, up = sums.seen.over(border), border.over(sums.total)
        decay = exp(jnp.where(right, down, up))
        yield _Level(
            jnp.where(right, q * decay, 0.0).astype(q.dtype),
            tuple(jnp.where(right, 0.0, k * decay).astype(k.dtype) for k in columns),
            decay,
            right,
            mask,
        )
        half //= 2


def _of_row(x: jax.Array, span: int, row: int) -> jax.Array:
    """[C, K] with one row of every `span` in all of its rows."""
    cut = x.reshape(-1, span, x.shape[1])
    return jnp.broadcast_to(cut[:, row : row + 1, :], cut.shape).reshape(x.shape)


def _pairs(
    q, columns: Columns, sums: Sums, strict: bool
) -> Iterator[tuple[int, jax.Array, list[jax.Array]]]:
    """For each place in a leaf: the decay from it to each token, the columns there [C, K]."""
    place = jax.lax.broadcasted_iota(jnp.int32, q.shape, 0) & (LEAF - 1)
    wide = [k.astype(jnp.float32) for k in columns]
    for j in range(LEAF):
        later = place > j if strict else place >= j
        one = sums.total.map(functools.partial(_of_row, span=LEAF, row=j))
        decay = jnp.where(later, exp(jnp.where(later, sums.seen.over(one), 0.0)), 0.0)
        yield j, decay, [_of_row(k, LEAF, j) for k in wide]


def _column_of_leaf(size: int, j: int) -> jax.Array:
    """Where [C, C] holds each token's pair with the j-th of its leaf."""
    i = jax.lax.broadcasted_iota(jnp.int32, (size, size), 0)
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), 1) == (i & ~(LEAF - 1)) + j


def _leaves(q, columns: Columns, sums: Sums, strict: bool) -> list[jax.Array]:
    """Weights [C, C] of pairs inside of leaves, 0 elsewhere."""
    size, wide = q.shape[0], q.astype(jnp.float32)
    found = [jnp.zeros((size, size), jnp.float32) for _ in columns]
    for j, decay, keys in _pairs(q, columns, sums, strict):
        at, reads = _column_of_leaf(size, j), wide * decay
        for n, key in enumerate(keys):
            column = jnp.sum(reads * key, axis=1, keepdims=True)
            found[n] = found[n] + jnp.where(at, column, 0.0)
    return found


def _leaves_backward(
    q, columns: Columns, sums: Sums, strict: bool, dweights: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array, list[jax.Array]]:
    """(the weights of `_leaves`, what they give to dq and to the columns' gradients)."""
    size, wide = q.shape[0], q.astype(jnp.float32)
    found = [jnp.zeros((size, size), jnp.float32) for _ in columns]
    dq, dcolumns = jnp.zeros(q.shape, jnp.float32), [jnp.zeros(q.shape, jnp.float32)] * len(columns)
    place = jax.lax.broadcasted_iota(jnp.int32, q.shape, 0) & (LEAF - 1)
    for j, decay, keys in _pairs(q, columns, sums, strict):
        at, reads = _column_of_leaf(size, j), wide * decay
        for n, key in enumerate(keys):
            column = jnp.sum(reads * key, axis=1, keepdims=True)
            found[n] = found[n] + jnp.where(at, column, 0.0)
            given = jnp.sum(jnp.where(at, dweights[n], 0.0), axis=1, keepdims=True)
            dq = dq + given * decay * key
            back = (given * reads).reshape(-1, LEAF, q.shape[1])
            back = jnp.broadcast_to(jnp.sum(back, axis=1, keepdims=True), back.shape)
            dcolumns[n] = dcolumns[n] + jnp.where(place == j, back.reshape(q.shape), 0.0)
    return found, dq, dcolumns
