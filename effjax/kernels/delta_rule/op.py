"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax

from effjax.kernels import choice
from effjax.kernels.delta_rule import cost, hopper, problem, reference, tpu, xla
from effjax.kernels.devices import refuse_short

_KERNELS = {'pallas_tpu': tpu, 'pallas_gpu': hopper}
_IMPLEMENTATIONS = {**_KERNELS, 'xla': xla, 'reference': reference}


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    *,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    chunk: int = cost.CHUNK,
    implementation: str | None = None,
) -> Any:
    """The delta rule (DeltaNet, arXiv 2406.06484), gated where there are decays (2412.06464).

        S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    o_t = scale q_t S_t,

    with a_t = exp(log_decay_t). For a stable recurrence keys have norm 1 and beta lies in (0, 1),
    or (0, 2) where eigenvalues may be negative; neither is enforced. 'xla' works in
    float32 throughout (float64 for float64 inputs); the kernels form products in the inputs' dtype,
    with sums and states in float32. With documents, each begins with a state of 0, the row's first
    one with the initial state; padding neither reads, decays nor writes, and gives 0.

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K].
      v: values [B, T, H, V].
      beta: how much of a key's old value is replaced, [B, T, H].
      log_decay: at most 0; [H] or [B, T, H]; None decays nothing.
      scale: factor on the queries; None means 1.
      initial_state: [B, H, K, V]; None means 0.
      segment_ids: int32 [B, T], the document of each token, 0 is padding. None: one document.
      return_state: also return the state of the row's last document after its last token.
      chunk: tokens of a chunk of 'xla'; changes speed and rounding only.
      implementation: 'pallas_tpu', 'pallas_gpu', 'xla', 'reference', or None for the best that can
        run.

    Returns:
      o [B, T, H, V] in the dtype of q, or (o, state [B, H, K, V]) with the state in float32.

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    problem.check(q, k, v, beta, log_decay, initial_state, segment_ids, chunk)
    short = refuse_short(q.shape[1], implementation)
    refused = {n: kernel.refuse(q, k, v) or short for n, kernel in _KERNELS.items()}
    chosen = choice.pick(
        'delta_rule',
        implementation,
        {**refused, 'xla': None, 'reference': None},
        shape=(*q.shape, v.shape[-1]),
        dtype=q.dtype.name,
    )
    with jax.named_scope(f'delta_rule_{chosen}'):
        arrays = (q, k, v, beta, log_decay, scale, initial_state, segment_ids)
        prepared = problem.prepare(*arrays, widen=chosen in ('xla', 'reference'))
        o, state = _IMPLEMENTATIONS[chosen].run(prepared, chunk)
        o = o.astype(q.dtype)
    return (o, state) if return_state else o
