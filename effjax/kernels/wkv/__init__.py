"""RWKV-4's weighted average: exponential weights of keys that decay, exact for keys of any size.

Implementations: 'xla' (a parallel scan, anywhere), 'reference' (the token loop).
"""

from effjax.kernels.wkv.op import wkv

__all__ = ['wkv']
