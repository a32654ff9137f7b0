"""Elementwise linear recurrences, `h_t = a_t h_{t-1} + x_t`, real or complex, in either direction.

Implementations, best first: 'xla' (chunks side by side, anywhere), 'reference' (token loop).
"""

from effjax.kernels.diagonal_scan.op import diagonal_scan

__all__ = ['diagonal_scan']
