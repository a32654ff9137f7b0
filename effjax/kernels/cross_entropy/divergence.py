"""Kullback-Leibler divergence of two heads over chunks of rows, gradients computed beside it.

As in `chunked`: each chunk computes both models' logits, its rows' divergence, and the student's dx
and part of dw, and forgets the logits. The teacher's arrays get no gradient.
"""

import functools

import jax
import jax.numpy as jnp

from effjax.kernels.cross_entropy.chunked import _join, _logits, _loop, _split

# x [N, D], w [D, V], bias [V] or None
Arrays = tuple[jax.Array, jax.Array, jax.Array | None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def loss(
    caps: tuple[float | None, float | None],
    temperature: float,
    chunks: int,
    student: Arrays,
    teacher: Arrays,
    weights_N: jax.Array,
) -> jax.Array:
    """Returns the weighted sum of rows' KL(teacher || student); `caps` are both models'."""
    (x, w, bias), (tx, tw, tbias) = _cast(student), _cast(teacher)

    def one(_, rows):
        x, tx = rows
        logits, teachers = _logits(x, w, bias, caps[0]), _logits(tx, tw, tbias, caps[1])
        return None, _rows(logits, teachers, temperature)[0]

    _, kl = _loop(one, None, _split((x, tx), chunks), chunks)
    return _sum(_join(kl, x.shape[0], chunks), weights_N)


def _forward(caps, temperature, chunks, student, teacher, weights_N):
    (x, w, bias), (tx, tw, tbias) = _cast(student), _cast(teacher)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def one(carry, rows):
        dw, db = carry
        x, tx, weights = rows
        logits, teachers = _logits(x, w, bias, caps[0]), _logits(tx, tw, tbias, caps[1])
        kl, d = _rows(logits, teachers, temperature)
        d = d * weights.astype(wide)[:, None]
        if caps[0] is not None:
            d = d * (1 - jnp.square(logits.astype(wide) / caps[0]))
        d = d.astype(logits.dtype)
        dx = jnp.einsum('nv,dv->nd', d, w)
        part = jnp.einsum('nd,nv->dv', x, d, preferred_element_type=wide)
        dw = part if dw is None else dw + part
        db = None if db is None else db + d.sum(0, dtype=wide)
        return (dw, db), (kl, dx)

    db = None if bias is None else jnp.zeros(bias.shape, wide)
    start = (None if chunks == 1 else jnp.zeros(w.shape, wide), db)
    rows = _split((x, tx, weights_N), chunks)
    (dw, db), (kl, dx) = _loop(one, start, rows, chunks)
    kl, dx = _join(kl, x.shape[0], chunks), _join(dx, x.shape[0], chunks)
    db = None if bias is None else db.astype(bias.dtype)
    residuals = (dx, dw.astype(student[1].dtype), db, kl.astype(weights_N.dtype))
    return _sum(kl, weights_N), residuals


def _backward(caps, temperature, chunks, residuals, g):
    dx, dw, db, dweights = (
        None if r is None else (r.astype(g.dtype) * g).astype(r.dtype) for r in residuals
    )
    return (dx, dw, db), None, dweights


loss.defvjp(_forward, _backward)


def _cast(arrays: Arrays) -> Arrays:
    x, w, bias = arrays
    return x, w.astype(x.dtype), bias


def _rows(logits, teachers, temperature):
    """Returns each row's divergence [n], and its gradient by the (capped) logits [n, V], wide."""
    wide = jnp.promote_types(logits.dtype, jnp.float32)
    log_p = jax.nn.log_softmax(logits.astype(wide) / temperature, axis=-1)
    log_q = jax.nn.log_softmax(teachers.astype(wide) / temperature, axis=-1)
    q = jnp.exp(log_q)
    return jnp.sum(q * (log_q - log_p), axis=-1), (jnp.exp(log_p) - q) / temperature


def _sum(kl, weights):
    return jnp.sum(weights.astype(kl.dtype) * kl)
