"""The public function: checks the call, picks an implementation, runs it."""

import jax
import jax.numpy as jnp

from effjax.kernels import choice
from effjax.kernels.grouped_product import hopper, reference, tokamax, xla

_IMPLEMENTATIONS = {
    'xla': xla, 'pallas_gpu': hopper, 'tokamax': tokamax, 'reference': reference,
}  # fmt: skip


def grouped_product(
    x_MK: jax.Array,
    w_EKN: jax.Array,
    sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Product of each row with the matrix of its group, the rows standing sorted by group.

    What a mixture of experts without dropped tokens computes (MegaBlocks, arXiv 2211.15841). Sums
    are float32 (float64 for float64). Rows behind the groups, from `sum(sizes_E)` on, are never
    read; their outputs and gradients are 0.

    Args:
      x_MK: rows [M, K], the first `sizes_E[0]` of them of group 0, and so on.
      w_EKN: a matrix for each group [E, K, N], in the dtype of x.
      sizes_E: integers [E], rows of each group, 0 or more; together at most M.
      implementation: 'xla', 'pallas_gpu' (Hopper), 'tokamax' (effjax[tokamax]), 'reference', or
        None for the best that can run; 'pallas_gpu' and 'tokamax' run by their names only until
        they have been measured.

    Returns:
      [M, N] in the dtype of x.

    Raises:
      ValueError: shapes or dtypes that do not fit, an implementation that is unknown or cannot run
        here.
    """
    _check(x_MK, w_EKN, sizes_E)
    chosen = choice.pick(
        'grouped_product',
        implementation,
        {
            'xla': None,
            'pallas_gpu': hopper.refuse(x_MK, w_EKN),
            'tokamax': tokamax.refuse(x_MK),
            'reference': None,
        },
        {'xla': xla.form()},
        shape=(*x_MK.shape, w_EKN.shape[2]),
        groups=w_EKN.shape[0],
        dtype=x_MK.dtype.name,
    )
    with jax.named_scope(f'grouped_product_{chosen}'):
        sizes_E = jnp.asarray(sizes_E, jnp.int32)
        return _IMPLEMENTATIONS[chosen].product(x_MK, w_EKN, sizes_E)


def _check(x: jax.Array, w: jax.Array, sizes: jax.Array) -> None:
    if x.ndim != 2 or w.ndim != 3 or w.shape[1] != x.shape[1] or not w.shape[0]:
        raise ValueError(
            'grouped_product takes rows [M, K] and matrices [E, K, N] of the same K, E >= 1, not '
            f'{list(x.shape)} and {list(w.shape)}.'
        )
    if sizes.shape != w.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f'grouped_product: sizes are integers, one for each of {w.shape[0]} groups, not '
            f'{sizes.dtype} {list(sizes.shape)}.'
        )
    if x.dtype != w.dtype:
        raise ValueError(f'grouped_product: rows are {x.dtype}, matrices {w.dtype}; cast one.')
