"""Softmax attention: `softmax(cap(scale q k^T) + mask) v`, with grouped key-value heads.

Implementations, best first: 'cudnn' (NVIDIA GPU, 16 bits), 'pallas_gpu' (Hopper GPU, bfloat16, also
sparse masks), 'splash' (TPU), 'xla' (anywhere), 'reference' (dense truth in float32).
"""

from effjax.kernels.attention.mask import MaskSpec
from effjax.kernels.attention.op import attention, save_attention

__all__ = ['MaskSpec', 'attention', 'save_attention']
