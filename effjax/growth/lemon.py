"""LEMON: exact growth of the width to any size, with unequal shares."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import ConfigError
from effjax.growth import check
from effjax.growth.base import Kind, Rule
from effjax.growth.change import Change, LeafChange
from effjax.growth.copies import Copies, Mapped, unequal
from effjax.growth.width import Copying, along, normal, root_mean_square
from effjax.layers.norms import LayerNorm


class Lemon(Copying):
    """Copies of units with unequal shares; what is left of the width is filled without effect.

    LEMON (Wang et al., arXiv 2310.07999). `W'[i, j] = share(i) W[g(i), g(j)]`, shares of a unit's
    copies adding up to 1 and unequal, so that copies part in training. Where the width D' is
    c D + r, every unit is there c times and r units are filled: with the mean of the old units
    under LayerNorm ("average expansion"), with zero under RMSNorm. A norm then sees c D / D' of the
    variance; its scale is multiplied by sqrt(c D / D') and the large config's eps must be
    c D / D' of the small one's. What reads a filled unit reads 0, so that its weights are free:
    they are drawn, as large as the others, and the unit can learn.

    Moments follow the gradient as in 'net2net', with the shares; upstream of a norm whose copies
    have unequal shares that is an approximation. Filled units get no moments.

    Args:
      mapping: 'cyclic' or 'random': which hidden units and heads are copied more often.
    """

    name = 'lemon'
    preserves_function = True
    changes_eps = True
    shares = staticmethod(unequal)

    def __init__(self, *, mapping: Mapped = 'cyclic'):
        super().__init__(mapping=mapping)

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        check.width_only(change, self.name)
        mean = any(isinstance(norm, LayerNorm) for _, norm in change.norms.values())
        if mean and change.spaces['embed'][1] % change.spaces['embed'][0]:
            _check_filled_by_mean(change)
        check_eps(change, kept(*change.spaces['embed']), self.name)
        copies = self.copies(change, seed)

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            if not leaf.grown():
                return x
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            y = self.grown(leaf, wide, kind, copies, seed)
            for dim in leaf.grown():
                if leaf.spaces[dim] == 'embed':
                    y = _filled(leaf, dim, y, wide, kind, copies['embed'], mean, seed)
            return y.astype(x.dtype)

        return rule

    def copies(self, change: Change, seed: int) -> dict[str, Copies]:
        out = super().copies(change, seed)
        if 'embed' in out:
            old, new = change.spaces['embed']
            index = out['embed'].index[: new // old * old]
            share = unequal(index, np.random.default_rng([seed, zlib.crc32(b'embed')]))
            none = np.zeros(new % old)
            index = np.concatenate([index, none.astype(index.dtype)])
            out['embed'] = Copies(old, index, np.concatenate([share, none]), new % old)
        return out


def kept(old: int, new: int) -> float:
    """Returns the share of a width's variance that its norms still see: c D / D'."""
    return new // old * old / new


def _filled(
    leaf: LeafChange,
    dim: int,
    y: jax.Array,
    x: jax.Array,
    kind: Kind,
    units: Copies,
    mean: bool,
    seed: int,
) -> jax.Array:
    """Puts into the last units along `dim` of a grown leaf what has no effect."""
    if leaf.meta.role == 'scale':
        root = math.sqrt(kept(units.old, units.new))
        y = y * {'value': root, 'first': 1 / root, 'second': 1 / root**2, 'step': 1.0}[kind]
    if not units.padded:
        return y
    last = along(np.arange(units.new) >= units.new - units.padded, dim, leaf)
    fill: jax.Array = jnp.zeros((), y.dtype)
    if kind == 'value':
        if leaf.meta.role == 'scale':
            fill = jnp.mean(jax.lax.slice_in_dim(y, 0, units.old, axis=dim), dim, keepdims=True)
        elif leaf.meta.role == 'product' and leaf.meta.inputs[dim]:
            fill = root_mean_square(leaf, x) * normal(leaf, y.dtype, seed)
        elif mean and leaf.meta.role != 'shift':
            # The first units are the old ones, each once.
            fill = jnp.mean(jax.lax.slice_in_dim(y, 0, units.old, axis=dim), dim, keepdims=True)
    return jnp.where(last, fill, y)


def check_eps(change: Change, share: float, name: str) -> None:
    """Checks that norms that see a share of the large width have the eps that keeps them exact.

    Args:
      change: from where to where.
      share: of the width's variance that its norms still see.
      name: of the operator, for the error.

    Raises:
      ConfigError: saying the eps.
    """
    for path, (small, large) in change.norms.items():
        needed = small.eps * share
        if not math.isclose(large.eps, needed, rel_tol=1e-6):
            raise ConfigError(
                f'{name!r} to this width needs config.model.norm.eps={needed!r} in the large '
                f'config ({share:.6g} of the small one), but the norm {path} has {large.eps!r}.'
            )


def not_linear(change: Change) -> str:
    """Names what would not keep units at the mean of the others; '' if all that enters is linear.

    A unit whose weights are the mean of the other units' weights stays their mean as long as only
    linear products and tables write to the residual stream.
    """
    model, found = change.models[1], ''
    for slot in change.slots.values():
        kind = slot.block.label.split('(')[0]
        if kind not in ('sequential', 'parallel', 'reversible'):
            found = f'{kind!r} blocks ({slot.path})'
    for part in change.parts.values():
        if not part.spec.outputs:
            found = f'the {part.kind} ({part.path})'
    for name in ('embed_norm', 'transform'):
        if getattr(model, name, None) is not None:
            found = f'config.model.{name}'
    if model.norm is None:
        found = 'a head that reads the stream without a norm (config.model.final_norm)'
    return found


def _check_filled_by_mean(change: Change) -> None:
    """Checks that filled units stay the mean of the others.

    Raises:
      ConfigError: naming what stands in the way.
    """
    old, new = change.spaces['embed']
    found = not_linear(change)
    if found:
        raise ConfigError(
            f"'lemon' fills a width that is no multiple ({old} to {new}) with the mean under "
            f'LayerNorm, which {found} would not keep; use a width of {-(-new // old) * old}, or '
            "norm 'rmsnorm'."
        )
