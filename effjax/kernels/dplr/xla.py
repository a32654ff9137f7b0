"""Diagonal plus low-rank recurrences in chunks: products and one triangular solve.

Within a chunk let G_t be the running sum of log-decays, S the state before it, and s_t what the
transition reads, read_t S_{t-1}. Unrolled, with sums over j < t,
    S_{t-1} = e^(G_{t-1}) S + sum_j e^(G_{t-1} - G_j) (k_j v_j^T + write_j s_j^T),
so that the rows s_t solve a unit lower triangular system, for what the values and what S give,
before S is known; all else is products. Decays enter as e^(G_i - G_j) with j <= i only, never above
1: a chunk is halved again and again, the right half meeting the left one at their border, down to
blocks of `cost.LEAF` tokens, whose pairs are formed one by one.

Arrays are [N, B, H, C, ...]: N chunks of C tokens.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, before, masked_decay, running
from effjax.kernels.dplr.cost import chunk_size, leaf_size
from effjax.kernels.dplr.problem import Problem


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    length = problem.q.shape[1]
    size = chunk_size(length, chunk)
    chunks, kept = jax.checkpoint(_prepare, static_argnums=(1,))(problem, size)

    def one(state, at):
        (found, weights, scores, o, queries, keys, values), keep = at
        s = found + weights @ state
        o = o + scores @ s + queries @ state
        return keep[..., None] * state + values + jnp.swapaxes(keys, -1, -2) @ s, o

    state, o = jax.lax.scan(one, problem.state, (chunks, kept))
    o = jnp.moveaxis(o, (0, 3), (1, 2))  # [B, N, C, H, V]
    o = o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
    return checkpoint_name(o, 'dplr_out'), state


def _prepare(problem: Problem, size: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """All that does not need the state: what `run` scans over, and the share that chunks keep."""
    p = problem
    q, k, v, read, write = (_split(x, size) for x in (p.q, p.k, p.v, p.read, p.write))
    same, reads, writes, keeps = _masks(problem, size)
    total = running(_split(p.log_decay, size), axis=3)
    seen, last = before(total, axis=3), total.map(lambda x: x[..., -1:, :])

    columns = jnp.stack([k, write])
    by_key, by_write = _pairs(read, columns, seen, total, strict=True) * same
    q_key, q_write = _pairs(q, columns, total, total, strict=False) * same

    right = [by_key @ v, read * seen.exp() * reads]
    solved = jnp.concatenate(right, axis=-1)
    if size > 1:  # a single token, as in decoding, has nothing to solve
        solved = jax.lax.linalg.triangular_solve(
            -by_write, solved, left_side=True, lower=True, unit_diagonal=True
        )
    found, weights = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    to_end = jnp.exp(last.over(total)) * writes
    values = jnp.swapaxes(k * to_end, -1, -2) @ v
    queries = q * total.exp() * reads
    chunks = (found, weights, q_write, q_key @ v, queries, write * to_end, values)
    return chunks, last.exp()[..., 0, :] * keeps


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


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, K] -> [N, B, H, C, K], zeros at the end, which neither decay nor write."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, n * size - x.shape[1]), (0, 0), (0, 0)])
    x = x.reshape(x.shape[0], n, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _masks(problem: Problem, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which tokens share a document, read the state, write it, and whether a chunk keeps any.

    Shapes [N, B, 1, C, C], [N, B, 1, C, 1], [N, B, 1, C, 1] and [N, B, 1, 1], or such that
    broadcast.
    """
    if problem.documents is None:
        every = jnp.ones((1, 1), bool)
        return every, every, every, every
    batch, length = problem.documents.shape
    n = -(-length // size)
    documents = jnp.pad(problem.documents, ((0, 0), (0, n * size - length)), mode='edge')
    documents = jnp.moveaxis(documents.reshape(batch, n, size), 1, 0)[:, :, None]
    last = documents[..., -1:]
    entry = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    same = documents[..., :, None] == documents[..., None, :]
    reads, writes = documents == entry, documents == last
    return same, reads[..., None], writes[..., None], last == entry
