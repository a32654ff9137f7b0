"""Linear recurrences `S_t = a_t S_{t-1} + k_t v_t^T`, `o_t = q_t S_t`: linear attention and such.

Implementations, best first: 'pallas_tpu' (Mosaic kernels), 'pallas_gpu' (Mosaic kernels for Hopper
GPUs), 'xla' (chunks, anywhere), 'reference' (the token loop).
"""

from effjax.kernels.linear_recurrence.op import linear_recurrence

__all__ = ['linear_recurrence']
