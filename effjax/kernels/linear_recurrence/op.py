"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.devices import refuse_short
from effjax.kernels.linear_recurrence import cost, hopper, problem, reference, tpu, xla

_KERNELS = {'pallas_tpu': tpu, 'pallas_gpu': hopper}
_IMPLEMENTATIONS = {**_KERNELS, 'xla': xla, 'reference': reference}


def linear_recurrence(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    bonus: jax.Array | None = None,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    chunk: int = cost.CHUNK,
    implementation: str | None = None,
) -> Any:
    """Linear attention with or without decay, as a recurrence over a matrix a head.

        S_t = a_t S_{t-1} + k_t v_t^T,    o_t = scale q_t S_t,

    with a_t = exp(log_decay_t): 1 (Katharopoulos et al., arXiv 2006.16236), a constant a head
    (RetNet, 2307.08621), a number a token and head (Mamba-2, 2405.21060) or one for each row of
    S too (GLA, 2312.06635). With a bonus u a token sees the state before itself and its own
    product: o_t = scale q_t (S_{t-1} + u k_t v_t^T) (RWKV-6, 2404.05892).

    Products are in the inputs' dtype, sums, decays and states float32 (float64 for float64
    inputs). With documents, each begins with a state of 0, the row's first one with the initial
    state; padding neither reads, decays nor writes, and gives 0.

    Args:
      q: queries [B, T, H, K]; or [B, T, G, K], each for H / G heads of v, as in Mamba-2.
      k: keys, of the shape of q.
      v: values [B, T, H, V].
      log_decay: at most 0; [H], [B, T, H] or [B, T, H, K]; None decays nothing.
      bonus: [H, K], or None.
      scale: factor on the queries; None means 1.
      initial_state: [B, H, K, V]; None means 0.
      segment_ids: int32 [B, T], the document of each token, 0 is padding; an id does not come
        back in a row once another has followed it. None: one document a row.
      return_state: also return the state of the row's last document after its last token.
      chunk: tokens of a chunk of 'xla'; changes speed, memory and rounding only.
      implementation: 'pallas_tpu', 'pallas_gpu', 'xla', 'reference', or None for the best that can
        run.

    Returns:
      o [B, T, H, V] in the dtype of q, or (o, state [B, H, K, V]) with the state in float32.

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    problem.check(q, k, v, log_decay, bonus, initial_state, segment_ids, chunk)
    kind = problem.decay_kind(log_decay)
    short = refuse_short(q.shape[1], implementation)
    refused = {
        n: kernel.refuse(q, v, kind, bonus is not None) or short for n, kernel in _KERNELS.items()
    }
    chosen = choice.pick(
        'linear_recurrence',
        implementation,
        {**refused, 'xla': None, 'reference': None},
        shape=(*q.shape, *v.shape[2:]),
        dtype=q.dtype.name,
        decay=kind,
    )
    with jax.named_scope(f'linear_recurrence_{chosen}'):
        prepared = problem.prepare(q, k, v, log_decay, bonus, scale, initial_state, segment_ids)
        o, state = _IMPLEMENTATIONS[chosen].run(prepared, chunk)
        o = jnp.asarray(o, q.dtype)
    return (o, state) if return_state else o
