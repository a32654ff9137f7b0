"""Mamba's selective scan: a diagonal state space whose step, input and output maps vary by token.

Implementations, best first: 'pallas_tpu' and 'pallas_gpu' (kernels for TPUs and Hopper GPUs), 'xla'
(chunk by chunk, anywhere), 'reference' (token loop).
"""

from effjax.kernels.selective_scan.op import selective_scan

__all__ = ['selective_scan']
