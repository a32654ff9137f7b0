"""Attention in plain XLA: runs anywhere, differentiable, keys and values never repeated.

Four forms, by `cost.strategy`:
  dense: the whole score matrix, for short sequences and single queries;
  band: with a sliding window, each block of queries against its own and the previous block of
    keys, so that T x T is never formed;
  gather: with a sparse mask, each block of queries against the blocks of keys that its plan names
    (`mask.plan`), and the few queries that see all against all; in rows of several documents the
    plan holds what any of them may need (`MaskSpec.packed`), the mask cuts it down to what each
    allows, and each query gathers its document's global tokens for itself;
  blocks: long sequences as a scan over the (query, key) block pairs that the mask allows, with a
    running softmax; the backward pass recomputes the probabilities from the log-sum-exp
    (Rabe and Staats, arXiv 2112.05682; Dao et al., arXiv 2205.14135).

Scores, softmax and sums are float32 (float64 for float64 inputs), products in the inputs' dtype.
Dimensions: G key-value heads, R query heads that share one, C tokens of a block, N blocks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels.attention import cost
from effjax.kernels.attention.mask import plan as mask_plan
from effjax.kernels.attention.problem import Extras, Problem, allowed, often


def refuse(problem: Problem) -> str | None:
    """Refuses only dropout of attention weights over a sequence too long for a score matrix."""
    if problem.dropout and form(problem) == 'blocks':
        return f'dropout of attention weights needs at most {cost.DENSE_MAX} tokens'
    return None


def form(problem: Problem) -> str:
    """Returns 'dense', 'band', 'gather' or 'blocks'."""
    _, q_len, kv_len, *_ = problem.shape
    return cost.strategy(
        q_len,
        kv_len,
        mask=problem.mask,
        window=problem.window,
        positions=problem.positions,
        spec=problem.spec,
        packed=problem.packed,
    )


def attend(
    problem: Problem, extras: Extras, q_BTHD: jax.Array, k_BSGD: jax.Array, v_BSGD: jax.Array
) -> jax.Array:
    """Returns attention's output [B, T, H, D] in the dtype of q."""
    batch, q_len, _, heads, kv_heads, head_dim = problem.shape
    q_BTGRD = q_BTHD.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    forms: dict[str, Any] = {
        'dense': _dense, 'band': _band, 'gather': _gather, 'blocks': _blocks,
    }  # fmt: skip
    run = forms[form(problem)]
    o_BTHD = run(problem, extras, q_BTGRD, k_BSGD, v_BSGD).reshape(q_BTHD.shape)
    if extras.q_segments is not None:
        o_BTHD = jnp.where((extras.q_segments != 0)[:, :, None, None], o_BTHD, 0)
    return checkpoint_name(o_BTHD, 'attention_out')


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _masked(wide: jnp.dtype) -> float:
    # Finite: -inf in a row without any key would make its gradients NaN.
    return -0.7 * float(jnp.finfo(wide).max)


def _scores(problem: Problem, q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled and capped scores [..., G, R, T, S] of q [..., T, G, R, D] and k [..., S, G, D]."""
    s = jnp.einsum('...tgrd,...sgd->...grts', q, k, preferred_element_type=_wide(q))
    s = s * problem.scale
    if problem.soft_cap is not None:
        s = problem.soft_cap * jnp.tanh(s / problem.soft_cap)
    return s


def _attend_scored(
    problem: Problem,
    rng: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention of q [..., T, G, R, D] with a mask that broadcasts to [..., 1, 1, T, S]."""
    return _with_lse(problem, rng, q, k, v, mask, bias)[0]


def _with_lse(
    problem: Problem,
    rng: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same, and the log of the softmax's denominator [..., T, G, R]."""
    s = _scores(problem, q, k)
    if bias is not None:
        s = s + bias.astype(s.dtype)
    if mask is not None:
        s = jnp.where(mask, s, _masked(s.dtype))
    p = jax.nn.softmax(s, axis=-1)
    if problem.dropout:
        assert rng is not None
        keep = jax.random.bernoulli(rng, 1 - problem.dropout, p.shape)
        p = jnp.where(keep, p / (1 - problem.dropout), 0)
    o = jnp.einsum('...grts,...sgd->...tgrd', p.astype(v.dtype), v)
    if problem.may_be_empty and mask is not None:
        some_key = jnp.moveaxis(mask.any(-1), -1, -3)[..., None]  # [..., T, 1, 1, 1]
        o = jnp.where(some_key, o, 0)
    lse = jnp.moveaxis(jax.nn.logsumexp(s, axis=-1), -1, -3)
    return o, lse


def _dense(problem: Problem, extras: Extras, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    places = (jnp.arange(q.shape[1]), jnp.arange(k.shape[1]))
    mask, bias = (f(problem, extras, *places) for f in (allowed, often))
    mask, bias = (a if a is None else a[..., None, None, :, :] for a in (mask, bias))
    return _attend_scored(problem, extras.rng, q, k, v, mask, bias)


def _band(problem: Problem, extras: Extras, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    assert problem.window is not None
    length, size = q.shape[1], cost.band_block(problem.window)
    n = -(-length // size)

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, N, C, ...]
        x = jnp.pad(x, [(0, 0), (0, n * size - length)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], n, size, *x.shape[2:])

    def with_previous(x: jax.Array) -> jax.Array:  # [B, N, C, ...] -> [B, N, 2C, ...]
        previous = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([previous, x], axis=2)

    q_index = jnp.arange(n * size).reshape(n, size)
    kv_index = q_index[:, :1] + jnp.arange(-size, size)
    blocks = Extras()
    if problem.segments:
        assert extras.q_segments is not None and extras.kv_segments is not None
        blocks = Extras(split(extras.q_segments), with_previous(split(extras.kv_segments)))
    mask = allowed(problem, blocks, q_index, kv_index)
    assert mask is not None
    mask &= (kv_index >= 0)[:, None, :]  # the block before the first holds nothing
    o = _attend_scored(
        problem,
        extras.rng,
        split(q),
        with_previous(split(k)),
        with_previous(split(v)),
        mask[..., None, None, :, :],
    )
    return o.reshape(o.shape[0], n * size, *o.shape[3:])[:, :length]


def _gather(
    problem: Problem, extras: Extras, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    # Rematerialised, so that keys and values gathered many times are not kept so.
    run = jax.checkpoint(_gathered, static_argnums=0)
    assert problem.spec is not None
    if not problem.spec.branches:
        return run(problem, extras, q, k, v)[0]
    parts = []
    for n, branch in enumerate(problem.spec.branches):
        rng = None if extras.rng is None else jax.random.fold_in(extras.rng, n)
        one = dataclasses.replace(problem, spec=branch)
        parts.append(run(one, dataclasses.replace(extras, rng=rng), q, k, v))
    return _joined(parts)[0].astype(q.dtype)


def _joined(parts: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """One softmax of several over other keys: each weighs as much as its denominator."""
    lse = jnp.stack([lse for _, lse in parts])
    weights = jax.nn.softmax(lse, axis=0)
    outputs = [w[..., None] * o for w, (o, _) in zip(weights, parts, strict=True)]
    return sum(outputs[1:], outputs[0]), jax.nn.logsumexp(lse, axis=0)


def _gathered(
    problem: Problem, extras: Extras, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, G, R, D], and the log of the softmax's denominator [B, T, G, R]."""
    assert problem.spec is not None
    by_row = problem.spec.packed() if problem.positions else problem.spec
    assert by_row is not None
    made, length = mask_plan(by_row, q.shape[1]), q.shape[1]
    n, size = len(made.table), len(made.order) // len(made.table)
    blocks = np.where(made.table >= 0, made.table, 0)
    q_index = made.order.reshape(n, size)
    kv_index = np.where((made.table >= 0)[..., None], q_index[blocks], -1).reshape(n, -1)
    kv_index = np.where(np.isin(kv_index, made.shared), -1, kv_index)
    shared = np.broadcast_to(made.shared, (n, len(made.shared)))
    kv_index = np.concatenate([kv_index, shared], axis=1)

    def queries(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, N, C, ...]
        return jnp.take(x, np.maximum(q_index, 0), axis=1)

    def keys(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [B, N, M C + G, ...]
        near = jnp.take(queries(x), blocks, axis=1)
        near = near.reshape(x.shape[0], n, -1, *x.shape[2:])
        some = jnp.take(x, shared, axis=1)
        return jnp.concatenate([near, some], axis=2)

    blocked = Extras()
    if problem.segments:
        assert extras.q_segments is not None and extras.kv_segments is not None
        blocked = Extras(queries(extras.q_segments), keys(extras.kv_segments))
    if problem.positions:
        assert extras.q_positions is not None and extras.kv_positions is not None
        places = queries(extras.q_positions), keys(extras.kv_positions)
        blocked = dataclasses.replace(blocked, q_positions=places[0], kv_positions=places[1])
    mask = allowed(problem, blocked, jnp.asarray(q_index), jnp.asarray(kv_index))
    assert mask is not None
    mask &= (kv_index >= 0)[:, None, :]
    if problem.positions:  # global tokens are read apart
        mask &= (places[1] >= problem.spec.global_tokens)[..., None, :]
    parts = (queries(q), keys(k), keys(v), mask[..., None, None, :, :])
    found = np.flatnonzero(made.order >= 0)
    back = np.full(length, n * size)  # one past the end, for tokens that the plan leaves out
    back[made.order[found]] = found

    def to_tokens(x: jax.Array, fill: float) -> jax.Array:  # [B, N, C, ...] -> [B, T, ...]
        x = x.reshape(x.shape[0], n * size, *x.shape[3:])
        return jnp.take(x, back, axis=1, mode='fill', fill_value=fill)

    o, lse = _with_lse(problem, extras.rng, *parts)
    o, lse = to_tokens(o, 0.0), to_tokens(lse, _masked(lse.dtype))
    if problem.positions and problem.spec.global_tokens:
        return _joined([(o, lse), _first_tokens(problem, extras, q, k, v)])
    if not len(made.rows):
        return o, lse
    rng = None if extras.rng is None else jax.random.fold_in(extras.rng, 1)
    # Documents never come here: with them, who sees all depends on where they begin.
    own, own_lse = _with_lse(problem, rng, q[:, made.rows], k, v, None)
    return o.at[:, made.rows].set(own), lse.at[:, made.rows].set(own_lse)


def _first_tokens(
    problem: Problem, extras: Extras, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As `_gathered`: each query of a packed row against its own document's global tokens."""
    assert problem.spec is not None and extras.q_segments is not None
    ids, place = extras.q_segments, extras.q_positions
    assert place is not None
    number, row = jnp.arange(problem.spec.global_tokens), jnp.arange(q.shape[1])
    index = (row - place)[..., None] + number  # [B, T, global tokens]
    safe = jnp.clip(index, 0, q.shape[1] - 1)
    pick = jax.vmap(lambda x, at: x[at])
    mask = (index == safe) & (index <= row[:, None])  # a causal mask: the others see no globals
    mask &= (pick(ids, safe) == ids[..., None]) & (pick(place, safe) == number)
    rng = None if extras.rng is None else jax.random.fold_in(extras.rng, 2)
    scored = (q[:, :, None], pick(k, safe), pick(v, safe), mask[:, :, None, None, None])
    o, lse = _with_lse(problem, rng, *scored)
    return o[:, :, 0], lse[:, :, 0]


def _blocks(problem: Problem, extras: Extras, *qkv: jax.Array) -> jax.Array:
    return blockwise(problem, cost.BLOCK, *qkv, extras)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blockwise(
    problem: Problem, block: int, q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras
) -> jax.Array:
    """The 'blocks' form with blocks of `block` tokens; q is [B,T,G,R,D], k and v [B,S,G,D]."""
    return _blockwise_forward(problem, block, q, k, v, extras)[0]


def _blockwise_forward(problem, block, q, k, v, extras):
    q_N, k_N, v_N = (_to_blocks(x, block) for x in (q, k, v))
    wide = _wide(q)
    n, batch, size, kv_heads, groups, head_dim = q_N.shape
    start = (
        jnp.full((n, batch, kv_heads, groups, size), _masked(wide), wide),
        jnp.zeros((n, batch, kv_heads, groups, size), wide),
        jnp.zeros((n, batch, size, kv_heads, groups, head_dim), wide),
    )

    def step(carry, pair):
        i, j = pair
        top, total, acc = (_take(x, i) for x in carry)
        s = _block_scores(problem, extras, block, q, k, _take(q_N, i), _take(k_N, j), i, j)
        new_top = jnp.maximum(top, s.max(-1))
        p = jnp.exp(s - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        v_j = _take(v_N, j)
        o = jnp.einsum('bgrts,bsgd->btgrd', p.astype(v.dtype), v_j, preferred_element_type=wide)
        update = (new_top, total * shrink + p.sum(-1), acc * _to_rows(shrink) + o)
        return tuple(_put(x, new, i) for x, new in zip(carry, update, strict=True)), None

    (top, total, acc), _ = jax.lax.scan(step, start, _pairs(problem, block))
    empty = top <= 0.5 * _masked(wide)  # no key was ever seen: output 0, and exp(s - 0) below is 0
    lse = jnp.where(empty, 0, top + jnp.log(jnp.where(empty, 1, total)))
    scale = jnp.where(empty, 0, 1 / jnp.where(empty, 1, total))
    o_N = (acc * jax.vmap(_to_rows)(scale)).astype(q.dtype)
    return _from_blocks(o_N, q.shape[1]), lse


def _blockwise_fwd(problem, block, q, k, v, extras):
    o, lse = _blockwise_forward(problem, block, q, k, v, extras)
    o = checkpoint_name(o, 'attention_out')
    lse = checkpoint_name(lse, 'attention_lse')
    return o, (q, k, v, extras, o, lse)


def _blockwise_bwd(problem, block, residuals, do):
    q, k, v, extras, o, lse_N = residuals
    wide = _wide(q)
    delta = jnp.sum(do.astype(wide) * o.astype(wide), axis=-1)  # [B, T, G, R]
    q_N, k_N, v_N, do_N, delta_N = (_to_blocks(x, block) for x in (q, k, v, do, delta))

    def step(carry, pair):
        i, j = pair
        q_i, do_i, k_j, v_j = _take(q_N, i), _take(do_N, i), _take(k_N, j), _take(v_N, j)
        s = _block_scores(problem, extras, block, q, k, q_i, k_j, i, j)
        p = jnp.exp(s - _take(lse_N, i)[..., None])
        dv = jnp.einsum('bgrts,btgrd->bsgd', p.astype(v.dtype), do_i, preferred_element_type=wide)
        dp = jnp.einsum('btgrd,bsgd->bgrts', do_i, v_j, preferred_element_type=wide)
        ds = p * (dp - jnp.moveaxis(_take(delta_N, i), 1, -1)[..., None]) * problem.scale
        if problem.soft_cap is not None:
            # A masked score is far outside the cap; its p is 0, so its slope must only be finite.
            ds = ds * (1 - jnp.square(jnp.clip(s / problem.soft_cap, -1, 1)))
        ds = ds.astype(q.dtype)
        dq = jnp.einsum('bgrts,bsgd->btgrd', ds, k_j, preferred_element_type=wide)
        dk = jnp.einsum('bgrts,btgrd->bsgd', ds, q_i, preferred_element_type=wide)
        return tuple(
            _put(x, _take(x, at) + new, at)
            for x, new, at in zip(carry, (dq, dk, dv), (i, j, j), strict=True)
        ), None

    start = tuple(jnp.zeros(x.shape, wide) for x in (q_N, k_N, v_N))
    (dq, dk, dv), _ = jax.lax.scan(step, start, _pairs(problem, block))
    lengths = (q.shape[1], k.shape[1], k.shape[1])
    return (
        *(
            _from_blocks(x, length).astype(q.dtype)
            for x, length in zip((dq, dk, dv), lengths, strict=True)
        ),
        None,
    )


blockwise.defvjp(_blockwise_fwd, _blockwise_bwd)


def _pairs(problem: Problem, block: int) -> tuple[jax.Array, jax.Array]:
    _, q_len, kv_len, *_ = problem.shape
    mask, positions, spec = problem.mask, problem.positions, problem.spec
    if spec is not None and spec.causal and problem.packed:
        mask, positions = 'causal', False  # places grow along the row within a document
    found = cost.block_pairs(
        q_len, kv_len, block=block, mask=mask, window=problem.window, positions=positions
    )
    return jnp.array([i for i, _ in found]), jnp.array([j for _, j in found])


def _block_scores(problem, extras, block, q, k, q_i, k_j, i, j):
    """Masked scores [B, G, R, C, C] of query block i and key block j."""
    s = _scores(problem, q_i, k_j)
    rows, columns = i * block + jnp.arange(block), j * block + jnp.arange(block)

    def cut(x, at, fill):  # the block's part of ids or positions [B, T]
        return None if x is None else _take(_to_blocks(x, block, fill), at)

    part = Extras(
        q_segments=cut(extras.q_segments, i, 0),
        kv_segments=cut(extras.kv_segments, j, 0),
        q_positions=cut(extras.q_positions, i, 0),
        kv_positions=cut(extras.kv_positions, j, 0),
        lengths=cut(extras.lengths, i, 1),
    )
    if extras.mask is not None:
        pad = [(0, -(-n // block) * block - n) for n in extras.mask.shape]
        grid = jnp.pad(extras.mask, pad)
        part = Extras(
            **{name: getattr(part, name) for name in ('q_segments', 'kv_segments')},
            mask=jax.lax.dynamic_slice(grid, (i * block, j * block), (block, block)),
        )
    bias = often(problem, part, rows, columns)
    if bias is not None:
        s = s + bias[..., None, None, :, :].astype(s.dtype)
    mask = columns < k.shape[1]  # rows past the end are cut off afterwards
    inside = allowed(problem, part, rows, columns)
    if inside is not None:
        mask = mask & inside
    mask = jnp.broadcast_to(mask, (*mask.shape[:-2], block, block))
    return jnp.where(mask[..., None, None, :, :], s, _masked(s.dtype))


def _to_blocks(x: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] -> [N, B, C, ...], padded at the end."""
    n = -(-x.shape[1] // block)
    pad = [(0, 0), (0, n * block - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], n, block, *x.shape[2:]), 1, 0)


def _from_blocks(x: jax.Array, length: int) -> jax.Array:
    """[N, B, C, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _to_rows(x: jax.Array) -> jax.Array:
    """[B, G, R, C] -> [B, C, G, R, 1]."""
    return jnp.moveaxis(x, -1, 1)[..., None]


def _take(x: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(x: jax.Array, new: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
