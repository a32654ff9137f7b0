"""LiGO: the large model's weights as a linear function of the small one's, by learned maps."""

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.errors import ConfigError
from effjax.core.trees import differences, flatten, map_named
from effjax.growth.base import Kind, Operator, Rule
from effjax.growth.change import Change, LeafChange

Maps = dict[str, dict[str, jax.Array]]
_HIGHEST = jax.lax.Precision.HIGHEST


class Ligo(Operator):
    """`W'[l] = [I; B_out] (sum_k w[l, k] W[k]) [I; B_in]^T` with maps w and B.

    LiGO (Wang et al., arXiv 2303.00980). The first units stay the old ones, fixed; B says what the
    new ones are made of. One map B of the width is shared by everything that reads or writes the
    residual stream; each layer has maps of its own for queries, keys, values and hidden units; what
    reads them uses their map. Weights, and biases apart from them, mix layers by their own w.
    Norms and biases go with the outputs. Maps act on heads and head dimension as one; with grouped
    queries the last projection reads by the map of queries.

    A short phase of training learns the maps, the small weights frozen: in a run a stage of its own
    (`training.learning`, the paper's 100 steps), elsewhere whoever gives `maps`. This class makes
    the large weights of given maps (`materialise` is differentiable), or of the initial ones. Does
    not preserve the function, not even where 'sel' copies units: readers do not share.

    The optimizer's state is not grown: `moments='reset'`.

    Args:
      maps: what `init_maps` returned, after learning; None takes the initial ones.
      depth: initial w: 'stackbert' (one-hot, as 'stack'), 'stackbert_noisy' (plus uniform noise up
        to 0.03, rows normalised), 'interlace' (one-hot, as 'interpolate').
      width: initial B: 'uniform' (uniform, rows normalised) or 'sel' (one-hot: unit j mod D).
    """

    name = 'ligo'
    moments = 'reset'

    def __init__(
        self,
        *,
        maps: Mapping | None = None,
        depth: Literal['stackbert', 'stackbert_noisy', 'interlace'] = 'stackbert_noisy',
        width: Literal['uniform', 'sel'] = 'uniform',
    ):
        if depth not in ('stackbert', 'stackbert_noisy', 'interlace'):
            raise ConfigError(
                f"'ligo' starts depth at 'stackbert', 'stackbert_noisy' or 'interlace', not "
                f'{depth!r}.'
            )
        if width not in ('uniform', 'sel'):
            raise ConfigError(f"'ligo' starts width at 'uniform' or 'sel', not {width!r}.")
        self.maps, self.depth, self.width = maps, depth, width

    @property
    def breaks_symmetry(self) -> bool:  # type: ignore[override]
        """Whether new units differ: not those that 'sel' copies."""
        return self.maps is not None or self.width != 'sel'

    def bind(self, change: Change, seed: int) -> Rule:
        """See `Operator.bind`."""
        maps = self.first_maps(change, seed)

        def rule(leaf: LeafChange, x: jax.Array, kind: Kind) -> jax.Array:
            if kind != 'value':
                raise ConfigError(
                    "'ligo' grows no moments: they are no linear function of the small model's; "
                    "use moments='reset'."
                )
            return materialise(change, leaf, x, maps)

        return rule

    def first_maps(self, change: Change, seed: int) -> Maps:
        """Returns the maps that were given, or else the initial ones.

        Raises:
          ConfigError: a change that they cannot make, or maps of another change.
        """
        if self.maps is None:
            return self.init_maps(change, seed)
        return _fitting(jax.eval_shape(lambda: self.init_maps(change, seed)), self.maps)

    def init_maps(self, change: Change, seed: int) -> Maps:
        """Returns the maps before learning, float32.

        Returns:
          dict(depth={leaf: w [L', L]}, width={'embed': B [D' - D, D], 'PART:query': B [L', n' - n,
          n], ...}); only what grows has a map.
        """
        depth: dict[str, jax.Array] = {}
        width: dict[str, jax.Array] = {}
        for name, leaf in change.leaves.items():
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if leaf.meta.stacked and leaf.old[0] != leaf.new[0]:
                mix = self._mix(leaf.old[0], leaf.new[0], leaf.slot, rng)
                depth[name] = jnp.asarray(mix, jnp.float32)
            for key, dims in _grown(change, leaf):
                old, new = (
                    int(np.prod([shape[d] for d in dims])) for shape in (leaf.old, leaf.new)
                )
                if key not in width:
                    layers = () if key == 'embed' else (leaf.new[0],)
                    drawn = jax.random.fold_in(jax.random.key(seed), zlib.crc32(key.encode()))
                    width[key] = self._select(old, new, layers, drawn)
        return {'depth': dict(sorted(depth.items())), 'width': dict(sorted(width.items()))}

    def _mix(self, old: int, new: int, slot: str, rng: np.random.Generator) -> np.ndarray:
        if new % old:
            raise ConfigError(
                f"'ligo' starts from a multiple of layers, but {slot} goes from {old} to {new}; "
                f'use {max(1, round(new / old)) * old}.'
            )
        source = np.arange(new) * old // new if self.depth == 'interlace' else np.arange(new) % old
        w = np.eye(old)[source]
        if self.depth == 'stackbert_noisy':
            w = w + rng.uniform(0, 0.03, w.shape)
            w /= w.sum(1, keepdims=True)
        return w

    def _select(self, old: int, new: int, layers: tuple[int, ...], key: jax.Array) -> jax.Array:
        # By jax, since these are as large as weights: where it is traced, they are no constants.
        if self.width == 'sel':
            one_hot = jax.nn.one_hot(jnp.arange(old, new) % old, old, dtype=jnp.float32)
            return jnp.broadcast_to(one_hot, (*layers, new - old, old))
        b = jax.random.uniform(key, (*layers, new - old, old), jnp.float32)
        return b / b.sum(-1, keepdims=True)


def grown(change: Change, params: Any, maps: Maps) -> Any:
    """Returns the large model's parameters of the small one's, by maps."""
    return map_named(lambda name, x: materialise(change, change.leaves[name], x, maps), params)


def materialise(change: Change, leaf: LeafChange, x: jax.Array, maps: Maps) -> jax.Array:
    """Returns a large leaf of a small one by maps: linear in both, and differentiable in both.

    Args:
      change: from where to where.
      leaf: which one.
      x: the small model's values.
      maps: see `Ligo.init_maps`.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if leaf.name in maps['depth']:
        w = maps['depth'][leaf.name].astype(y.dtype)
        y = jnp.tensordot(w, y, 1, precision=_HIGHEST)
    for key, dims in _grown(change, leaf):
        y = _mapped(leaf, y, maps['width'][key].astype(y.dtype), dims)
    return y.astype(x.dtype)


def _mapped(leaf: LeafChange, y: jax.Array, b: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    """Puts `B y` behind y along dimensions that count as one; B may have layers in front."""
    first, old = dims[0], leaf.old[dims[0]]
    more = leaf.new[first] - old
    inner = [y.shape[d] for d in dims[1:]]
    flat = y.reshape(*y.shape[:first], -1, *y.shape[dims[-1] + 1 :])
    flat = jnp.moveaxis(flat, first, -1)
    each = 'lij,l...j->l...i' if b.ndim == 3 else 'ij,...j->...i'
    fresh = jnp.moveaxis(jnp.einsum(each, b, flat, precision=_HIGHEST), -1, first)
    fresh = fresh.reshape(*y.shape[:first], more, *inner, *y.shape[dims[-1] + 1 :])
    return jnp.concatenate([y, fresh], axis=first)


def _grown(change: Change, leaf: LeafChange) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the maps that a leaf needs, each with the dimensions that it acts on."""
    out: list[tuple[str, tuple[int, ...]]] = []
    for dim in leaf.grown():
        key, dims = str(leaf.spaces[dim]), (dim,)
        if leaf.meta.units[dim] in ('heads', 'kv_heads'):
            owner, product = key.rsplit(':', 1)[0], leaf.name.split('/')[4]
            if product == 'out':
                alone = change.spaces[f'{owner}:heads'] == change.spaces[f'{owner}:kv_heads']
                product = 'value' if alone else 'query'
            out.append((f'{owner}:{product}', (dim, dim + 1)))
        else:
            out.append((key, dims))
    return out


def _fitting(expected: Maps, maps: Mapping[str, Any]) -> Maps:
    """Returns learned maps, checked to be those that a change needs."""
    wrong = differences(flatten(expected), flatten(dict(maps)))
    if wrong:
        raise ConfigError(
            f"'ligo' got maps of another change ({wrong[0]}); begin with init_maps of this one."
        )
    return dict(maps)
