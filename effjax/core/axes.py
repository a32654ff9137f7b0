"""Logical axis names: what sharding, decay masks, growth and converters read instead of shapes.

Every parameter is an `nnx.Param` made by `param`, whose metadata holds
  `axes`: one name for each dimension, from `AXES`;
  `no_decay`: weight decay skips it;
  `keep_fp32`: it stays in float32 whatever the compute dtype;
  `lr_scale`: its learning rate is multiplied by this.
Stacked layers get `layers` in front. The metadata key is our own `axes`, not flax's
`out_sharding`: flax would shard eagerly and refuse to build without a mesh, while effjax resolves
names to mesh axes itself (`parallel.rules`) and initialises under one jit with out-shardings.
"""

from typing import Any

import jax
from flax import nnx

AXES = (
    'layers',  # stacked repeats of a block
    'embed',  # model width
    'heads',
    'kv_heads',
    'head_dim',
    'mlp',  # feed-forward hidden width
    'vocab',
    'position',  # learned positions
    'expert',
    'state',  # recurrent state
    'conv',  # convolution taps
    'rank',  # inner dimension of a product of two small matrices
    'patch',  # pixels of a patch
    'classes',
)


class Buffer(nnx.Variable):
    """Saved, not trained by gradient: a router's load bias, a token-loss table, an amax history."""


def param(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    no_decay: bool = False,
    keep_fp32: bool = False,
    lr_scale: float = 1.0,
) -> nnx.Param:
    """Returns an `nnx.Param` with a logical name for each dimension.

    Raises:
      ValueError: not as many names as dimensions, or an unknown name.
    """
    if len(axes) != value.ndim:
        raise ValueError(f'{len(axes)} axis names {axes} for an array of shape {value.shape}.')
    for name in axes:
        if name is not None and name not in AXES:
            raise ValueError(f'unknown axis name {name!r}; known: {", ".join(AXES)}.')
    return nnx.Param(
        value, axes=tuple(axes), no_decay=no_decay, keep_fp32=keep_fp32, lr_scale=float(lr_scale)
    )


def metadata(state: nnx.State) -> dict[str, Any]:
    """Returns, as a nested dict like the parameters, each leaf's metadata as a `Meta`."""
    out: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node, names = out, [str(key) for key in path]
        for key in names[:-1]:
            node = node.setdefault(key, {})
        meta = variable.get_metadata()
        node[names[-1]] = Meta(
            axes=tuple(meta['axes']),
            no_decay=bool(meta.get('no_decay', False)),
            keep_fp32=bool(meta.get('keep_fp32', False)),
            lr_scale=float(meta.get('lr_scale', 1.0)),
        )
    return out


class Meta:
    """Metadata of one parameter: `axes`, `no_decay`, `keep_fp32`, `lr_scale`. A pytree leaf."""

    __slots__ = ('axes', 'keep_fp32', 'lr_scale', 'no_decay')

    def __init__(
        self,
        axes: tuple[str | None, ...],
        no_decay: bool = False,
        keep_fp32: bool = False,
        lr_scale: float = 1.0,
    ):
        self.axes = axes
        self.no_decay = no_decay
        self.keep_fp32 = keep_fp32
        self.lr_scale = lr_scale

    @property
    def stacked(self) -> bool:
        """True where the first dimension counts layers."""
        return bool(self.axes) and self.axes[0] == 'layers'

    def __repr__(self) -> str:
        return f'Meta(axes={self.axes}, no_decay={self.no_decay}, lr_scale={self.lr_scale})'
