"""Recurrences with a diagonal plus a product of rank one as transition: RWKV-7 and such.

Implementations: 'xla' (chunks, anywhere), 'pallas_gpu' (Hopper kernels, by name only), 'reference'
(the token loop).
"""

from effjax.kernels.dplr.op import dplr

__all__ = ['dplr']
