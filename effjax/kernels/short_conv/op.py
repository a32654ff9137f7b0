"""The public function: checks the call, picks an implementation, runs it."""

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.documents import check_segments
from effjax.kernels.short_conv import reference, xla

_IMPLEMENTATIONS = {'xla': xla, 'reference': reference}


def short_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal depthwise convolution: `y_t = sum_k w[K-1-k] * x_{t-k}` within a document.

    Products and sums are float32 (float64 for float64 inputs). Only the inputs are kept for the
    backward pass. A document's tokens stand next to each other: padding lies between documents,
    or in front of the rest of the document that `state` belongs to.

    Args:
      x: [B, T, ...], any dimensions of channels behind the time, such as [B, T, C].
      w: [K, ...] with the channels of x, K >= 1; `w[K-1]` multiplies the token itself.
      state: [B, K-1, ...], the inputs before x, the newest last; 0 where there were none. It
        belongs to the document of the row's first real token: set it to 0 where that is another.
        None is 0.
      segment_ids: int32 [B, T], the document of each token; 0 is padding, which is never read and
        whose output is 0. None: one document a row.
      return_state: also return the state after x, that of the row's last document, in the dtype
        of `state` (of x without one).
      implementation: 'xla', 'reference', or None for the best that can run.

    Returns:
      y like x; with `return_state`, (y, state).

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation.
    """
    if x.ndim < 3 or w.ndim != x.ndim - 1 or w.shape[1:] != x.shape[2:] or w.shape[0] < 1:
        raise ValueError(
            f'short_conv takes x [B, T, ...] and w [K, ...] of the same channels, not {x.shape} '
            f'and {w.shape}.'
        )
    check_segments('short_conv', segment_ids, x.shape[:2])
    before = (x.shape[0], w.shape[0] - 1, *x.shape[2:])
    if state is None:
        state = jnp.zeros(before, x.dtype)
        state_given = False
    else:
        state_given = True
    if state.shape != before:
        raise ValueError(f'short_conv: the state is {before} for these inputs, not {state.shape}.')
    refusals = dict.fromkeys(_IMPLEMENTATIONS)
    chosen = choice.pick(
        'short_conv',
        implementation,
        refusals,
        shape=x.shape,
        taps=w.shape[0],
        dtype=x.dtype.name,
    )
    with jax.named_scope(f'short_conv_{chosen}'):
        run = _IMPLEMENTATIONS[chosen].conv
        y, new = run(x, w, state, segment_ids, state_given=state_given, return_state=return_state)
    return (y, new) if return_state else y
