"""Elementwise linear recurrences, `h_t = a_t h_{t-1} + x_t`, real or complex, in either direction.

Implementations, best first: 'pallas_tpu' and 'pallas_gpu' (kernels that go over memory once a pass,
for TPUs and Hopper GPUs), 'xla' (chunks side by side, on GPUs a parallel prefix), 'reference'
(token loop). Where rows and channels are too few to fill a GPU, 'xla' is taken.
"""

from effjax.kernels.diagonal_scan.op import diagonal_scan

__all__ = ['diagonal_scan']
