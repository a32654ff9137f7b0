"""The delta rule: a linear recurrence that replaces what a key holds instead of adding to it.

Implementations: 'xla' (chunks, anywhere), 'reference' (the token loop).
"""

from effjax.kernels.delta_rule.op import delta_rule

__all__ = ['delta_rule']
