"""Products of sorted rows with a matrix for each group of them: a mixture of experts without drops.

Implementations: 'xla' (`lax.ragged_dot` on TPUs, else a loop over blocks of rows), 'pallas_gpu'
(Hopper) and 'tokamax', both by their names only, 'reference' (each group's matrix times all rows).
"""

from effjax.kernels.grouped_product.op import grouped_product

__all__ = ['grouped_product']
