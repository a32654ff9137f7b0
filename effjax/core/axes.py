"""Logical axis names: what sharding, decay masks, growth and converters read instead of shapes.

Every parameter is an `nnx.Param` made by `param`, whose metadata holds
  `axes`: one name for each dimension, from `AXES`;
  `no_decay`: weight decay skips it;
  `keep_fp32`: it stays in float32 whatever the compute dtype;
  `lr_scale`: its learning rate is multiplied by this;
  `role`: what it does with the units along its dimensions, from `ROLES`, for growth;
  `inputs`: which of its dimensions are summed over with what it is applied to;
  `units`: what each dimension counts, where that is not what `axes` says.
Stacked layers get `layers` in front. The metadata key is our own `axes`, not flax's
`out_sharding`: flax would shard eagerly and refuse to build without a mesh, while effjax resolves
names to mesh axes itself (`parallel.rules`) and initialises under one jit with out-shardings.
"""

import dataclasses
from collections.abc import Sequence
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


ROLES = (
    'product',  # summed over some dimensions with what it is applied to
    'bias',  # added to the result of a product
    'scale',  # multiplies what a norm has normalised
    'shift',  # added to what a norm has normalised and scaled
    'table',  # vectors that enter the residual stream: embeddings, positions, extra tokens
)

# Neighbouring dimensions that are one dimension of a product: `[embed, heads, head_dim]` is the
# matrix `[embed, heads * head_dim]`.
JOINED = frozenset({'heads', 'kv_heads', 'head_dim'})


@dataclasses.dataclass(frozen=True)
class GrowthSpec:
    """What growth may do to a part; a part without one grows in depth only.

    Attributes:
      widens: names of units of which the part may get more: it treats all of them alike, so that
        copies of units give copies of results. A subclass that tells units apart (by a decay or a
        mask of its own for each head) must not inherit this.
      outputs: paths of products inside the part; where all of them are zero, so is its result.
    """

    widens: frozenset[str] = frozenset()
    outputs: tuple[str, ...] = ()


class Buffer(nnx.Variable):
    """Saved, not trained by gradient: a router's load bias, a token-loss table, an amax history."""


def param(
    value: jax.Array,
    axes: tuple[str | None, ...],
    *,
    no_decay: bool = False,
    keep_fp32: bool = False,
    lr_scale: float = 1.0,
    role: str | None = None,
    inputs: Sequence[int] = (),
    units: Sequence[str | None] | None = None,
) -> nnx.Param:
    """Returns an `nnx.Param` with a logical name for each dimension.

    Args:
      value: the first value.
      axes: a name of `AXES` or None for each dimension, which sharding goes by.
      no_decay: weight decay skips it.
      keep_fp32: it stays in float32 whatever the compute dtype.
      lr_scale: its learning rate is multiplied by this.
      role: one of `ROLES`, or None where growth knows nothing of it but its layers.
      inputs: dimensions of a product that are summed over.
      units: what each dimension counts; None says what `axes` says. They differ where two
        dimensions count the same units, of which only one may be sharded.

    Raises:
      ValueError: not as many names as dimensions, or an unknown name.
    """
    units = tuple(axes if units is None else units)
    if len(units) != len(axes) or not (role is None or role in ROLES):
        raise ValueError(f'units {units} or role {role!r} do not fit the axes {axes}.')
    if len(axes) != value.ndim:
        raise ValueError(f'{len(axes)} axis names {axes} for an array of shape {value.shape}.')
    for name in axes:
        if name is not None and name not in AXES:
            raise ValueError(f'unknown axis name {name!r}; known: {", ".join(AXES)}.')
    return nnx.Param(
        value,
        axes=tuple(axes),
        no_decay=no_decay,
        keep_fp32=keep_fp32,
        lr_scale=float(lr_scale),
        role=role,
        inputs=tuple(i in inputs for i in range(len(axes))),
        units=units,
    )


def metadata(state: nnx.State) -> dict[str, Any]:
    """Returns, as a nested dict like the parameters, each leaf's metadata as a `Meta`."""
    out: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node, names = out, [str(key) for key in path]
        for key in names[:-1]:
            node = node.setdefault(key, {})
        meta = variable.get_metadata()
        axes = tuple(meta['axes'])
        units = meta.get('units', axes)
        stack = axes[: len(axes) - len(units)]  # put in front since the parameter was made
        node[names[-1]] = Meta(
            axes=axes,
            no_decay=bool(meta.get('no_decay', False)),
            keep_fp32=bool(meta.get('keep_fp32', False)),
            lr_scale=float(meta.get('lr_scale', 1.0)),
            role=meta.get('role'),
            inputs=(*(False for _ in stack), *meta.get('inputs', (False,) * len(units))),
            units=(*stack, *units),
        )
    return out


def stack_depth(axes: Sequence[str | None]) -> int:
    """Returns how many leading dimensions count separate parameters: `layers`, then `expert`."""
    depth = 0
    if axes and axes[0] == 'layers':
        depth = 1
    # A last `expert` is what a router's kernel or bias maps to, not a stack of experts.
    if len(axes) > depth + 1 and axes[depth] == 'expert':
        depth += 1
    return depth


def product_groups(axes: Sequence[str | None], start: int) -> tuple[tuple[int, ...], ...]:
    """Returns the dimensions from `start` on, joined where they are one dimension of a product."""
    groups: list[tuple[int, ...]] = []
    for i in range(start, len(axes)):
        if i > start and axes[i] in JOINED and axes[i - 1] in JOINED:
            groups[-1] = (*groups[-1], i)
        else:
            groups.append((i,))
    return tuple(groups)


class Meta:
    """Metadata of one parameter, as the module's docstring lists it. A pytree leaf."""

    __slots__ = ('axes', 'inputs', 'keep_fp32', 'lr_scale', 'no_decay', 'role', 'units')

    def __init__(
        self,
        axes: tuple[str | None, ...],
        no_decay: bool = False,
        keep_fp32: bool = False,
        lr_scale: float = 1.0,
        role: str | None = None,
        inputs: tuple[bool, ...] | None = None,
        units: tuple[str | None, ...] | None = None,
    ):
        self.axes = axes
        self.no_decay = no_decay
        self.keep_fp32 = keep_fp32
        self.lr_scale = lr_scale
        self.role = role
        self.inputs = (False,) * len(axes) if inputs is None else inputs
        self.units = axes if units is None else units

    @property
    def stacked(self) -> bool:
        """True where the first dimension counts layers."""
        return bool(self.axes) and self.axes[0] == 'layers'

    def __repr__(self) -> str:
        return f'Meta(axes={self.axes}, no_decay={self.no_decay}, lr_scale={self.lr_scale})'
