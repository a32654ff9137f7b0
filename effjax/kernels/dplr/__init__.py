"""Recurrences with a diagonal plus a product of rank one as transition: RWKV-7 and such.

Implementations: 'pallas_tpu', 'pallas_gpu' (kernels), 'xla' (chunks, anywhere), 'reference' (the
token loop).
"""

from effjax.kernels.dplr.op import dplr

__all__ = ['dplr']
