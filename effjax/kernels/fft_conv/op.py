"""The public function: checks the call, picks an implementation, runs it."""

import math

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.documents import begins, check_segments
from effjax.kernels.fft_conv import reference, xla

_IMPLEMENTATIONS = {'xla': xla, 'reference': reference}


def fft_conv(
    x: jax.Array,
    h: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Causal depthwise convolution with a long filter: `y_t = sum_l h_l x_{t-l}`.

    Transforms are float32 whatever the inputs (float64 for float64): in 16 bits they overflow.
    Used by Hyena (arXiv 2302.10866), H3 (2212.14052), S4 (2111.00396). Documents are kept apart
    exactly; their tokens stand next to each other, padding before, between or after them.

    Args:
      x: [B, T, ...], any dimensions of channels behind the time.
      h: [L, ...] with the channels of x, L >= 1; taps from T on are never reached.
      segment_ids: int32 [B, T], the document of each token; 0 is padding, which is never read and
        whose output is 0. None: one document a row.
      implementation: 'xla', 'reference', or None for the best that can run.

    Returns:
      y like x.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    if x.ndim < 3 or h.ndim != x.ndim - 1 or h.shape[1:] != x.shape[2:] or h.shape[0] < 1:
        raise ValueError(
            'fft_conv takes x [B, T, ...] and h [L, ...] of the same channels, not '
            f'{list(x.shape)} and {list(h.shape)}.'
        )
    check_segments('fft_conv', segment_ids, x.shape[:2])
    documents, real = None, None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        documents = jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)
        real = (segment_ids != 0)[..., None]
    forms = {'xla': xla.form(x.shape[1], documents)}
    facts = {'shape': x.shape, 'taps': h.shape[0], 'dtype': x.dtype.name}
    chosen = choice.pick(
        'fft_conv', implementation, dict.fromkeys(_IMPLEMENTATIONS), forms, **facts
    )
    with jax.named_scope(f'fft_conv_{chosen}'):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        channels = math.prod(x.shape[2:])
        flat = x.reshape(*x.shape[:2], channels).astype(wide)
        flat = flat if real is None else jnp.where(real, flat, 0)
        taps = h.reshape(h.shape[0], channels).astype(wide)
        y = _IMPLEMENTATIONS[chosen].conv(flat, taps, documents)
        y = y if real is None else jnp.where(real, y, 0)
        return y.reshape(x.shape).astype(x.dtype)
