"""Diagonal plus low-rank recurrences in chunks: products and one triangular solve.

Within a chunk let G_t be the running sum of log-decays, S the state before it, and s_t what the
transition reads, read_t S_{t-1}. Unrolled, with sums over j < t,
    S_{t-1} = e^(G_{t-1}) S + sum_j e^(G_{t-1} - G_j) (k_j v_j^T + write_j s_j^T),
so that the rows s_t solve a unit lower triangular system, for what the values and what S give,
before S is known; all else is products. Decays enter as e^(G_i - G_j) with j <= i only, never above
1: a chunk is halved again and again, the right half meeting the left one at their border, down to
blocks of `cost.LEAF` tokens, whose pairs are formed one by one.

Arrays are [N, B, H, C, ...]: N chunks of C tokens. Large problems go through pieces of chunks in
turn (`cost.pieces`), whose inner arrays the backward pass forms again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, before, masked_decay, running
from effjax.kernels.dplr.cost import chunk_size, leaf_size, pieces
from effjax.kernels.dplr.problem import Problem


class _Chunks(NamedTuple):
    """The arrays of a problem in chunks, [N, ...], and which of their tokens meet what.

    Tokens that share a document, that read the state, that write it, and chunks that keep any of
    it: [N, B, 1, C, C], [N, B, 1, C, 1], [N, B, 1, C, 1] and [N, B, 1, 1], or with 1 for B and C.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    read: jax.Array
    write: jax.Array
    log_decay: jax.Array
    same: jax.Array
    reads: jax.Array
    writes: jax.Array
    keeps: jax.Array


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    batch, length, heads, key_dim = problem.q.shape
    size = chunk_size(length, chunk)
    count, each = pieces(batch, length, heads, key_dim, chunk)
    chunks = _chunks(problem, size, count * each)

    def piece(state: jax.Array, chunks: _Chunks) -> tuple[jax.Array, jax.Array]:
        return jax.lax.scan(_advance, state, jax.checkpoint(_prepare)(chunks))

    if count == 1:
        state, o = piece(problem.state, chunks)
    else:
        cut = jax.tree.map(lambda x: x.reshape(count, each, *x.shape[1:]), chunks)
        state, o = jax.lax.scan(jax.checkpoint(piece), problem.state, cut)
        o = o.reshape(-1, *o.shape[2:])
    o = jnp.moveaxis(o, (0, 3), (1, 2))  # [B, N, C, H, V]
    o = o.reshape(batch, -1, *o.shape[3:])[:, :length]
    return checkpoint_name(o, 'dplr_out'), state


def _advance(state: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    """The state after a chunk, and the chunk's outputs; `at` is of `_prepare`."""
    found, weights, scores, o, queries, keys, values, keep = at
    s = found + weights @ state
    o = o + scores @ s + queries @ state
    return keep[..., None] * state + values + jnp.swapaxes(keys, -1, -2) @ s, o


def _prepare(chunks: _Chunks) -> tuple[jax.Array, ...]:
    """All that does not need the state; the last one is the share of it that a chunk keeps."""
    q, k, v, read, write = chunks[:5]
    total = running(chunks.log_decay, axis=3)
    seen, last = before(total, axis=3), total.map(lambda x: x[..., -1:, :])

    columns = jnp.stack([k, write])
    by_key, by_write = _pairs(read, columns, seen, total, strict=True) * chunks.same
    q_key, q_write = _pairs(q, columns, total, total, strict=False) * chunks.same

    right = [by_key @ v, read * seen.exp() * chunks.reads]
    solved = jnp.concatenate(right, axis=-1)
    if q.shape[3] > 1:  # a single token, as in decoding, has nothing to solve
        solved = jax.lax.linalg.triangular_solve(
            -by_write, solved, left_side=True, lower=True, unit_diagonal=True
        )
    found, weights = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    to_end = jnp.exp(last.over(total)) * chunks.writes
    values = jnp.swapaxes(k * to_end, -1, -2) @ v
    queries = q * total.exp() * chunks.reads
    keep = last.exp()[..., 0, :] * chunks.keeps
    return found, weights, q_write, q_key @ v, queries, write * to_end, values, keep


def _pairs(
    rows: jax.Array, columns: jax.Array, seen: Sum, total: Sum, *, strict: bool
) -> jax.Array:
    """`sum_k rows_ik e^(seen_i - total_j)_k columns_jk`, [2, N, B, H, C, C].

    Columns are [2, N, B, H, C, K]; what stands above the diagonal, and with `strict` on it, is 0.
    """
    size = rows.shape[-2]
    leaf = leaf_size(size)

    def cut(x, length):  # [..., C, K] -> [..., P, length, K]
        return x.reshape(*x.shape[:-2], -1, length, x.shape[-1])

    seen_leaf = seen.map(lambda x: cut(x, leaf)[..., :, None, :])
    total_leaf = total.map(lambda x: cut(x, leaf)[..., None, :, :])
    mask = jnp.tril(jnp.ones((leaf, leaf), bool), -1 if strict else 0)[..., None]
    decay = masked_decay(seen_leaf, total_leaf, mask)
    pairs = cut(rows, leaf)[..., :, None, :] * cut(columns, leaf)[..., None, :, :] * decay
    blocks, half = jnp.sum(pairs, axis=-1), leaf
    while half < size:
        border = total.map(lambda x: cut(x, half)[..., ::2, -1:, :])  # noqa: B023
        down = jnp.exp(seen.map(lambda x: cut(x, half)[..., 1::2, :, :]).over(border))  # noqa: B023
        up = jnp.exp(border.over(total.map(lambda x: cut(x, half)[..., ::2, :, :])))  # noqa: B023
        right, left = cut(rows, half)[..., 1::2, :, :], cut(columns, half)[..., ::2, :, :]
        across = jnp.einsum('...ik,...jk->...ij', right * down, left * up)
        top = jnp.concatenate([blocks[..., ::2, :, :], jnp.zeros_like(across)], axis=-1)
        low = jnp.concatenate([across, blocks[..., 1::2, :, :]], axis=-1)
        blocks, half = jnp.concatenate([top, low], axis=-2), 2 * half
    return blocks[..., 0, :, :]


def _chunks(problem: Problem, size: int, count: int) -> _Chunks:
    """Cuts a problem into `count` chunks of `size` tokens; those added neither decay nor write."""
    more = count * size - problem.q.shape[1]

    def split(x: jax.Array) -> jax.Array:  # [B, T, H, K] -> [N, B, H, C, K]
        x = jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, 0)])
        x = x.reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    p = problem
    q, k, v = (split(x) for x in (p.q, p.k, p.v))
    read, write, log_decay = (split(x) for x in (p.read, p.write, p.log_decay))
    arrays = functools.partial(_Chunks, q, k, v, read, write, log_decay)
    if p.documents is None:
        every = jnp.ones((count, 1, 1, 1, 1), bool)
        return arrays(every, every, every, every[..., 0])
    documents = jnp.pad(p.documents, ((0, 0), (0, more)), mode='edge')
    documents = jnp.moveaxis(documents.reshape(-1, count, size), 1, 0)[:, :, None]
    last = documents[..., -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    same = documents[..., :, None] == documents[..., None, :]
    reads, writes = documents == entry, documents == last
    return arrays(same, reads[..., None], writes[..., None], last == entry)
