"""Softmax attention: `softmax(cap(scale q k^T) + mask) v`, with grouped key-value heads.

Implementations, in the order of trying: 'cudnn' (NVIDIA GPU, 16 bits), 'splash' (TPU), 'xla'
(anywhere), 'pallas_gpu' (Hopper GPU, bfloat16, also sparse masks; by its name only), 'reference'
(dense truth in float32).
"""

from effjax.kernels.attention.mask import MaskSpec
from effjax.kernels.attention.op import attention, save_attention

__all__ = ['MaskSpec', 'attention', 'save_attention']
