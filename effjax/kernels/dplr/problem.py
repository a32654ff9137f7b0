"""The inputs of one diagonal plus low-rank recurrence, checked and brought into one form."""

import dataclasses

import jax
import jax.numpy as jnp

from effjax.kernels.documents import begins, check_segments, spread
from effjax.kernels.linear_recurrence.problem import first_tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs, padding made harmless.

    Decays and the state are float32, float64 where the inputs are; the others so too but for the
    kernels, which take them as they come, `read` and `write` in the dtype of q.

    Attributes:
      q: queries [B, T, H, K], scaled.
      k: keys [B, T, H, K].
      v: values [B, T, H, V].
      read: what the transition reads the state with, [B, T, H, K].
      write: where it writes what it read, [B, T, H, K].
      log_decay: [B, T, H, K].
      documents: int32 [B, T], number of each token's document in its row, or None.
      state: [B, H, K, V], what came before the first document.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    read: jax.Array
    write: jax.Array
    log_decay: jax.Array
    documents: jax.Array | None
    state: jax.Array


def check(q, k, v, read, write, log_decay, initial_state, segment_ids, chunk) -> None:
    """Checks shapes.

    Raises:
      ValueError: shapes that do not fit, in one sentence.
    """
    if q.ndim != 4:
        raise ValueError(f'dplr: q is [B, T, H, K], not {list(q.shape)}.')
    for name, x in (('k', k), ('read', read), ('write', write), ('log_decay', log_decay)):
        if x.shape != q.shape:
            raise ValueError(
                f'dplr: {name} is [B, T, H, K] as q is, {list(q.shape)}, not {list(x.shape)}.'
            )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f'dplr: v is [B, T, H, V] with the B, T and H of q {list(q.shape)}, not '
            f'{list(v.shape)}.'
        )
    state = (q.shape[0], *q.shape[2:], v.shape[3])
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(
            f'dplr: initial_state is [B, H, K, V] = {list(state)}, not {list(initial_state.shape)}.'
        )
    check_segments('dplr', segment_ids, q.shape[:2])
    if chunk < 1:
        raise ValueError(f'dplr: chunk must be at least 1, got {chunk}.')


def prepare(
    q, k, v, read, write, log_decay, scale, initial_state, segment_ids, *, widen: bool
) -> Problem:
    """Returns the inputs in one form; padding neither reads, decays nor writes.

    Args:
      q, k, v, read, write, log_decay, scale, initial_state, segment_ids: as `dplr` takes them.
      widen: q, k, v, read and write too become float32, before q is scaled.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    arrays = [x.astype(wide) for x in (q, k, v, read, write)] if widen else [q, k, v]
    if not widen:
        arrays += [x.astype(q.dtype) for x in (read, write)]
    if scale is not None:
        arrays[0] = arrays[0] * jnp.asarray(scale, arrays[0].dtype)
    arrays.append(log_decay.astype(wide))
    documents = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        documents = jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)
        real = (segment_ids != 0)[..., None, None]
        arrays = [jnp.where(real, x, 0) for x in arrays]
    if initial_state is None:
        initial_state = jnp.zeros((q.shape[0], *q.shape[2:], v.shape[3]), wide)
    q, k, v, read, write, log_decay = arrays
    state = initial_state.astype(wide)
    return Problem(q, k, v, read, write, log_decay, documents, state)


def with_documents(problem: Problem) -> jax.Array:
    """Returns the log-decays [B, T, H, K], infinite where a document begins."""
    if problem.documents is None:
        return problem.log_decay
    first = spread(first_tokens(problem.documents), problem.log_decay)
    return jnp.where(first, -jnp.inf, problem.log_decay)
