"""Operators on width whose new units are copies of old ones.

Along a dimension that a product does not sum over, a leaf's entries are copied with their unit;
along one that it sums over they are also multiplied by the copy's share. First moments then follow
the gradient: times the share along the former, times 1 along the latter; second moments its square;
averages of steps (Adafactor's momentum) are copied.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import ConfigError
from effjax.growth import check
from effjax.growth.base import Kind, Operator, Rule
from effjax.growth.change import Change, LeafChange
from effjax.growth.copies import Copies, Mapped, Shares, draw, equal


class Copying(Operator):
    """What operators that copy units share.

    Args:
      mapping: 'cyclic' copies unit j mod D; 'random' draws the units that are copied.
      noise: size of the noise, relative to a leaf's root mean square, that is added to products of
        copied inputs, with sum zero over the copies of each input: it leaves the function as it
        is and makes copies differ. 0: none.
    """

    shares: Shares = staticmethod(equal)

    def __init__(self, *, mapping: Mapped = 'cyclic', noise: float = 0.0):
        if not noise >= 0:
            raise ConfigError(f'{self.name!r}: noise must not be negative, got {noise}.')
        self.mapping, self.noise = mapping, float(noise)

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        check.width_only(change, self.name)
        copies = self.copies(change, seed)

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            if not leaf.grown():
                return x
            return self.grown(leaf, x, kind, copies, seed)

        return rule

    def copies(self, change: Change, seed: int) -> dict[str, Copies]:
        """Returns the copies of every space that grows.

        Raises:
          ConfigError: sizes that the operator cannot make.
        """
        return draw(change, seed, self.mapping, type(self).shares)

    def grown(
        self, leaf: LeafChange, x: jax.Array, kind: Kind, copies: dict[str, Copies], seed: int
    ) -> jax.Array:
        """Returns a leaf with more units, in its own dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = self.copied(leaf, wide, copies)
        factor = self.factor(leaf, kind, copies)
        if np.any(factor != 1):
            y = y * jnp.asarray(factor, y.dtype)
        if kind == 'value' and self.noise:
            y = y + silent_noise(leaf, wide, copies, self.noise, seed)
        return y.astype(x.dtype)

    def copied(self, leaf: LeafChange, x: jax.Array, copies: dict[str, Copies]) -> jax.Array:
        """Returns a leaf's entries copied along every dimension that grows."""
        for dim in leaf.grown():
            x = jnp.take(x, copies[str(leaf.spaces[dim])].index, axis=dim)
        return x

    def factor(self, leaf: LeafChange, kind: Kind, copies: dict[str, Copies]) -> np.ndarray:
        """Returns what copied entries are multiplied by, to be broadcast over the leaf."""
        out = np.ones([1] * len(leaf.new))
        for dim in leaf.grown() if kind != 'step' else ():
            share = copies[str(leaf.spaces[dim])].share
            if leaf.meta.inputs[dim] == (kind == 'value'):
                out = out * along(share**2 if kind == 'second' else share, dim, leaf)
        return out


class Net2Net(Copying):
    """Copies of units, whose readers weigh each by 1 / (number of copies).

    Net2WiderNet (Chen et al., arXiv 1511.05641), and bert2BERT's function preserving
    initialisation (Chen et al., arXiv 2110.07143): `W'[i, j] = W[g(i), g(j)] / count(g(i))`, heads
    and their keys copied whole. Exact where norms see every unit equally often, so that the large
    width must be a multiple of the small one. Gradients: 1 / count along outputs, 1 along inputs;
    moments follow. Copies stay copies in training unless `noise` tells them apart.
    """

    name = 'net2net'
    preserves_function = True

    @property
    def breaks_symmetry(self) -> bool:  # type: ignore[override]
        """Whether there is noise."""
        return self.noise > 0

    def copies(self, change: Change, seed: int) -> dict[str, Copies]:
        old, new = change.spaces['embed']
        if new % old:
            raise ConfigError(
                f'{self.name!r} copies every unit that a norm reads equally often, but the width '
                f'goes from {old} to {new}, no multiple, which would change its statistics; use '
                f"'lemon', or a width of {-(-new // old) * old}."
            )
        return super().copies(change, seed)


class Aki(Copying):
    """Copies of units, those that are new taken from the layer above.

    bert2BERT's advanced knowledge initialisation (Chen et al., arXiv 2110.07143): inputs as in
    'net2net', but of products and biases in the body, output units that are not the first copy of
    an old one come from the same slot's next layer; the last layer takes its own. Does not
    preserve the function; copies differ from the start. Moments come from the same layers.
    """

    name = 'aki'

    def copied(self, leaf: LeafChange, x: jax.Array, copies: dict[str, Copies]) -> jax.Array:
        y = super().copied(leaf, x, copies)
        outputs = [dim for dim in leaf.grown() if not leaf.meta.inputs[dim]]
        if not leaf.meta.stacked or leaf.meta.role not in ('product', 'bias') or not outputs:
            return y
        above = jnp.concatenate([y[1:], y[-1:]])
        fresh = np.zeros([1] * y.ndim, bool)
        for dim in outputs:
            fresh = fresh | along(copies[str(leaf.spaces[dim])].copy > 0, dim, leaf)
        return jnp.where(fresh, above, y)


class Staged(Copying):
    """Twice the width in blocks: `[[W + Z, Z2], [-Z, W - Z2]]`.

    Staged Training (Shen et al., arXiv 2203.06211) doubles embeddings, heads, and hidden units,
    with `[[W, 0], [0, W]]` for products. Their halves get the same gradients for ever, so that the
    large model learns no more than the small one; random Z, Z2 (here any noise whose sum over the
    two copies of an input is zero) tells them apart and leaves the function exact. The gradient of
    all four blocks is half of the small one's, and all four get moments: m / 2 and v / 4.

    Args:
      repair_symmetry: add the noise. False is the published code.
      repair_moments: give the off-diagonal blocks their moments. False leaves them zero, as the
        published code does; with counts carried on, their first step is then
        (1 - b1) / sqrt(1 - b2) learning rates.
      noise: size of the noise relative to a leaf's root mean square.
    """

    name = 'staged'
    preserves_function = True

    def __init__(
        self, *, repair_symmetry: bool = True, repair_moments: bool = True, noise: float = 0.1
    ):
        super().__init__(noise=noise if repair_symmetry else 0.0)
        self.repair_moments = repair_moments

    @property
    def breaks_symmetry(self) -> bool:  # type: ignore[override]
        """Whether there is noise."""
        return self.noise > 0

    def copies(self, change: Change, seed: int) -> dict[str, Copies]:
        for key, (old, new) in change.spaces.items():
            if new not in (old, 2 * old):
                raise ConfigError(
                    f"'staged' doubles sizes, but {key} goes from {old} to {new}; use {2 * old}, "
                    "or 'net2net' or 'lemon'."
                )
        return super().copies(change, seed)

    def factor(self, leaf: LeafChange, kind: Kind, copies: dict[str, Copies]) -> np.ndarray:
        out = super().factor(leaf, kind, copies)
        inputs = [dim for dim in leaf.grown() if leaf.meta.inputs[dim]]
        outputs = [dim for dim in leaf.grown() if not leaf.meta.inputs[dim]]
        if leaf.meta.role != 'product' or not inputs or not outputs:
            return out
        # Of two copies of an input an output reads one, whole, in place of half of each.
        read = np.ones([1] * len(leaf.new))
        for i in inputs:
            for o in outputs:
                a, b = (copies[str(leaf.spaces[dim])].copy for dim in (i, o))
                read = read * (along(a, i, leaf) == along(b, o, leaf))
        if kind == 'value':
            return read * np.ones_like(out)
        return out if self.repair_moments else out * read


def along(vector: np.ndarray, dim: int, leaf: LeafChange) -> np.ndarray:
    """Returns a vector shaped to lie along one dimension of a leaf."""
    return vector.reshape([-1 if i == dim else 1 for i in range(len(leaf.new))])


def silent_noise(
    leaf: LeafChange, x: jax.Array, copies: dict[str, Copies], size: float, seed: int
) -> Any:
    """Returns noise that sums to zero over the copies of each input of a product; 0 elsewhere.

    Args:
      leaf: the leaf.
      x: its old values, whose root mean square (of each layer) the noise is relative to.
      copies: by space.
      size: standard deviation, relative.
      seed: of the noise, together with the leaf's name.
    """
    inputs = [dim for dim in leaf.grown() if leaf.meta.inputs[dim]]
    if leaf.meta.role != 'product' or not inputs:
        return 0.0
    z = size * root_mean_square(leaf, x) * normal(leaf, x.dtype, seed)
    for dim in inputs:
        mean = jnp.asarray(copies[str(leaf.spaces[dim])].mean, x.dtype)
        centre = jnp.tensordot(mean, z, (1, dim), precision=jax.lax.Precision.HIGHEST)
        z = z - jnp.moveaxis(centre, 0, dim)
    return z


def normal(leaf: LeafChange, dtype: Any, seed: int) -> jax.Array:
    """Returns standard normal noise of a leaf's new shape, from the seed and the leaf's name."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(leaf.name.encode()) & 0x7FFFFFFF)
    return jax.random.normal(key, leaf.new, dtype)


def root_mean_square(leaf: LeafChange, x: jax.Array) -> jax.Array:
    """Returns the root mean square of each layer, to be broadcast over the leaf."""
    dims = tuple(range(int(leaf.meta.stacked), x.ndim))
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=dims, keepdims=True))
