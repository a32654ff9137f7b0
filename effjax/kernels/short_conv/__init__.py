"""Short causal convolution, a filter of K taps for each channel, over packed documents.

Implementations, best first: 'xla' (K shifted products, anywhere), 'reference' (token loop).
"""

from effjax.kernels.short_conv.op import short_conv

__all__ = ['short_conv']
