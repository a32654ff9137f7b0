"""Documents of a row, as recurrences need them: where one begins, which token is the last.

An initial state belongs to the document of a row's first real token; whoever calls sets it to 0
where another document begins there. Padding (id 0) may stand anywhere between documents.
"""

import jax
import jax.numpy as jnp


def begins(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns bool [B, T]: real tokens whose document is not that of the real token before.

    A row's first real token begins nothing: it goes on from the initial state.
    """
    real = segment_ids_BT != 0
    place = jnp.where(real, jnp.arange(segment_ids_BT.shape[1]), -1)
    last = jax.lax.cummax(place, axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    id_before = jnp.take_along_axis(segment_ids_BT, jnp.maximum(before, 0), axis=1)
    return real & (before >= 0) & (id_before != segment_ids_BT)


def last_real(segment_ids_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns whether a row has a token that is no padding, and where its last one stands."""
    place = jnp.arange(segment_ids_BT.shape[1])
    last = jnp.max(jnp.where(segment_ids_BT != 0, place, -1), axis=1)
    return last >= 0, jnp.maximum(last, 0)


def check_segments(op: str, segment_ids: jax.Array | None, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the ids are None or an integer array of the shape [B, T]."""
    if segment_ids is None:
        return
    integers = jnp.issubdtype(segment_ids.dtype, jnp.integer)
    if segment_ids.shape != shape or not integers:
        raise ValueError(
            f'{op}: segment_ids are integers {shape}, not {segment_ids.dtype} {segment_ids.shape}.'
        )


def spread(mask_BT: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a mask [B, T] with dimensions of 1 behind it, to go with `like` [B, T, ...]."""
    return mask_BT.reshape(*mask_BT.shape, *[1] * (like.ndim - 2))
