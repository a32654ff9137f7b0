"""The inputs of one linear recurrence, checked and brought into one form."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.kernels.documents import begins, check_segments, spread


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs with padding made harmless; H is a multiple of G.

    Attributes:
      q: queries [B, T, G, K], scaled, in their own dtype.
      k: keys [B, T, G, K].
      v: values [B, T, H, V].
      log_decay: float32 (float64) [B, T, H] or [B, T, H, K], or with 1 for B; None decays nothing.
      bonus: [H, K] or None, in the dtype of `state`.
      documents: int32 [B, T], number of each token's document in its row, or None.
      state: [B, H, K, V] float32 (float64), what came before the first document.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    bonus: jax.Array | None
    documents: jax.Array | None
    state: jax.Array

    @property
    def vector(self) -> bool:
        """True where each key dimension decays by itself."""
        return self.log_decay is not None and self.log_decay.ndim == 4

    def with_heads(self) -> 'Problem':
        """Returns the same problem with queries and keys repeated for every head."""
        repeat = self.v.shape[2] // self.q.shape[2]
        if repeat == 1:
            return self
        q, k = (jnp.repeat(x, repeat, axis=2) for x in (self.q, self.k))
        return dataclasses.replace(self, q=q, k=k)


def decay_kind(log_decay: jax.Array | None) -> str:
    """Returns 'none', 'head', 'scalar' or 'vector'."""
    if log_decay is None:
        return 'none'
    return {1: 'head', 3: 'scalar', 4: 'vector'}.get(log_decay.ndim, 'wrong')


def check(q, k, v, log_decay, bonus, initial_state, segment_ids, chunk) -> None:
    """Checks shapes and dtypes.

    Raises:
      ValueError: what does not fit, in one sentence.
    """
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(
            f'linear_recurrence: q and k are both [B, T, H, K], not {list(q.shape)} and '
            f'{list(k.shape)}.'
        )
    fits = v.ndim == 4 and v.shape[:2] == q.shape[:2] and not v.shape[2] % q.shape[2]
    if not fits:
        raise ValueError(
            f'linear_recurrence: v is [B, T, H, V] with the B and T of q {list(q.shape)} and its '
            f'heads or a multiple of them, not {list(v.shape)}.'
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f'linear_recurrence: dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}.')
    (batch, length, _, key_dim), (*_, heads, value_dim) = q.shape, v.shape
    decays = ((heads,), (batch, length, heads), (batch, length, heads, key_dim))
    if log_decay is not None and log_decay.shape not in decays:
        raise ValueError(
            f'linear_recurrence: log_decay is [H], [B, T, H] or [B, T, H, K] = {list(decays[2])}, '
            f'not {list(log_decay.shape)}.'
        )
    for name, array, letters, shape in (
        ('bonus', bonus, '[H, K]', (heads, key_dim)),
        ('initial_state', initial_state, '[B, H, K, V]', (batch, heads, key_dim, value_dim)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(
                f'linear_recurrence: {name} is {letters} = {list(shape)}, not {list(array.shape)}.'
            )
    check_segments('linear_recurrence', segment_ids, (batch, length))
    if chunk < 1:
        raise ValueError(f'linear_recurrence: chunk must be at least 1, got {chunk}.')


def prepare(q, k, v, log_decay, bonus, scale, initial_state, segment_ids) -> Problem:
    """Returns the inputs in one form; padding neither reads, decays nor writes."""
    wide: Any = jnp.promote_types(q.dtype, jnp.float32)
    if scale is not None:
        q = q * jnp.asarray(scale, q.dtype)
    if log_decay is not None:
        log_decay = jnp.asarray(log_decay, wide)
        if log_decay.ndim == 1:
            log_decay = jnp.broadcast_to(log_decay, (1, q.shape[1], *log_decay.shape))
    documents = None
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        documents = jnp.cumsum(begins(segment_ids), axis=1, dtype=jnp.int32)
        real = segment_ids != 0
        q, k, v = (jnp.where(spread(real, x), x, 0) for x in (q, k, v))
        if log_decay is not None:
            log_decay = jnp.where(spread(real, log_decay), log_decay, 0)
    if initial_state is None:
        heads, value_dim = v.shape[2:]
        initial_state = jnp.zeros((q.shape[0], heads, q.shape[3], value_dim), wide)
    bonus = None if bonus is None else jnp.asarray(bonus, wide)
    return Problem(q, k, v, log_decay, bonus, documents, jnp.asarray(initial_state, wide))


def first_tokens(documents_BT: jax.Array) -> jax.Array:
    """Returns bool [B, T]: tokens that begin a document, from the documents' numbers."""
    return jnp.diff(documents_BT, axis=1, prepend=0) != 0


def with_documents(problem: Problem) -> jax.Array | None:
    """Returns the log-decays, infinite where a document begins."""
    log_decay = problem.log_decay
    if problem.documents is None:
        return log_decay
    if log_decay is None:
        log_decay = jnp.zeros(problem.v.shape[:3], problem.state.dtype)
    return jnp.where(spread(first_tokens(problem.documents), log_decay), -jnp.inf, log_decay)
