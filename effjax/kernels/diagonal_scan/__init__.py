"""Elementwise linear recurrences, `h_t = a_t h_{t-1} + x_t`, real or complex, in either direction.

Implementations, best first: 'pallas_tpu' (kernels that go over memory once a pass), 'xla' (chunks
side by side, anywhere), 'reference' (token loop); 'pallas_gpu', the kernels for Hopper GPUs, by its
name only.
"""

from effjax.kernels.diagonal_scan.op import diagonal_scan

__all__ = ['diagonal_scan']
