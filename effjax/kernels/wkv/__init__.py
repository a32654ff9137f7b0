"""RWKV-4's weighted average: exponential weights of keys that decay, exact for keys of any size.

Implementations: those of `diagonal_scan`, of which it is two; 'reference' is its own token loop.
"""

from effjax.kernels.wkv.op import wkv

__all__ = ['wkv']
