"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax

from effjax.kernels import choice
from effjax.kernels.devices import refuse_short
from effjax.kernels.dplr import cost, hopper, problem, reference, tpu, xla

_KERNELS = {'pallas_tpu': tpu, 'pallas_gpu': hopper}
_IMPLEMENTATIONS = {**_KERNELS, 'xla': xla, 'reference': reference}


def dplr(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    read: jax.Array,
    write: jax.Array,
    log_decay: jax.Array,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    chunk: int = cost.CHUNK,
    implementation: str | None = None,
) -> Any:
    """A recurrence whose transition is diagonal plus a product of rank one (RWKV-7, 2503.14456).

        S_t = (diag(a_t) + write_t read_t^T) S_{t-1} + k_t v_t^T,    o_t = scale q_t S_t,

    with a_t = exp(log_decay_t). In RWKV-7 `read` is a key of norm 1 and `write` that key times
    rates in (-1, 0): what the key held is taken out, dimension by dimension. For a stable
    recurrence the transition may not enlarge a state; that is not enforced. 'xla' works in float32
    throughout (float64 for float64 inputs); the kernels take q, k and v in one dtype, `read` and
    `write` rounded to it, with sums and states in float32. With documents, each begins with a state
    of 0, the row's first one with the initial state; padding neither reads, decays nor writes, and
    gives 0.

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K].
      v: values [B, T, H, V].
      read: [B, T, H, K].
      write: [B, T, H, K].
      log_decay: at most 0, [B, T, H, K].
      scale: factor on the queries; None means 1.
      initial_state: [B, H, K, V]; None means 0.
      segment_ids: int32 [B, T], the document of each token, 0 is padding. None: one document.
      return_state: also return the state of the row's last document after its last token.
      chunk: tokens of a chunk of 'xla', 128 at most; changes speed and rounding only.
      implementation: 'pallas_tpu', 'pallas_gpu', 'xla', 'reference', or None for the best that can
        run.

    Returns:
      o [B, T, H, V] in the dtype of q, or (o, state [B, H, K, V]) with the state in float32.

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    arrays = (q, k, v, read, write, log_decay)
    problem.check(*arrays, initial_state, segment_ids, chunk)
    short = refuse_short(q.shape[1], implementation)
    refused = {n: kernel.refuse(q, k, v) or short for n, kernel in _KERNELS.items()}
    chosen = choice.pick(
        'dplr',
        implementation,
        {**refused, 'xla': None, 'reference': None},
        shape=(*q.shape, v.shape[-1]),
        dtype=q.dtype.name,
    )
    with jax.named_scope(f'dplr_{chosen}'):
        wide = chosen not in _KERNELS
        prepared = problem.prepare(*arrays, scale, initial_state, segment_ids, widen=wide)
        o, state = _IMPLEMENTATIONS[chosen].run(prepared, chunk)
        o = o.astype(q.dtype)
    return (o, state) if return_state else o
