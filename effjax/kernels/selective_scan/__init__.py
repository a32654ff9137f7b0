"""Mamba's selective scan: a diagonal state space whose step, input and output maps vary by token.

Implementations, best first: 'pallas_tpu' (kernels for TPUs), 'xla' (chunk by chunk, anywhere),
'reference' (token loop); 'pallas_gpu', the kernels for Hopper GPUs, by its name only.
"""

from effjax.kernels.selective_scan.op import selective_scan

__all__ = ['selective_scan']
