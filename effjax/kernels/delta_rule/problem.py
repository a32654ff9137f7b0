"""The inputs of one call of the delta rule, checked and brought into one form."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.kernels.documents import begins, check_segments
from effjax.kernels.linear_recurrence.problem import first_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs in float32 (float64 where they are), padding made harmless.

    Pallas kernels take queries, keys and values in their own dtype and widen them as they go.

    Attributes:
      q: queries [B, T, H, K], scaled.
      k: keys [B, T, H, K].
      v: values [B, T, H, V].
      beta: [B, T, H].
      log_decay: [B, T, H] or None.
      documents: int32 [B, T], number of each token's document in its row, or None.
      state: [B, H, K, V], what came before the first document.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    beta: jax.Array
    log_decay: jax.Array | None
    documents: jax.Array | None
    state: jax.Array


def check(q, k, v, beta, log_decay, initial_state, segment_ids, chunk) -> None:
    """Checks shapes.

    Raises:
      ValueError: shapes that do not fit, in one sentence.
    """
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(
            f'delta_rule: q and k are both [B, T, H, K], not {list(q.shape)} and {list(k.shape)}.'
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f'delta_rule: v is [B, T, H, V] with the B, T and H of q {list(q.shape)}, not '
            f'{list(v.shape)}.'
        )
    if beta.shape != q.shape[:3]:
        raise ValueError(
            f'delta_rule: beta is [B, T, H] = {list(q.shape[:3])}, not {list(beta.shape)}.'
        )
    if log_decay is not None and log_decay.shape not in (q.shape[2:3], q.shape[:3]):
        raise ValueError(
            f'delta_rule: log_decay is one number a head, [H] or [B, T, H] = {list(q.shape[:3])}, '
            f'not {list(log_decay.shape)}.'
        )
    state = (q.shape[0], *q.shape[2:], v.shape[3])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(
            f'delta_rule: initial_state is [B, H, K, V] = {list(state)}, not '
            f'{list(initial_state.shape)}.'
        )
    check_segments('delta_rule', segment_ids, q.shape[:2])
    if chunk < 1:
        raise ValueError(f'delta_rule: chunk must be at least 1, got {chunk}.')


def prepare(q, k, v, beta, log_decay, scale, initial_state, segment_ids, *, widen: bool) -> Problem:
    """Returns the inputs in one form; padding neither reads, decays nor writes.

    Args:
      q, k, v, beta, log_decay, scale, initial_state, segment_ids: as `delta_rule` takes them.
      widen: q, k and v too become float32, before q is scaled.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    beta = beta.astype(wide)
    if widen:
        q, k, v = (x.astype(wide) for x in (q, k, v))
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    if log_decay is not None:
        log_decay = jnp.broadcast_to(log_decay.astype(wide), beta.shape)
    documents = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        documents = jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)
        real = (segment_ids != 0)[..., None]
        q, k, v = (jnp.where(real[..., None], x, 0) for x in (q, k, v))
        beta = jnp.where(real, beta, 0)
        log_decay = None if log_decay is None else jnp.where(real, log_decay, 0)
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[3]), wide)
    return Problem(q, k, v, beta, log_decay, documents, initial_state.astype(wide))


def with_documents(problem: Problem) -> jax.Array | None:
    """Returns the log-decays [B, T, H], infinite where a document begins, or None."""
    log_decay = problem.log_decay
    if problem.documents is None:
        return log_decay
    if log_decay is None:
        log_decay = jnp.zeros_like(problem.beta)
    return jnp.where(first_tokens(problem.documents)[..., None], -jnp.inf, log_decay)
