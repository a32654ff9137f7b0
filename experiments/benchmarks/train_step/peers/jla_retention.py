"""RetNet's mixer of jax-linear-attention's layers and of its kernel for one decay a head.

That package has no RetNet. Its kernels take heads of at most 128 by 128, so wider ones are cut into
tiles, which changes no value: a product over keys is a sum over tiles of keys, and each channel of
the values is read by itself.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jla import ops
from jla.layers.lean import apply_lean
from jla.layers.linear import Linear
from jla.layers.norm import GatedRMSNorm
from jla.layers.rope import apply_rope

from experiments.benchmarks.train_step.shapes import Shape

TILE = 128  # channels of a head's keys or values that the kernels take at most


def implementation() -> str:
    """On a GPU its kernels or an error, never the slow form unsaid; elsewhere whatever it has."""
    return 'mosaic_gpu' if jax.default_backend() == 'gpu' else 'auto'


class Retention(eqx.Module):
    """Multi-scale retention (arXiv 2307.08621): values twice as wide as keys, gated norm."""

    query: Linear
    key: Linear
    value: Linear
    gate: Linear
    norm: GatedRMSNorm
    out: Linear
    heads: int = eqx.field(static=True)

    def __init__(self, shape: Shape, key: jax.Array):
        keys = iter(jax.random.split(key, 5))
        inner = shape.heads * shape.head_dim

        def linear(inputs: int, outputs: int, *axes: str) -> Linear:
            return Linear(inputs, outputs, key=next(keys), axes=axes, std=0.02)

        self.query = linear(shape.width, inner, 'embed', 'heads')
        self.key = linear(shape.width, inner, 'embed', 'heads')
        self.value = linear(shape.width, 2 * inner, 'embed', 'heads')
        self.gate = linear(shape.width, 2 * inner, 'embed', 'heads')
        self.norm = apply_lean(GatedRMSNorm(2 * shape.head_dim))
        self.out = linear(2 * inner, shape.width, 'heads', 'embed')
        self.heads = shape.heads

    def __call__(self, x_BTD: jax.Array, segment_ids: None = None) -> jax.Array:
        rows = x_BTD.shape[:2]
        projections = (self.query, self.key, self.value, self.gate)
        q, k, v, gate = (p(x_BTD).reshape(*rows, self.heads, -1) for p in projections)
        positions = jnp.broadcast_to(jnp.arange(rows[1]), rows)
        q, k = (apply_rope(a, positions, theta=1e4) for a in (q, k))
        return self.out(self.norm(retain(q, k, v), gate).reshape(*rows, -1))


def retain(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHV: jax.Array, tile: int = TILE) -> jax.Array:
    """Retention by jla's kernel; returns `[B, T, H, V]`.

    A tile of keys is a head of queries and keys, shared by as many heads of values as there are
    tiles of values; what the tiles of keys give is added.
    """
    batch, length, heads, key = q_BTHK.shape
    value = v_BTHV.shape[-1]
    k_tile, v_tile = min(tile, key), min(tile, value)
    across, down = key // k_tile, value // v_tile
    q, k = (a.reshape(batch, length, heads * across, k_tile) for a in (q_BTHK, k_BTHK))
    v = v_BTHV.reshape(batch, length, heads, 1, down, v_tile)
    v = jnp.broadcast_to(v, (batch, length, heads, across, down, v_tile))
    decay = np.repeat(np.log1p(-(2.0 ** (-5 - np.arange(heads)))), across * down)
    o, _ = ops.linear_attention(
        'simple_gla',
        q,
        k,
        v.reshape(batch, length, -1, v_tile),
        g=jnp.broadcast_to(jnp.asarray(decay, jnp.float32), (batch, length, len(decay))),
        impl=implementation(),
        scale=key**-0.5,
    )
    o = o.reshape(batch, length, heads, across, value)
    return o.astype(jnp.float32).sum(3).astype(v.dtype)
