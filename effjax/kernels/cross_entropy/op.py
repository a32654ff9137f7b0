"""The public functions: each checks the call, picks an implementation, runs it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.cross_entropy import chunked, divergence, reference


class Head(NamedTuple):
    """What a model's logits are made of: `cap(x w + bias)`.

    Attributes:
      x_ND: [N, D] hidden vectors in the compute dtype.
      w_DV: [D, V] head weight; cast to the dtype of x, its gradient comes in its own dtype.
      bias_V: [V] added to the logits, or None.
      soft_cap: logits become cap * tanh(logits / cap).
    """

    x_ND: jax.Array
    w_DV: jax.Array
    bias_V: jax.Array | None = None
    soft_cap: float | None = None


def linear_cross_entropy(
    x_ND: jax.Array,
    w_DV: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunks: int = 1,
    bias: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Sum over rows of `weight (cross_entropy + z_loss lse^2)` of logits `cap(x w + bias)`.

    Logits are in the dtype of x, their softmax statistics in float32; dw adds up in float32.
    Runs under jit, grad, vmap, remat and on sharded inputs.

    Args:
      x_ND: [N, D] hidden vectors in the compute dtype.
      w_DV: [D, V] head weight; cast to the dtype of x, its gradient comes in its own dtype.
      targets_N: int [N], in [0, V), also where the weight is 0.
      weights_N: [N] weight of each row; 0 leaves it out.
      soft_cap: logits become cap * tanh(logits / cap).
      z_loss: factor on the squared log-sum-exp (PaLM, arXiv 2204.02311).
      chunks: pieces that the rows are cut into; the logits of one piece are alive at a time.
      bias: [V] added to the logits, or None.
      implementation: 'chunked', 'reference', or None.

    Returns:
      loss_sum: float32 scalar, z-loss included; the only output that has gradients.
      sums: float32 scalars: 'nll' (without z-loss), 'z_loss', 'correct' (weight of the rows whose
        target has the largest logit).

    Raises:
      ValueError: shapes that do not fit, fewer than 1 chunk, an unknown implementation.
    """
    _check(x_ND, w_DV, targets_N, weights_N, chunks, bias)
    chosen = choice.pick(
        'linear_cross_entropy',
        implementation,
        {'chunked': None, 'reference': None},
        shape=(*x_ND.shape, w_DV.shape[1]),
        chunks=chunks,
    )
    chunks = min(chunks, max(1, x_ND.shape[0]))
    with jax.named_scope('linear_cross_entropy'):
        if chosen == 'chunked':
            total, sums = chunked.loss(
                soft_cap, float(z_loss), chunks, x_ND, w_DV, bias, targets_N, weights_N
            )
        else:
            nll, lse, right = reference.row_losses(x_ND, w_DV, targets_N, bias, soft_cap=soft_cap)
            weights = weights_N.astype(nll.dtype)
            z = z_loss * jnp.square(lse)
            total = jnp.sum(weights * (nll + z))
            sums = (jnp.sum(weights * nll), jnp.sum(weights * z), jnp.sum(weights * right))
    names = ('nll', 'z_loss', 'correct')
    return total, {n: jax.lax.stop_gradient(s) for n, s in zip(names, sums, strict=True)}


def linear_divergence(
    student: Head,
    teacher: Head,
    weights_N: jax.Array,
    *,
    temperature: float = 1.0,
    chunks: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """Sum over rows of `weight KL(teacher || student)`, both softened by a temperature.

    Both sides' logits are divided by `temperature` (Hinton et al., arXiv 1503.02531); whoever wants
    gradients of the same size at any temperature multiplies by its square. Logits are in the dtype
    of each side's x, all that follows is in float32. Only the student and the weights have
    gradients.

    Args:
      student: [N, D] vectors and what makes logits [N, V] of them.
      teacher: the same with a width of its own.
      weights_N: [N] weight of each row; 0 leaves it out.
      temperature: above 0.
      chunks: pieces that the rows are cut into; the logits of one piece are alive at a time.
      implementation: 'chunked', 'reference', or None.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: shapes that do not fit, fewer than 1 chunk, a temperature that is not above 0, an
        unknown implementation.
    """
    _check_heads(student, teacher, weights_N, temperature, chunks)
    chosen = choice.pick(
        'linear_divergence',
        implementation,
        {'chunked': None, 'reference': None},
        shape=(*student.x_ND.shape, student.w_DV.shape[1]),
        chunks=chunks,
    )
    chunks = min(chunks, max(1, weights_N.shape[0]))
    with jax.named_scope('linear_divergence'):
        if chosen == 'chunked':
            caps, sides = (student.soft_cap, teacher.soft_cap), (student[:3], teacher[:3])
            return divergence.loss(caps, float(temperature), chunks, *sides, weights_N)
        rows = reference.head_divergences(student, teacher, temperature)
        return jnp.sum(weights_N.astype(rows.dtype) * rows)


def _check_heads(student, teacher, weights_N, temperature, chunks) -> None:
    for x, w, bias, _ in (student, teacher):
        if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
            raise ValueError(
                f'linear_divergence takes x [N,D] and w [D,V], got {x.shape} and {w.shape}.'
            )
        if x.shape[0] != weights_N.shape[0] or weights_N.ndim != 1:
            raise ValueError(
                f'linear_divergence takes a weight for each of {x.shape[0]} rows, got '
                f'{weights_N.shape}.'
            )
        if bias is not None and bias.shape != (w.shape[1],):
            raise ValueError(f'linear_divergence: bias must be [{w.shape[1]}], got {bias.shape}.')
    if student.w_DV.shape[1] != teacher.w_DV.shape[1]:
        raise ValueError(
            f'linear_divergence compares logits over one vocabulary, got {student.w_DV.shape[1]} '
            f'and {teacher.w_DV.shape[1]} entries.'
        )
    if not temperature > 0:
        raise ValueError(f'linear_divergence: temperature must be above 0, got {temperature}.')
    if chunks < 1:
        raise ValueError(f'linear_divergence: chunks must be at least 1, got {chunks}.')


def _check(x_ND, w_DV, targets_N, weights_N, chunks, bias) -> None:
    if x_ND.ndim != 2 or w_DV.ndim != 2 or x_ND.shape[1] != w_DV.shape[0]:
        raise ValueError(
            f'linear_cross_entropy takes x [N,D] and w [D,V], got {x_ND.shape} and {w_DV.shape}.'
        )
    rows = (x_ND.shape[0],)
    if targets_N.shape != rows or weights_N.shape != rows:
        raise ValueError(
            f'linear_cross_entropy takes targets and weights {rows}, got {targets_N.shape} and '
            f'{weights_N.shape}.'
        )
    if not jnp.issubdtype(targets_N.dtype, jnp.integer):
        raise ValueError(f'linear_cross_entropy: targets must be integers, got {targets_N.dtype}.')
    if bias is not None and bias.shape != (w_DV.shape[1],):
        raise ValueError(f'linear_cross_entropy: bias must be [{w_DV.shape[1]}], got {bias.shape}.')
    if chunks < 1:
        raise ValueError(f'linear_cross_entropy: chunks must be at least 1, got {chunks}.')
