"""The public function: checks the call, picks an implementation, runs it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.devices import refuse_short
from effjax.kernels.diagonal_scan import cost, hopper, reference, tpu, xla
from effjax.kernels.documents import begins, check_segments, spread

_KERNELS = {'pallas_tpu': tpu, 'pallas_gpu': hopper}
_IMPLEMENTATIONS = {**_KERNELS, 'xla': xla, 'reference': reference}


def diagonal_scan(
    x: jax.Array,
    log_decay: jax.Array,
    *,
    initial_state: jax.Array | None = None,
    reverse: bool = False,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    chunk: int = cost.CHUNK,
    implementation: str | None = None,
) -> Any:
    """The elementwise recurrence `h_t = exp(log_decay_t) h_{t-1} + x_t`, every h_t returned.

    What S5 (arXiv 2208.04933), the LRU (2303.06349) and Griffin's RG-LRU (2402.19427) run.
    Arithmetic is float32 or complex64 (64-bit inputs: float64, complex128). With documents, each
    begins with a state of 0, the first one in the scan's direction with the initial state;
    padding neither decays nor writes, and gives 0. The backward pass keeps h and the decays; the
    Pallas kernels have one, 'xla' and 'reference' derivatives of any order.

    Args:
      x: [B, T, ...], any dimensions of channels behind the time, real or complex.
      log_decay: real, or complex with a real part, at most 0; the channels of x, or [B, T, ...].
        Where it is complex, so is the result.
      initial_state: [B, ...]; None means 0.
      reverse: static; from the last token to the first, `h_t = a_t h_{t+1} + x_t`.
      segment_ids: int32 [B, T], the document of each token, 0 is padding. None: one document.
      return_state: also return the state after the last token of the document that the scan
        comes to last.
      chunk: tokens of a chunk of 'xla', which has none on GPUs; changes speed and rounding only.
      implementation: 'pallas_tpu', 'pallas_gpu' (Hopper), 'xla', 'reference', or None for the
        best that can run; where rows and channels are few, 'pallas_gpu' runs by its name only.

    Returns:
      h [B, T, ...], real in the dtype of x, complex in complex64; or (h, state [B, ...]) with the
      state in float32 or complex64.

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    _check(x, log_decay, initial_state, segment_ids, chunk)
    wide = jnp.promote_types(jnp.promote_types(x.dtype, log_decay.dtype), jnp.float32)
    chosen = choice.pick(
        'diagonal_scan',
        implementation,
        refusals(x, wide, implementation),
        {'xla': xla.form()},
        shape=x.shape,
        dtype=x.dtype.name,
    )
    with jax.named_scope(f'diagonal_scan_{chosen}'):
        # The kernels read real numbers as they are, of decays the logarithm.
        kept = chosen in _KERNELS and wide == jnp.float32
        decay, stop, keep = _decays(log_decay, wide, kept)
        decay = jnp.broadcast_to(decay, x.shape)
        write, real = x if kept else x.astype(wide), None
        if segment_ids is not None:
            segment_ids = jnp.asarray(segment_ids)
            real = spread(segment_ids != 0, x)
            fresh = begins(segment_ids[:, ::-1])[:, ::-1] if reverse else begins(segment_ids)
            decay = jnp.where(spread(fresh, x), stop, jnp.where(real, decay, keep))
            write = jnp.where(real, write, 0)
        if initial_state is None:
            initial_state = jnp.zeros((x.shape[0], *x.shape[2:]), wide)
        start = initial_state.astype(wide)
        h, state = _IMPLEMENTATIONS[chosen].scan(decay, write, start, reverse, chunk)
        h = h if real is None else jnp.where(real, h, 0)
        if not jnp.issubdtype(wide, jnp.complexfloating):
            h = h.astype(x.dtype)
    return (h, state) if return_state else h


def refusals(x: Any, wide: Any, implementation: str | None) -> dict[str, str | None]:
    """Returns each implementation's reason not to run a call here, or None, best first.

    Args:
      x: inputs [B, T, ...], or their shape and dtype.
      wide: dtype of the arithmetic.
      implementation: the one asked for.
    """
    short = refuse_short(x.shape[1], implementation)
    return {
        'pallas_tpu': tpu.refuse(x, wide) or short,
        'pallas_gpu': hopper.refuse(x, wide, by_name=implementation is not None) or short,
        'xla': None,
        'reference': None,
    }


def _decays(log_decay: jax.Array, wide: Any, as_logarithm: bool) -> tuple[jax.Array, float, float]:
    """(decays, what stands for a decay of 0, what for 1), perhaps all as logarithms."""
    if as_logarithm:
        read = log_decay.dtype in (jnp.float32, jnp.bfloat16)
        return log_decay if read else log_decay.astype(wide), -math.inf, 0.0
    decay = jnp.exp(log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32)))
    return decay.astype(wide), 0.0, 1.0


def _check(x, log_decay, initial_state, segment_ids, chunk) -> None:
    if x.ndim < 3 or log_decay.shape not in (x.shape, x.shape[2:]):
        raise ValueError(
            'diagonal_scan takes x [B, T, ...] and log_decay of its shape or of its channels '
            f'alone, not {list(x.shape)} and {list(log_decay.shape)}.'
        )
    state = (x.shape[0], *x.shape[2:])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(
            f'diagonal_scan: initial_state is {list(state)} for these inputs, not '
            f'{list(initial_state.shape)}.'
        )
    check_segments('diagonal_scan', segment_ids, x.shape[:2])
    if chunk < 1:
        raise ValueError(f'diagonal_scan: chunk must be at least 1, got {chunk}.')
