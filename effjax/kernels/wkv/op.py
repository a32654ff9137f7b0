"""The public function: checks the call, picks an implementation, runs it."""

from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.diagonal_scan.op import refusals
from effjax.kernels.documents import begins, check_segments
from effjax.kernels.wkv import reference, sums


def wkv(
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    bonus: jax.Array,
    *,
    initial_state: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Any:
    """RWKV-4's average of values (Peng et al., arXiv 2305.13048), channel by channel.

        o_t = (sum_{j<t} e^((t-1-j) w + k_j) v_j + e^(u + k_t) v_t) / (the same without v),

    with w = log_decay <= 0 and u = bonus. Both sums are kept as (numerator, denominator, m) and
    stand for e^m times the numbers, m being their largest exponent, so that keys of any size are
    exact. All arithmetic is float32 (float64 for float64 inputs). With documents, each begins
    empty, the row's first one with the initial state; padding neither decays nor writes, and gives
    0.

    Args:
      k: keys [B, T, D].
      v: values [B, T, D].
      log_decay: at most 0, [D].
      bonus: [D].
      initial_state: (numerator, denominator, m), each [B, D]; a denominator of 0 is an empty sum,
        whatever m is, and None is empty. m is a constant in gradients: those of the sums are in the
        first two.
      segment_ids: int32 [B, T], the document of each token, 0 is padding. None: one document.
      return_state: also return the state of the row's last document after its last token.
      implementation: 'pallas_tpu', 'pallas_gpu' (Hopper), 'xla', 'reference', or None for the
        best that can run, as in `diagonal_scan`.

    Returns:
      o [B, T, D] in the dtype of v, or (o, the state, of three float32 arrays).

    Raises:
      ValueError: shapes that do not fit, an implementation that is unknown or cannot run here.
    """
    _check(k, v, log_decay, bonus, initial_state, segment_ids)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    both = jax.ShapeDtypeStruct((*k.shape[:2], 2 * k.shape[2]), wide)
    facts: dict[str, Any] = {'shape': k.shape, 'dtype': v.dtype.name}
    chosen = choice.pick('wkv', implementation, refusals(both, wide, implementation), **facts)
    if initial_state is None:
        initial_state = (jnp.zeros((k.shape[0], k.shape[2]), wide),) * 3
    numerator, denominator, m = (x.astype(wide) for x in initial_state)
    m = jnp.where(denominator > 0, jax.lax.stop_gradient(m), reference.EMPTY)
    state = (numerator, denominator, m)
    k, values, log_decay, bonus = (x.astype(wide) for x in (k, v, log_decay, bonus))
    real = resets = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        real, resets = segment_ids != 0, begins(segment_ids)
        k, values = (jnp.where(real[..., None], x, 0) for x in (k, values))
    with jax.named_scope(f'wkv_{chosen}'):
        if chosen == 'reference':
            o, state = reference.run(k, values, log_decay, bonus, state, real, resets)
        else:
            o, state = sums.run(k, values, log_decay, bonus, state, real, resets, chosen)
    if real is not None:
        o = jnp.where(real[..., None], o, 0)
    o = o.astype(v.dtype)
    numerator, denominator, m = state
    state = (numerator, denominator, jnp.where(denominator > 0, m, 0))
    return (o, state) if return_state else o


def _check(k, v, log_decay, bonus, initial_state, segment_ids) -> None:
    if k.ndim != 3 or v.shape != k.shape:
        raise ValueError(
            f'wkv: k and v are both [B, T, D], not {list(k.shape)} and {list(v.shape)}.'
        )
    for name, x in (('log_decay', log_decay), ('bonus', bonus)):
        if x.shape != k.shape[2:]:
            raise ValueError(f'wkv: {name} is [D] = {list(k.shape[2:])}, not {list(x.shape)}.')
    shape = (k.shape[0], k.shape[2])
    if initial_state is not None and [x.shape for x in initial_state] != [shape] * 3:
        raise ValueError(
            f'wkv: the state is three arrays [B, D] = {list(shape)}, not '
            f'{[list(x.shape) for x in initial_state]}.'
        )
    check_segments('wkv', segment_ids, k.shape[:2])
