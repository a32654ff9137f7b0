"""Attention within chunks of tokens that were sorted by a hash, queries being their own keys.

Implementations: 'xla' (sorted chunks, anywhere), 'reference' (the whole score matrix).
"""

from effjax.kernels.lsh_attention.op import lsh_attention, lsh_buckets

__all__ = ['lsh_attention', 'lsh_buckets']
