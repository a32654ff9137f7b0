"""The diagonal recurrence in plain jax: chunks side by side, or on GPUs a parallel prefix.

In chunks the tokens of one are gone through in turn, those of all chunks at once: first from a
state of 0 for what each chunk does to a state (the product of its decays, and what it leaves
behind), then, when a scan over the chunks has told where each begins, once more for the result. A
row of T tokens takes about 2 C + T / C steps in turn instead of T, and nothing larger than the
inputs is made. On a GPU each step in turn is a kernel of its own; `jax.lax.associative_scan`, with
some 2 log T steps, took a third to a fifth of the time on an H200.

The backward pass is the same recurrence the other way round: `g_t = dh_t + a_{t+1} g_{t+1}` is the
gradient of x_t, and `g_t h_{t-1}` that of a_t, so that only h and the decays are kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from effjax.kernels import choice


def form() -> str:
    """Returns how it runs on the platform traced for: 'prefix' or 'chunks'."""
    return 'prefix' if choice.platform() == 'gpu' else 'chunks'


def scan(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """(h, last state) of decays and x [B, T, ...] and a state [B, ...], all of one dtype."""
    if form() == 'prefix':
        h = jax.vmap(lambda *row: time_first(*row, reverse, None))(decay, x, state)
    else:
        h = time_first(jnp.moveaxis(decay, 1, 0), jnp.moveaxis(x, 1, 0), state, reverse, chunk)
        h = jnp.moveaxis(h, 0, 1)
    h = checkpoint_name(h, 'diagonal_scan_out')
    return h, h[:, 0 if reverse else -1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def time_first(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int | None
) -> jax.Array:
    """Returns h [T, ...] of decays and x [T, ...] and a state [...]; chunk None: as a prefix."""
    return _run(decay, x, state, reverse, chunk)


def _forward(decay, x, state, reverse, chunk):
    h = _run(decay, x, state, reverse, chunk)
    return h, (decay, h, state)


def _backward(reverse, chunk, kept, dh):
    decay, h, state = kept
    nothing = jnp.zeros_like(state)
    later = _shift(decay, nothing, not reverse)
    g = time_first(later, dh, nothing, not reverse, chunk)
    first = -1 if reverse else 0
    return g * _shift(h, state, reverse), g, decay[first] * g[first]


time_first.defvjp(_forward, _backward)


def _shift(x: jax.Array, first: jax.Array, reverse: bool) -> jax.Array:
    """What stood before each token in the scan's direction."""
    if reverse:
        return jnp.concatenate([x[1:], first[None]])
    return jnp.concatenate([first[None], x[:-1]])


def _run(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int | None
) -> jax.Array:
    if chunk is None:
        return _prefix(decay, x, state, reverse)
    return _chunks(decay, x, state, reverse, chunk)


def _prefix(decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    def follow(before: Any, after: Any) -> Any:
        return before[0] * after[0], after[0] * before[1] + after[1]

    # What the first token comes to from the state is as if written.
    if reverse:
        x = jnp.concatenate([x[:-1], x[-1:] + decay[-1:] * state])
    else:
        x = jnp.concatenate([x[:1] + decay[:1] * state, x[1:]])
    return jax.lax.associative_scan(follow, (decay, x), reverse=reverse)[1]


def _chunks(
    decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool, chunk: int
) -> jax.Array:
    length = x.shape[0]
    if length <= chunk or chunk == 1:
        return _tokens(decay, x, state, reverse)
    n = -(-length // chunk)

    def split(a: jax.Array, fill: int) -> jax.Array:  # [T, ...] -> [C, N, ...]
        ends = [(0, n * chunk - length)] + [(0, 0)] * (a.ndim - 1)
        a = jnp.pad(a, ends, constant_values=fill)
        return jnp.swapaxes(a.reshape(n, chunk, *a.shape[1:]), 0, 1)

    decays, xs = split(decay, 1), split(x, 0)

    def token(carry: tuple[jax.Array, jax.Array], at: tuple[jax.Array, jax.Array]):
        return (at[0] * carry[0], at[0] * carry[1] + at[1]), None

    nothing = jnp.zeros_like(xs[0])
    (whole, left), _ = jax.lax.scan(
        token, (jnp.ones_like(nothing), nothing), (decays, xs), reverse=reverse
    )
    ends = _chunks(whole, left, state, reverse, chunk)
    h = _tokens(decays, xs, _shift(ends, state, reverse), reverse)
    return jnp.swapaxes(h, 0, 1).reshape(n * chunk, *x.shape[1:])[:length]


def _tokens(decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    def token(h: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        h = at[0] * h + at[1]
        return h, h

    return jax.lax.scan(token, state, (decay, x), reverse=reverse)[1]
