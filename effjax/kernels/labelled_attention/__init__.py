"""Softmax attention whose keys carry a trained vector for each pair's label (ETC).

Implementations: 'xla' (whole, or by blocks within a radius; anywhere), 'reference' (the equation).
"""

from effjax.kernels.labelled_attention.op import labelled_attention
from effjax.kernels.labelled_attention.problem import Others

__all__ = ['Others', 'labelled_attention']
