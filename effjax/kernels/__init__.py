"""Pure functions on arrays: one folder an operation, one public function each.

Contract of an operation `kernels/<op>/`:
  `reference.py`: the plain truth in float32 or float64, never fast;
  `xla.py`: differentiable, runs anywhere;
  files for devices (`cudnn.py`, `splash.py`, ...): what runs on one kind of accelerator;
  `cost.py`: FLOPs as plain Python, by the convention of `core.cost`;
  one public function, whose `implementation=None` picks the best one that supports the inputs.
Which one ran, and why the others were refused, is in `last_choice()`; naming one that cannot run
raises. Kernels import jax and numpy only, know no mesh, and name their residuals with
`checkpoint_name` for rematerialisation policies.
"""

from effjax.kernels.attention import MaskSpec, attention, save_attention
from effjax.kernels.choice import choices, last_choice, target
from effjax.kernels.cross_entropy import (
    Head,
    linear_cross_entropy,
    linear_divergence,
    row_divergences,
)
from effjax.kernels.delta_rule import delta_rule
from effjax.kernels.diagonal_scan import diagonal_scan
from effjax.kernels.dplr import dplr
from effjax.kernels.fft_conv import fft_conv
from effjax.kernels.grouped_product import grouped_product
from effjax.kernels.labelled_attention import Others, labelled_attention
from effjax.kernels.linear_recurrence import linear_recurrence
from effjax.kernels.lsh_attention import lsh_attention, lsh_buckets
from effjax.kernels.selective_scan import selective_scan
from effjax.kernels.short_conv import short_conv
from effjax.kernels.wkv import wkv

__all__ = [
    'Head',
    'MaskSpec',
    'Others',
    'attention',
    'choices',
    'delta_rule',
    'diagonal_scan',
    'dplr',
    'fft_conv',
    'grouped_product',
    'labelled_attention',
    'last_choice',
    'linear_cross_entropy',
    'linear_divergence',
    'linear_recurrence',
    'lsh_attention',
    'lsh_buckets',
    'row_divergences',
    'save_attention',
    'selective_scan',
    'short_conv',
    'target',
    'wkv',
]
