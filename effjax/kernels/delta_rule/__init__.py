"""The delta rule: a linear recurrence that replaces what a key holds instead of adding to it.

Implementations: 'pallas_tpu' (chunks on TPUs), 'xla' (chunks, anywhere), 'pallas_gpu' (chunks on
Hopper GPUs, by its name only), 'reference' (the token loop).
"""

from effjax.kernels.delta_rule.op import delta_rule

__all__ = ['delta_rule']
