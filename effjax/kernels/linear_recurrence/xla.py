"""Linear recurrences in chunks, as matrix products: T x T is never formed, nothing overflows.

With G the running sum of log-decays inside a chunk and S the state before it,
    o_i = sum_{j <= i} (q_i e^(G_i - G_j) k_j) v_j + (q_i e^G_i) S,
    S'  = e^G_end S + sum_j (e^(G_end - G_j) k_j) v_j^T.
What chunks write is formed at once, a short scan adds up the states, then all outputs are formed
at once. Differences G_i - G_j have j <= i only, so that no exponent is positive. A decay of its own
for each key dimension stands inside the product of query and key: a chunk is halved again and
again, the right half reading the left one through the decay to and from their border, until
blocks of `cost.LEAF` tokens, whose pairs are formed one by one (the secondary chunks of GLA, arXiv
2312.06635). A token sees its own product, or with a bonus only what lies before it.

For the backward pass the inputs and the chunks' states are kept, all else is formed again.
Dimensions: N chunks of C tokens, P pairs of halves, R heads that share a query head of G.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.decays import Sum, before, masked_decay, running
from effjax.kernels.linear_recurrence.cost import chunk_size, leaf_size
from effjax.kernels.linear_recurrence.problem import Problem


class _Chunks(NamedTuple):
    """The arrays of a problem in chunks, [B, N, C, ...]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    documents: jax.Array | None


def run(problem: Problem, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Returns (o [B, T, H, V], the state after the last document's last token)."""
    if problem.vector or problem.bonus is not None:
        problem = problem.with_heads()
    length = problem.q.shape[1]
    size = chunk_size(length, chunk, vector=problem.vector)
    documents = problem.documents
    chunks = _Chunks(
        _split(problem.q, size),
        _split(problem.k, size),
        _split(problem.v, size),
        None if problem.log_decay is None else _split(problem.log_decay, size),
        None if documents is None else _split(documents, size, 'edge'),
    )
    strict = problem.bonus is not None

    written, kept = jax.checkpoint(_write)(chunks)
    states, last = _carry(written, kept, problem.state)
    states = checkpoint_name(states, 'linear_recurrence_states')
    o = jax.checkpoint(_read, static_argnums=(2,))(chunks, states, strict)
    o = o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
    if problem.bonus is not None:
        q, k = (x.astype(o.dtype) for x in (problem.q, problem.k))
        o = o + jnp.sum(q * problem.bonus * k, axis=-1, keepdims=True) * problem.v
    return checkpoint_name(o.astype(problem.q.dtype), 'linear_recurrence_out'), last


def _split(x: jax.Array, size: int, mode: str = 'constant') -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...]; zeros at the end neither decay nor write."""
    n = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2), mode=mode)
    return x.reshape(x.shape[0], n, size, *x.shape[2:])


def _carry(written: jax.Array, kept: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states before each chunk, [B, N, H, K, V], and the one after the last."""

    def one(state, at):
        written, kept = at
        return state * kept + written, state

    # Several chunks a pass of the loop: each pass is a kernel's start on a GPU.
    by_chunk = (jnp.moveaxis(written, 1, 0), jnp.moveaxis(kept, 1, 0))
    last, states = jax.lax.scan(one, state, by_chunk, unroll=8)
    return jnp.moveaxis(states, 0, 1), last


def _write(chunks: _Chunks) -> tuple[jax.Array, jax.Array]:
    """What each chunk adds to the state, [B, N, H, K, V], and the share of it that it keeps."""
    k, v, wide = chunks.k, chunks.v, _wide(chunks.v)
    writes, keeps = None, jnp.ones((1, k.shape[1], 1, 1, 1), wide)
    if chunks.documents is not None:
        end = chunks.documents[:, :, -1]
        writes = chunks.documents == end[..., None]
        keeps = (end == _before(chunks.documents)).astype(wide)[..., None, None, None]
    if chunks.log_decay is not None:
        total = running(chunks.log_decay, axis=2)
        last = total.map(lambda x: x[:, :, -1:])
        left = jnp.exp(last.over(total))
        keep = last.exp()[:, :, 0]
        if chunks.log_decay.ndim == 5:
            k = (k * left).astype(k.dtype)
            keeps = keeps * keep[..., None]
        else:
            v = (v * left[..., None]).astype(v.dtype)
            keeps = keeps * keep[..., None, None]
    if writes is not None:
        v = jnp.where(_spread(writes, v), v, 0)
    grouped = _grouped(v, k.shape[3])
    written = jnp.einsum('bncgk,bncgrv->bngrkv', k, grouped, preferred_element_type=wide)
    return written.reshape(*written.shape[:2], -1, *written.shape[4:]), keeps


def _read(chunks: _Chunks, states: jax.Array, strict: bool) -> jax.Array:
    """The outputs [B, N, C, H, V] in float32; `strict`: of what lies before each token only."""
    q, wide, total, decay = chunks.q, _wide(chunks.v), None, None
    if chunks.log_decay is not None:
        total = running(chunks.log_decay, axis=2)
        seen = before(total, axis=2) if strict else total
        decay = seen.exp()
        if _is_vector(chunks):
            q = (q * decay).astype(q.dtype)
    by_group = states.reshape(*states.shape[:2], q.shape[3], -1, *states.shape[3:])
    o = jnp.einsum('bncgk,bngrkv->bncgrv', q, by_group.astype(q.dtype), preferred_element_type=wide)
    o = o.reshape(*o.shape[:3], -1, o.shape[-1])
    if decay is not None and not _is_vector(chunks):
        o = o * decay[..., None]
    if chunks.documents is not None:
        reads = chunks.documents == _before(chunks.documents)[..., None]
        o = jnp.where(_spread(reads, o), o, 0)
    if _is_vector(chunks):
        assert total is not None
        return o + _vector_pairs(chunks, total, strict)
    return o + _scalar_pairs(chunks, total, strict)


def _scalar_pairs(chunks: _Chunks, total: Sum | None, strict: bool) -> jax.Array:
    """What the tokens of a chunk read of each other, with a decay a head or none."""
    q, k, v, wide = chunks.q, chunks.k, chunks.v, _wide(chunks.v)
    mask = _visible(q.shape[2], chunks.documents, strict)[:, :, None, None]  # [B, N, 1, 1, C, C]
    scores = jnp.einsum('bncgk,bnsgk->bngcs', q, k, preferred_element_type=wide)[:, :, :, None]
    if total is None:
        scores = jnp.where(mask, scores, 0)
    else:
        seen = before(total, axis=2) if strict else total

        def heads(x):  # [B, N, C, H] -> [B, N, G, R, C]
            x = x.reshape(*x.shape[:3], q.shape[3], -1)
            return jnp.moveaxis(x, 2, -1)

        rows = seen.map(lambda x: heads(x)[..., :, None])
        columns = total.map(lambda x: heads(x)[..., None, :])
        scores = scores * masked_decay(rows, columns, mask)
    scores = jnp.broadcast_to(
        scores, (*scores.shape[:3], v.shape[3] // q.shape[3], *mask.shape[4:])
    )
    o = jnp.einsum(
        'bngrcs,bnsgrv->bncgrv',
        scores.astype(v.dtype),
        _grouped(v, q.shape[3]),
        preferred_element_type=wide,
    )
    return o.reshape(*o.shape[:3], -1, o.shape[-1])


def _vector_pairs(chunks: _Chunks, total: Sum, strict: bool) -> jax.Array:
    """The same with a decay for each key dimension: halves by products, leaves pair by pair."""
    size = chunks.q.shape[2]
    leaf, half = leaf_size(size), size // 2
    seen = before(total, axis=2) if strict else total
    o = _leaves(chunks, total, seen, leaf, strict)
    while half >= leaf:
        o = o + _halves(chunks, total, seen, half)
        half //= 2
    return o


def _halves(chunks: _Chunks, total: Sum, seen: Sum, half: int) -> jax.Array:
    """What right halves read of left ones, the halves having `half` tokens each."""

    def cut(x):  # [B, N, C, ...] -> [B, N, P, 2, half, ...]
        return x.reshape(*x.shape[:2], -1, 2, half, *x.shape[3:])

    def side(x, i):
        return cut(x)[:, :, :, i]

    wide = _wide(chunks.v)
    border = total.map(lambda x: side(x, 0)[:, :, :, -1:])
    down = jnp.exp(seen.map(lambda x: side(x, 1)).over(border))
    up = jnp.exp(border.over(total.map(lambda x: side(x, 0))))
    q = (side(chunks.q, 1) * down).astype(chunks.q.dtype)
    k = (side(chunks.k, 0) * up).astype(chunks.k.dtype)
    scores = jnp.einsum('bnpchk,bnpshk->bnphcs', q, k, preferred_element_type=wide)
    if chunks.documents is not None:
        right, left = side(chunks.documents, 1), side(chunks.documents, 0)
        same = right[..., :, None] == left[..., None, :]
        scores = jnp.where(same[:, :, :, None], scores, 0)
    o = jnp.einsum(
        'bnphcs,bnpshv->bnpchv',
        scores.astype(chunks.v.dtype),
        side(chunks.v, 0),
        preferred_element_type=wide,
    )
    o = jnp.stack([jnp.zeros_like(o), o], axis=3)
    return o.reshape(*o.shape[:2], -1, *o.shape[5:])


def _leaves(chunks: _Chunks, total: Sum, seen: Sum, leaf: int, strict: bool) -> jax.Array:
    """What the tokens of a leaf read of each other, from exact differences of decays."""

    def cut(x):  # [B, N, C, ...] -> [B, N * C / leaf, leaf, ...]
        return x.reshape(x.shape[0], -1, leaf, *x.shape[3:])

    wide = _wide(chunks.v)
    documents = None if chunks.documents is None else cut(chunks.documents)
    mask = _visible(leaf, documents, strict)[..., None, None]  # [B, M, c, s, 1, 1]
    rows, columns = (
        seen.map(lambda x: cut(x)[:, :, :, None]),
        total.map(lambda x: cut(x)[:, :, None]),
    )
    decay = masked_decay(rows, columns, mask)
    q, k = cut(chunks.q).astype(wide), cut(chunks.k).astype(wide)
    scores = jnp.sum(q[:, :, :, None] * k[:, :, None] * decay, axis=-1)
    o = jnp.einsum(
        'bmcsh,bmshv->bmchv',
        scores.astype(chunks.v.dtype),
        cut(chunks.v),
        preferred_element_type=wide,
    )
    return o.reshape(chunks.v.shape)


def _visible(size: int, documents: jax.Array | None, strict: bool) -> jax.Array:
    """Which token of a block sees which, bool [B, N, C, C], or with 1 for B and N."""
    mask = jnp.tril(jnp.ones((size, size), bool), -1 if strict else 0)[None, None]
    if documents is None:
        return mask
    return mask & (documents[..., :, None] == documents[..., None, :])


def _before(documents: jax.Array) -> jax.Array:
    """The document of the state before each chunk, [B, N]; the initial state has number 0."""
    return jnp.pad(documents[:, :-1, -1], ((0, 0), (1, 0)))


def _grouped(v: jax.Array, groups: int) -> jax.Array:
    """[B, N, C, H, V] -> [B, N, C, G, R, V]."""
    return v.reshape(*v.shape[:3], groups, -1, v.shape[-1])


def _spread(mask_BNC: jax.Array, like: jax.Array) -> jax.Array:
    """A mask [B, N, C] with dimensions of 1 behind it, to go with `like` [B, N, C, ...]."""
    return mask_BNC.reshape(*mask_BNC.shape, *[1] * (like.ndim - 3))


def _is_vector(chunks: _Chunks) -> bool:
    return chunks.log_decay is not None and chunks.log_decay.ndim == 5


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
