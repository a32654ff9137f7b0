"""Cross-entropy over chunks of rows, gradients computed beside the loss.

The loss is a sum, so its gradient is known up to one scalar before the backward pass begins:
each chunk computes its logits, its loss, dx and its part of dw at once and forgets the logits
(as Liger, arXiv 2410.10989, does). Nothing is computed twice; at most one chunk of logits and
their gradient is alive, in the compute dtype. `chunks=1` is the same with all rows at once.

Chunk c holds rows c, c + chunks, c + 2 chunks, ...: where rows are sharded over devices each chunk
still lies evenly on all of them, and XLA can partition every product without moving rows.
"""

import functools

import jax
import jax.numpy as jnp

Sums = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def loss(
    soft_cap: float | None,
    z_loss: float,
    chunks: int,
    x_ND: jax.Array,
    w_DV: jax.Array,
    bias_V: jax.Array | None,
    targets_N: jax.Array,
    weights_N: jax.Array,
) -> tuple[jax.Array, Sums]:
    """Returns (loss_sum, (nll_sum, z_sum, correct_sum)); gradients flow through `loss_sum` only."""
    w = w_DV.astype(x_ND.dtype)

    def one(_, rows):
        x, targets, _ = rows
        logits = _logits(x, w, bias_V, soft_cap)
        nll, lse, right = _statistics(logits, targets)
        return None, (nll, lse, right)

    rows = _split((x_ND, targets_N, weights_N), chunks)
    _, (nll, lse, right) = _loop(one, None, rows, chunks)
    sums, _ = _sums(nll, lse, right, rows[2], z_loss)
    return sums


def _forward(soft_cap, z_loss, chunks, x_ND, w_DV, bias_V, targets_N, weights_N):
    w = w_DV.astype(x_ND.dtype)
    wide = jnp.promote_types(x_ND.dtype, jnp.float32)

    def one(carry, rows):
        dw, db = carry
        x, targets, weights = rows
        logits = _logits(x, w, bias_V, soft_cap)
        nll, lse, right = _statistics(logits, targets)
        dlogits = _logits_gradient(logits, targets, weights, lse, soft_cap, z_loss)
        dx = jnp.einsum('nv,dv->nd', dlogits, w)
        part = jnp.einsum('nd,nv->dv', x, dlogits, preferred_element_type=wide)
        dw = part if dw is None else dw + part
        if bias_V is not None:
            db = db + dlogits.sum(0, dtype=wide)
        return (dw, db), (nll, lse, right, dx)

    rows = _split((x_ND, targets_N, weights_N), chunks)
    db = None if bias_V is None else jnp.zeros(bias_V.shape, wide)
    start = (None if chunks == 1 else jnp.zeros(w.shape, wide), db)
    (dw, db), (nll, lse, right, dx) = _loop(one, start, rows, chunks)
    sums, row_loss = _sums(nll, lse, right, rows[2], z_loss)
    length = x_ND.shape[0]
    residuals = (
        _join(dx, length, chunks),
        dw.astype(w_DV.dtype),
        None if bias_V is None else db.astype(bias_V.dtype),
        _join(row_loss, length, chunks).astype(weights_N.dtype),
    )
    return sums, residuals


def _backward(soft_cap, z_loss, chunks, residuals, cotangents):
    g = cotangents[0]

    def scaled(x):
        return None if x is None else (x.astype(g.dtype) * g).astype(x.dtype)

    dx, dw, db, dweights = residuals
    return scaled(dx), scaled(dw), scaled(db), None, scaled(dweights)


loss.defvjp(_forward, _backward)


def _logits(x, w, bias_V, soft_cap):
    """Logits [n, V] in the compute dtype, capped."""
    logits = jnp.einsum('nd,dv->nv', x, w)
    if bias_V is not None:
        logits = logits + bias_V.astype(logits.dtype)
    if soft_cap is not None:
        wide = jnp.promote_types(logits.dtype, jnp.float32)
        logits = (soft_cap * jnp.tanh(logits.astype(wide) / soft_cap)).astype(logits.dtype)
    return logits


def _is_target(logits, targets):
    # A comparison fuses into the reductions and partitions over a sharded vocabulary; a gather
    # would do neither.
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 1) == targets[:, None]


def _statistics(logits, targets):
    """Wide nll [n], log-sum-exp [n], and whether the target's logit is the largest."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    is_target = _is_target(logits, targets)
    # The target is compared with the others' maximum: with the overall maximum it would have to
    # be equal, which fails where XLA computes a logit twice with different rounding.
    target = jnp.sum(jnp.where(is_target, logits.astype(wide), 0), axis=-1)
    others = jnp.max(jnp.where(is_target, -jnp.inf, logits), axis=-1).astype(wide)
    top = jnp.maximum(target, others)
    log_total = jnp.log(jnp.sum(jnp.exp(logits.astype(wide) - top[:, None]), axis=-1))
    return top - target + log_total, top + log_total, target >= others


def _logits_gradient(logits, targets, weights, lse, soft_cap, z_loss):
    """d loss_sum / d logits [n, V] (before the cap) in the compute dtype."""
    wide = lse.dtype
    p = jnp.exp(logits.astype(wide) - lse[:, None])
    if z_loss:
        p = p * (1 + 2 * z_loss * lse[:, None])
    d = (p - _is_target(logits, targets)) * weights.astype(wide)[:, None]
    if soft_cap is not None:
        d = d * (1 - jnp.square(logits.astype(wide) / soft_cap))
    return d.astype(logits.dtype)


def _sums(nll, lse, right, weights, z_loss):
    """Returns ((loss_sum, (nll, z, correct)), each row's loss), all [chunks, n] or [n] inside."""
    weights = weights.astype(nll.dtype)
    z = z_loss * jnp.square(lse)
    row_loss = nll + z
    sums = (jnp.sum(weights * nll), jnp.sum(weights * z), jnp.sum(weights * right))
    return (jnp.sum(weights * row_loss), sums), row_loss


def _split(rows, chunks):
    """[N, ...] -> [chunks, ceil(N / chunks), ...], rows dealt out in turn; weight 0 fills up."""
    if chunks == 1:
        return rows

    def deal(x):
        each = -(-x.shape[0] // chunks)
        x = jnp.pad(x, [(0, each * chunks - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return jnp.moveaxis(x.reshape(each, chunks, *x.shape[1:]), 1, 0)

    return tuple(deal(x) for x in rows)


def _join(x, length, chunks):
    """The inverse of `_split`; x is [N, ...] or [chunks, n, ...]."""
    if chunks == 1:
        return x
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:length]


def _loop(body, carry, rows, chunks):
    if chunks == 1:
        return body(carry, rows)
    return jax.lax.scan(body, carry, rows)
