"""The long convolution by Fourier transform, and of short rows on GPUs as a product.

Three forms:
  whole: without documents, one transform of at least T + L - 1 points, so that nothing wraps
    around; what a later token adds to an earlier one is rounding only;
  toeplitz: without documents, rows of at most `cost.SHORT` tokens on a GPU: the matrix of each
    channel's taps [T, T] times all rows, in full float32. A transform there is some
    passes over memory of twice the row; the two were not timed beside each other yet;
  halves: with documents. One transform would mix them, so the row is halved again and again: what
    the left half of a block adds to its right half is a convolution of the one document that lies
    across the middle, and a transform of the block's size holds it. All blocks of a size are one
    batch. Blocks of at most `cost.NEAR` tokens are summed directly. T log^2 T instead of T log T,
    no matrix of T x T, and no output depends on a later token or another document at all, not
    even by rounding.
"""

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.fft_conv import cost


def form(length: int, documents: jax.Array | None) -> str:
    """Returns 'whole', 'toeplitz' or 'halves', for the platform traced for."""
    if documents is not None:
        return 'halves'
    return 'toeplitz' if choice.platform() == 'gpu' and length <= cost.SHORT else 'whole'


def conv(x: jax.Array, h: jax.Array, documents: jax.Array | None) -> jax.Array:
    """Returns y [B, T, D] of x [B, T, D], h [L, D] and document numbers [B, T]."""
    h = h[: x.shape[1]]
    if documents is not None:
        return _halves(x, h, documents)
    return {'whole': _whole, 'toeplitz': _toeplitz}[form(x.shape[1], None)](x, h)


def _whole(x: jax.Array, h: jax.Array) -> jax.Array:
    points = cost.transform_size(x.shape[1], h.shape[0])
    product = jnp.fft.rfft(x, points, axis=1) * jnp.fft.rfft(h, points, axis=0)
    return jnp.fft.irfft(product, points, axis=1)[:, : x.shape[1]]


def _toeplitz(x: jax.Array, h: jax.Array) -> jax.Array:
    length, (taps, channels) = x.shape[1], h.shape
    # Of p = (h_(T-1) ... h_0, 0 ... 0), 2 T long, row t of a channel's matrix is what stands from
    # T-1-t on. Copies of p one after another, read in steps of one more than its length, are these
    # rows from the last to the first: without a gather, whose gradient would be a slow scatter.
    p = jnp.pad(h[::-1].T, ((0, 0), (length - taps, length)))
    copies = jnp.broadcast_to(p[:, None], (channels, length, 2 * length))
    flat = jnp.pad(copies.reshape(channels, -1), ((0, 0), (0, length)))
    matrix = flat.reshape(channels, length, 2 * length + 1)[:, ::-1, :length]
    return jnp.einsum('dts,bsd->btd', matrix, x, precision='highest')


def _halves(x: jax.Array, h: jax.Array, documents: jax.Array) -> jax.Array:
    length = x.shape[1]
    size, levels = cost.halving(length)
    more = size * 2**levels - length
    x = jnp.pad(x, ((0, 0), (0, more), (0, 0)))
    h = jnp.pad(h, ((0, x.shape[1] - h.shape[0]), (0, 0)))
    documents = jnp.pad(documents, ((0, 0), (0, more)), mode='edge')
    # Rematerialised, so that a shifted copy a tap is not kept for the filter's gradient.
    y = jax.checkpoint(_near, static_argnums=3)(x, h, documents, size)
    for level in range(levels):
        y = y + _across(x, h, documents, size * 2**level)
    return y[:, :length]


def _near(x: jax.Array, h: jax.Array, documents: jax.Array, size: int) -> jax.Array:
    """What the tokens of each block of `size` add to each other."""
    blocks = x.reshape(x.shape[0], -1, size, x.shape[2])
    numbers = documents.reshape(*blocks.shape[:3])
    y = jnp.zeros_like(blocks)
    for lag in range(size):
        same = numbers[:, :, : size - lag] == numbers[:, :, lag:]
        part = jnp.where(same[..., None], blocks[:, :, : size - lag], 0) * h[lag]
        y = y + jnp.pad(part, ((0, 0), (0, 0), (lag, 0), (0, 0)))
    return y.reshape(x.shape)


def _across(x: jax.Array, h: jax.Array, documents: jax.Array, half: int) -> jax.Array:
    """What the left half of each block of 2 `half` tokens adds to the right half."""
    points = 2 * half
    blocks = x.reshape(x.shape[0], -1, points, x.shape[2])
    numbers = documents.reshape(*blocks.shape[:3])
    middle = numbers[:, :, half - 1 : half]
    left = jnp.where((numbers[:, :, :half] == middle)[..., None], blocks[:, :, :half], 0)
    # Lags run from 1 to 2 half - 1: a transform of 2 half points wraps nothing into the right half.
    filters = jnp.fft.rfft(h[:points], points, axis=0)
    right = jnp.fft.irfft(jnp.fft.rfft(left, points, axis=2) * filters, points, axis=2)
    right = jnp.where((numbers[:, :, half:] == middle)[..., None], right[:, :, half:], 0)
    return jnp.pad(right, ((0, 0), (0, 0), (half, 0), (0, 0))).reshape(x.shape)
