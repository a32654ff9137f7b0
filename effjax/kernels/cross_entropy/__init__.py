"""Head product and softmax cross-entropy in one operation, without the full float32 logits.

Beside it the divergence of one head's distributions from another's, for distillation.
Implementations: 'chunked' (anywhere; gradients computed in the forward pass of differentiation,
so that no logits are kept or computed twice), 'reference' (full logits, automatic
differentiation).
"""

from effjax.kernels.cross_entropy.op import Head, linear_cross_entropy, linear_divergence
from effjax.kernels.cross_entropy.reference import row_divergences

__all__ = ['Head', 'linear_cross_entropy', 'linear_divergence', 'row_divergences']
