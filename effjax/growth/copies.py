"""Which old unit each new unit copies, and how copies share what the old one gave to its readers.

With `copies` of a unit whose readers weigh them by `share`, 1 in sum over the copies, readers get
what they got. The gradient that reaches a copy is then `share` of the old unit's.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from effjax.core.errors import ConfigError
from effjax.growth.change import Change

Mapped = Literal['cyclic', 'random']
Shares = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Copies:
    """The units of one space.

    Attributes:
      old: number of old units.
      index: [new] the old unit that a new one copies.
      share: [new] float64 weight of a copy for its readers.
      padded: last new units that copy none (`lemon`); their index and share are 0.
    """

    old: int
    index: np.ndarray
    share: np.ndarray
    padded: int = 0

    @property
    def new(self) -> int:
        """Number of new units."""
        return len(self.index)

    @property
    def copy(self) -> np.ndarray:
        """[new] 0 for the first copy of a unit, 1 for the second, ..."""
        same = self.index[:, None] == self.index[None, :]
        return np.tril(same, -1).sum(1)

    @property
    def mean(self) -> np.ndarray:
        """[new, new] matrix that replaces each unit by the mean over the copies of its source."""
        same = (self.index[:, None] == self.index[None, :]).astype(np.float64)
        return same / same.sum(1, keepdims=True)


def equal(index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns shares that are the same for all copies of a unit."""
    del rng
    return 1.0 / np.bincount(index)[index]


def unequal(index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns shares that differ: uniform from 0.5 to 1.5, divided by their sum over a unit."""
    weight = rng.uniform(0.5, 1.5, len(index))
    return weight / np.bincount(index, weight)[index]


def draw(change: Change, seed: int, mapping: Mapped, shares: Shares) -> dict[str, Copies]:
    """Returns the copies of every space whose size changes.

    Args:
      change: from where to where.
      seed: of random maps and unequal shares, together with the space's name.
      mapping: 'cyclic' is j mod old; 'random' draws old units, each of them equally often where a
        norm reads the space (the model's width) and the sizes allow it.
      shares: `equal` or `unequal`.

    Raises:
      ConfigError: grouped queries that cannot be copied with their keys.
    """
    if mapping not in ('cyclic', 'random'):
        raise ConfigError(f"mapping must be 'cyclic' or 'random', got {mapping!r}.")
    grown = {key: sizes for key, sizes in change.spaces.items() if sizes[0] != sizes[1]}
    out = {}
    for key, (old, new) in grown.items():
        if key.endswith((':heads', ':kv_heads')):
            out[key] = _heads(key, change.spaces, seed, mapping, shares)
        else:
            rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
            out[key] = _units((old, new), mapping, shares, rng, even=key == 'embed')
    return out


def _units(
    sizes: tuple[int, int],
    mapping: Mapped,
    shares: Shares,
    rng: np.random.Generator,
    *,
    even: bool = False,
) -> Copies:
    old, new = sizes
    if mapping == 'cyclic':
        index = np.arange(new) % old
    elif even:
        rounds = [np.arange(old), *(rng.permutation(old) for _ in range(new // old))]
        index = np.concatenate(rounds)[:new]
    else:
        index = np.concatenate([np.arange(old), rng.integers(0, old, new - old)])
    return Copies(old, index, shares(index, rng))


def _heads(
    key: str, spaces: Mapping[str, tuple[int, int]], seed: int, mapping: Mapped, shares: Shares
) -> Copies:
    """Copies of heads: a query head goes where its keys and values go.

    Query head h reads key-value head h // R. Key-value heads are copied as groups, queries within
    a group, and shares multiply.
    """
    owner = key.rsplit(':', 1)[0]
    heads, groups = spaces[f'{owner}:heads'], spaces[f'{owner}:kv_heads']
    rows = heads[0] // groups[0], heads[1] // groups[1]
    if rows[1] < rows[0]:
        raise ConfigError(
            f'{owner} goes from {rows[0]} to {rows[1]} queries a key-value head, so that queries '
            'would lose the keys they read; raise heads at least as much as kv_heads.'
        )
    rng = np.random.default_rng([seed, zlib.crc32(owner.encode())])
    outer = _units(groups, mapping, shares, rng)
    if key.endswith(':kv_heads'):
        return outer
    inner = _units(rows, mapping, shares, rng)
    index = (outer.index[:, None] * rows[0] + inner.index[None, :]).reshape(-1)
    share = (outer.share[:, None] * inner.share[None, :]).reshape(-1)
    return Copies(heads[0], index, share)
