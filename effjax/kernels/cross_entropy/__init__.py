"""Head product and softmax cross-entropy in one operation, without the full float32 logits.

Implementations: 'chunked' (anywhere; gradients computed in the forward pass of differentiation,
so that no logits are kept or computed twice), 'reference' (full logits, automatic
differentiation).
"""

from effjax.kernels.cross_entropy.op import linear_cross_entropy

__all__ = ['linear_cross_entropy']
