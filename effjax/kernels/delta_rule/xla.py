"""The delta rule in chunks, as matrix products and one triangular solve (arXiv 2406.06484).

Within a chunk let G be the running sum of log-decays, S the state before it and
    u_t = beta_t (v_t - a_t S_{t-1}^T k_t),    so that    S_t = a_t S_{t-1} + k_t u_t^T.
Unrolled, the rows of U solve a unit lower triangular system,
    (I + L) U = beta V - (beta e^G K) S,    L_ij = beta_i e^(G_i - G_j) k_i . k_j  for j < i,
which is solved for both right-hand sides before S is known (the UT transform; with decays, Gated
DeltaNet, arXiv 2412.06464). Decays enter as e^(G_i - G_j) with j <= i only, never above 1. Tokens
of different documents do not meet in L, and a document that begins in a chunk reads no S.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import masked_decay, running
from effjax.kernels.delta_rule.cost import chunk_size
from effjax.kernels.delta_rule.problem import Problem


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    length = problem.q.shape[1]
    size = chunk_size(length, chunk)
    q, k, v, beta = (_split(x, size) for x in (problem.q, problem.k, problem.v, problem.beta))
    lower, reads, writes, kept = _masks(problem, size)
    to_start, between, to_end, whole = _decays(problem, size, lower)

    with_key = jnp.einsum('nbhik,nbhjk->nbhij', k, k) * between
    system = jnp.tril(beta[..., None] * with_key, -1)
    scores = jnp.einsum('nbhik,nbhjk->nbhij', q, k) * between
    right = jnp.concatenate([v, k * (to_start * reads)[..., None]], axis=-1) * beta[..., None]
    solved = right
    if size > 1:  # a single token, as in decoding, has nothing to solve
        solved = jax.lax.linalg.triangular_solve(
            system, right, left_side=True, lower=True, unit_diagonal=True
        )
    values, weights = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    queries = q * (to_start * reads)[..., None]
    keys = k * (to_end * writes)[..., None]

    def one(state, at):
        values, weights, scores, queries, keys, keep = at
        new = values - weights @ state
        o = scores @ new + queries @ state
        state = keep[..., None, None] * state + jnp.einsum('bhck,bhcv->bhkv', keys, new)
        return state, o

    keep = jnp.broadcast_to(whole * kept, k.shape[:3])
    chunks = (values, weights, scores, queries, keys, keep)
    state, o = jax.lax.scan(one, problem.state, chunks)
    o = jnp.moveaxis(o, (0, 3), (1, 2))  # [B, N, C, H, V]
    o = o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
    return checkpoint_name(o, 'delta_rule_out'), state


def _split(x: jax.Array, size: int) -> jax.Array:
    """[B, T, H, ...] -> [N, B, H, C, ...], zeros at the end, which neither decay nor write."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], n, size, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))


def _masks(problem: Problem, size: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which token may see which, read the state, write it, and whether a chunk keeps any of it.

    Shapes [N, B, 1, C, C], [N, B, 1, C], [N, B, 1, C] and [N, B, 1], or such that broadcast.
    """
    causal = jnp.tril(jnp.ones((size, size), bool))
    if problem.documents is None:
        every = jnp.ones((), bool)
        return causal, every, every, every
    batch, length = problem.documents.shape
    n = -(-length // size)
    documents = jnp.pad(problem.documents, ((0, 0), (0, n * size - length)), mode='edge')
    documents = jnp.moveaxis(documents.reshape(batch, n, size), 1, 0)[:, :, None]
    last = documents[..., -1]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    same = documents[..., :, None] == documents[..., None, :]
    reads = documents == before[..., None]
    return causal & same, reads, documents == last[..., None], last == before


def _decays(
    problem: Problem, size: int, lower: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decay from a chunk's start to a token, between two tokens, from one to the end, and in all.

    Shapes [N, B, H, C], [N, B, H, C, C] (0 where `lower` is False), [N, B, H, C] and [N, B, H],
    or such that broadcast.
    """
    if problem.log_decay is None:
        one = jnp.ones((), problem.q.dtype)
        return one, lower.astype(problem.q.dtype), one, one
    total = running(_split(problem.log_decay, size), axis=-1)
    rows, columns = total.map(lambda x: x[..., :, None]), total.map(lambda x: x[..., None, :])
    end = total.map(lambda x: x[..., -1:])
    between = masked_decay(rows, columns, lower)
    return total.exp(), between, jnp.exp(end.over(total)), end.exp()[..., 0]
