"""Precision: which dtype parameters, moments and products have, and how fp16 keeps its gradients.

A kind is a function `(*, <config arguments>) -> Precision`; `build(block)` makes the one a config
names. Softmax, norm statistics, losses, log-decays and recurrent states are float32 in every kind.
"""

from effjax.precision.kinds import Precision, build
from effjax.precision.loss_scale import DynamicLossScale

PRECISIONS = {
    'bf16': 'effjax.precision.kinds:bf16',
    'bf16_params': 'effjax.precision.kinds:bf16_params',
    'fp16': 'effjax.precision.kinds:fp16',
    'fp32': 'effjax.precision.kinds:fp32',
}

__all__ = ['PRECISIONS', 'DynamicLossScale', 'Precision', 'build']
