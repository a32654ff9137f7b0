"""Causal convolution with filters as long as the sequence, by Fourier transform.

Implementations: 'xla' (transforms, anywhere), 'reference' (the direct sum).
"""

from effjax.kernels.fft_conv.op import fft_conv

__all__ = ['fft_conv']
