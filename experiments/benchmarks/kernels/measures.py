"""How far results lie from the right ones, as a whole and by row, and whether bits are equal."""

from typing import Any

import jax
import jax.numpy as jnp


def compare(first: dict[str, Any], again: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    """Returns numbers on each result, to be compiled as one program.

    Args:
      first: results of a call, by name.
      again: those of another call on the same inputs.
      right: what they should be.

    Returns:
      By name: 'error', |a - b| / |b| of all elements in norm; 'row', the largest of any row, over
      the last dimension, relative to the row or to an average row, whichever is larger;
      'not_finite', elements; 'truth_finite'; and 'same', whether both calls gave the same bits.
    """
    return {name: _measured(x, again[name], right[name]) for name, x in first.items()}


def _measured(a: jax.Array, again: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
    same = jnp.all(_bits(a) == _bits(again))
    a, b = _rows(a), _rows(b)
    off, size = (jnp.linalg.norm(x, axis=1) for x in (a - b, b))
    whole, average = jnp.linalg.norm(size), jnp.sqrt(jnp.mean(size**2))
    return {
        'error': _share(jnp.linalg.norm(off), whole),
        'row': jnp.max(_share(off, jnp.maximum(size, average))),
        'not_finite': jnp.sum(~jnp.isfinite(a)),
        'truth_finite': jnp.all(jnp.isfinite(b)),
        'same': same,
    }


def _share(off: jax.Array, size: jax.Array) -> jax.Array:
    """off / size, where nothing of nothing is 0, and what is not a number infinitely far."""
    share = jnp.where(off == 0, 0.0, off / size)
    return jnp.where(jnp.isnan(share), jnp.inf, share)


def _rows(x: jax.Array) -> jax.Array:
    """A float32 matrix; of a complex number both parts."""
    if jnp.iscomplexobj(x):
        x = jnp.concatenate([x.real, x.imag], axis=-1)
    x = x.astype(jnp.float32)
    return x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)


def _bits(x: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(x):
        x = jnp.concatenate([x.real, x.imag], axis=-1)
    return jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
