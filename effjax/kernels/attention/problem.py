"""The inputs of one attention call, checked, with what is static about them kept apart."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from effjax.kernels.attention.mask import MaskSpec


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static about a call; every implementation decides by this.

    Attributes:
      shape: (B, T, S, H, G, D): batch, queries, keys, heads, key-value heads, head dimension.
      dtype: name of the inputs' dtype.
      mask: 'causal', 'full', 'array' or 'sparse'.
      window: sliding window of a causal mask, or None.
      segments: documents are told apart by ids.
      shared_segments: queries and keys are the same tokens with the same ids.
      positions: order is given by arrays instead of by index.
      scale: factor on the scores.
      soft_cap: scores become cap * tanh(score / cap), or None.
      dropout: rate at which attention weights are dropped.
      spec: the mask in words, where it is 'sparse'.
      packed: positions, where a sparse mask has them, are places in documents that are packed into
        rows: they step by one from token to token.
    """

    shape: tuple[int, int, int, int, int, int]
    dtype: str
    mask: str
    window: int | None
    segments: bool
    shared_segments: bool
    positions: bool
    scale: float
    soft_cap: float | None
    dropout: float
    spec: MaskSpec | None = None
    packed: bool = False

    @property
    def may_be_empty(self) -> bool:
        """True where some query may see no key at all, so that its output must be made 0."""
        other_ids = self.segments and not self.shared_segments
        return self.mask == 'array' or self.positions or other_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extras:
    """The arrays of a call beside q, k and v; each may be None.

    Attributes:
      q_segments: int32 [B, T], 0 is padding.
      kv_segments: int32 [B, S].
      q_positions: int32 [B, T].
      kv_positions: int32 [B, S].
      mask: bool [T, S], True where a query may attend.
      lengths: int32 [B, T], tokens of each query's document, where a sparse mask needs them.
      rng: PRNG key for dropout.
    """

    q_segments: jax.Array | None = None
    kv_segments: jax.Array | None = None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    mask: jax.Array | None = None
    lengths: jax.Array | None = None
    rng: jax.Array | None = None


def dense(
    attend: Callable[..., jax.Array],
    problem: Problem,
    mask: jax.Array | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Runs a function of the arguments of `jax.nn.dot_product_attention`.

    Args:
      attend: the function; a query that may see no key gives whatever it likes.
      problem: the call.
      mask: bool [B or 1, 1, T, S], beside the problem's causal mask, or None.
      q, k, v: queries, keys and values.

    Returns:
      [B, T, H, D], 0 where a query sees nothing.
    """
    o = attend(
        q,
        k,
        v,
        mask=mask,
        scale=problem.scale,
        is_causal=problem.mask == 'causal',
        local_window_size=None if problem.window is None else (problem.window - 1, 0),
    )
    if mask is not None and problem.may_be_empty:
        o = jnp.where(mask.any(-1)[:, 0, :, None, None], o, 0)
    return o


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[int, int, int, int, int, int]:
    """Returns (B, T, S, H, G, D).

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f'attention takes q [B,T,H,D] and k, v [B,S,G,D], got {q.shape}, {k.shape}, {v.shape}.'
        )
    batch, q_len, heads, head_dim = q.shape
    _, kv_len, kv_heads, _ = k.shape
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f'attention: q {q.shape} and k {k.shape} differ in batch or head size.')
    if heads % kv_heads:
        raise ValueError(f'attention: {heads} heads are no multiple of {kv_heads} key-value heads.')
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f'attention: dtypes differ: {q.dtype}, {k.dtype}, {v.dtype}.')
    return batch, q_len, kv_len, heads, kv_heads, head_dim


def check_ids(name: str, ids: jax.Array | None, shape: tuple[int, int]) -> None:
    """Raises ValueError unless `ids` is None or an integer array of the shape."""
    if ids is not None and (ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer)):
        raise ValueError(f'attention: {name} is integer {shape}, not {ids.dtype} {ids.shape}.')


def often(
    problem: Problem, extras: Extras, q_index: jax.Array, kv_index: jax.Array
) -> jax.Array | None:
    """Returns what to add to the scores [..., T, S] for pairs that count often, or None."""
    if problem.spec is None or not problem.spec.branches:
        return None
    if problem.positions:
        assert extras.q_positions is not None and extras.kv_positions is not None
        q_index, kv_index = extras.q_positions, extras.kv_positions
    length = problem.shape[2] if extras.lengths is None else extras.lengths[..., :, None]
    count = problem.spec.count(q_index[..., :, None], kv_index[..., None, :], length)
    return jnp.log(jnp.maximum(count, 1).astype(jnp.float32))


def allowed(
    problem: Problem,
    extras: Extras,
    q_index: jax.Array,
    kv_index: jax.Array,
) -> jax.Array | None:
    """Returns which pairs may attend, bool [..., T, S], or None where all may.

    Segment ids are compared as they are: padding (0) sees padding, which keeps every row finite;
    the caller sets the output of padding to 0.

    Args:
      problem: the call.
      extras: its arrays, whose last dimension goes with the indices (leading ones broadcast).
      q_index: int32 [..., T], each query's place in order, unless `extras` has positions.
      kv_index: int32 [..., S].
    """
    out = None
    if problem.positions:
        assert extras.q_positions is not None and extras.kv_positions is not None
        q_index, kv_index = extras.q_positions, extras.kv_positions
    if problem.mask == 'causal':
        rows, columns = q_index[..., :, None], kv_index[..., None, :]
        out = columns <= rows
        if problem.window is not None:
            out &= columns > rows - problem.window
    if problem.mask == 'sparse':
        assert problem.spec is not None
        length = problem.shape[2] if extras.lengths is None else extras.lengths[..., :, None]
        out = problem.spec.allowed(q_index[..., :, None], kv_index[..., None, :], length)
    if problem.mask == 'array':
        out = extras.mask
    if problem.segments:
        assert extras.q_segments is not None and extras.kv_segments is not None
        same = extras.q_segments[..., :, None] == extras.kv_segments[..., None, :]
        out = same if out is None else out & same
    return out
