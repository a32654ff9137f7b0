"""The truth: the matrix of each group times all rows, of which the group's are taken."""

import jax
import jax.numpy as jnp


def product(x_MK: jax.Array, w_EKN: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns y [M, N]; see `op.grouped_product`."""
    wide = jnp.promote_types(x_MK.dtype, jnp.float32)
    ends = jnp.cumsum(sizes_E)
    row = jnp.arange(x_MK.shape[0])[:, None]
    x = jnp.where(row < ends[-1], x_MK, 0).astype(wide)

    def group(y: jax.Array, at: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        w, begin, end = at
        here = (row >= begin) & (row < end)
        return y + jnp.where(here, x @ w.astype(wide), 0), None

    zero = jnp.zeros((x_MK.shape[0], w_EKN.shape[2]), wide)
    return jax.lax.scan(group, zero, (w_EKN, ends - sizes_E, ends))[0].astype(x_MK.dtype)
