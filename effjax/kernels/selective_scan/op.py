"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.devices import refuse_short
from effjax.kernels.diagonal_scan import xla as diagonal
from effjax.kernels.documents import begins, check_segments
from effjax.kernels.selective_scan import cost, hopper, reference, tpu, xla

_KERNELS = {'pallas_tpu': tpu, 'pallas_gpu': hopper}
_PLAIN = {'xla': xla, 'reference': reference}


def selective_scan(
    u: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    D: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    chunk: int = cost.CHUNK,
    implementation: str | None = None,
) -> Any:
    """Mamba's recurrence (arXiv 2312.00752), for each channel d and state n:

        h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,    y_t = sum_n C_t h_t + D u_t.

    A is discretised by zero-order hold and B by Euler's rule, as Mamba does. All arithmetic is
    float32 (float64 for float64 u). States of all tokens never exist together: one a chunk is kept,
    the others are computed again in the backward pass, of which Pallas kernels have one. With
    documents, each begins with a state of 0, the row's first one with the initial state; padding
    neither reads, decays nor writes, and gives 0.

    Args:
      u: inputs [B, T, D].
      dt: steps [B, T, D], at least 0 (after softplus).
      A: [D, N], at most 0.
      B: how inputs enter the states, [B, T, N].
      C: how states are read, [B, T, N].
      D: skip from input to output, [D]; None means 0.
      initial_state: [B, D, N]; None means 0.
      segment_ids: int32 [B, T], the document of each token, 0 is padding. None: one document.
      return_state: also return the state of the row's last document after its last token.
      chunk: tokens whose states exist at a time in 'xla'; changes speed and rounding only.
      implementation: 'pallas_tpu', 'pallas_gpu' (Hopper), 'xla', 'reference', or None for the
        best that can run.

    Returns:
      y [B, T, D] in the dtype of u, or (y, state [B, D, N]) with the state in float32.

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    _check(u, dt, A, B, C, D, initial_state, segment_ids, chunk)
    short = refuse_short(u.shape[1], implementation)
    chosen = choice.pick(
        'selective_scan',
        implementation,
        {
            'pallas_tpu': tpu.refuse(u, dt, A.shape[1]) or short,
            'pallas_gpu': hopper.refuse(u, dt, A.shape[1]) or short,
            'xla': None,
            'reference': None,
        },
        {'xla': diagonal.form()},
        shape=(*u.shape, A.shape[1]),
        dtype=u.dtype.name,
    )
    with jax.named_scope(f'selective_scan_{chosen}'):
        wide = jnp.promote_types(u.dtype, jnp.float32)
        fresh, real = None, None
        if segment_ids is not None:
            segment_ids = jnp.asarray(segment_ids)
            fresh, real = begins(segment_ids), (segment_ids != 0)[..., None]
            u, dt, B, C = (jnp.where(real, x, 0) for x in (u, dt, B, C))
        if initial_state is None:
            initial_state = jnp.zeros((u.shape[0], *A.shape), wide)
        A, initial_state = A.astype(wide), initial_state.astype(wide)
        if chosen in _KERNELS:
            y, state = _KERNELS[chosen].run(u, dt, A, B, C, D, initial_state, fresh)
        else:
            y, state = _PLAIN[chosen].run(u, dt, A, B, C, initial_state, fresh, chunk)
            if D is not None:
                y = y + D.astype(wide) * u.astype(wide)
        y = y.astype(u.dtype)
    return (y, state) if return_state else y


def _check(u, dt, A, B, C, D, initial_state, segment_ids, chunk) -> None:
    if u.ndim != 3 or dt.shape != u.shape:
        raise ValueError(
            f'selective_scan: u and dt are both [B, T, D], not {list(u.shape)} and '
            f'{list(dt.shape)}.'
        )
    if A.ndim != 2 or A.shape[0] != u.shape[2]:
        raise ValueError(
            f'selective_scan: A is [D, N] with the D of u {list(u.shape)}, not {list(A.shape)}.'
        )
    by_token = (*u.shape[:2], A.shape[1])
    if B.shape != by_token or C.shape != by_token:
        raise ValueError(
            f'selective_scan: B and C are both [B, T, N] = {list(by_token)}, not '
            f'{list(B.shape)} and {list(C.shape)}.'
        )
    if D is not None and D.shape != u.shape[2:]:
        raise ValueError(f'selective_scan: D is [{u.shape[2]}], not {list(D.shape)}.')
    state = (u.shape[0], *A.shape)
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(
            f'selective_scan: initial_state is [B, D, N] = {list(state)}, not '
            f'{list(initial_state.shape)}.'
        )
    check_segments('selective_scan', segment_ids, u.shape[:2])
    if chunk < 1:
        raise ValueError(f'selective_scan: chunk must be at least 1, got {chunk}.')
