"""The public function: checks the call, picks an implementation, runs it."""

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.cross_entropy import chunked, reference


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
