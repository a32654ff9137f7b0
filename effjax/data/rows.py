"""Synthetic rows: token rows of one length with labels at some positions, made as they are read.

A row is a pure function of its number and the source's arguments, by integer hashes: nothing is
stored, and the same rows come on every machine. Splits are drawn with keys of their own.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import cache, order
from effjax.data import split as splitting

VERSION = 1  # of what the sources make: part of their digest
TOKENS, AT, LABELS, SEGMENTS = 'tokens', 'at', 'labels', 'segment_ids'

Make = Callable[[np.ndarray, int], dict[str, np.ndarray]]


class Examples:
    """A split's rows, indexed.

    Args:
      make: (numbers int64 [N], key of the split) -> arrays with N in front.
      count: how many there are.
      key: of the split.
    """

    def __init__(self, make: Make, count: int, key: int):
        self._make, self._count, self._key = make, count, key

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns int32 arrays: `tokens` [N, T], `at` and `labels` [N, Q]."""
        if isinstance(indices, slice):
            indices = np.arange(*indices.indices(self._count))
        made = self._make(np.asarray(indices, np.int64).reshape(-1), self._key)
        return {name: array.astype(np.int32) for name, array in made.items()}


class RowSource:
    """Base of the sources of rows; a subclass gives `_make`.

    Attributes:
      seq_len: tokens T in a row.
      queries: labelled positions Q in a row.
      vocab_size: number of token ids; labels are token ids too.
      splits: 'train' and 'valid'.
    """

    modality: ClassVar[str] = 'rows'
    splits: ClassVar[tuple[str, ...]] = ('train', 'valid')

    def __init__(
        self,
        name: str,
        *,
        seq_len: int,
        queries: int,
        vocab_size: int,
        train: int,
        valid: int,
        seed: int,
        facts: dict[str, Any],
    ):
        """Sets what all sources of rows share.

        Args:
          name: short name of the source.
          seq_len: tokens in a row.
          queries: labelled positions in a row.
          vocab_size: number of token ids.
          train: rows of the training split.
          valid: rows of the held-out split.
          seed: of the content, whatever the run's seed is: all runs see the same rows.
          facts: the source's other arguments.

        Raises:
          ConfigError: a split without rows.
        """
        for key, value in (('train', train), ('valid', valid)):
            if value < 1:
                raise ConfigError(f'config.data.{key} must be at least 1 row, got {value}.')
        self.name, self.seq_len, self.queries = name, seq_len, queries
        self.vocab_size = vocab_size
        self._counts = {'train': train, 'valid': valid}
        self._described = {
            'source': name,
            'modality': self.modality,
            'seq_len': seq_len,
            'queries': queries,
            'vocab_size': vocab_size,
            'seed': seed,
            **facts,
        }
        # The number of rows is no part of it: a longer split begins with the shorter one.
        self._key = order.fold(name, VERSION, seed)

    def _make(self, index: np.ndarray, key: int) -> dict[str, np.ndarray]:
        """Returns `tokens` [N, T], `at` [N, Q] ascending and `labels` [N, Q] of rows [N]."""
        raise NotImplementedError

    def examples(self, split: str) -> Examples:
        """Returns the rows of a split.

        Raises:
          DataError: no such split.
        """
        splitting.check(split, self.splits, self.name)
        return Examples(self._make, self._counts[split], order.fold(self._key, split))

    def describe(self) -> dict[str, Any]:
        """Returns the arguments, counts by split, and a digest of both splits' content."""
        counts = {s: {'examples': n} for s, n in self._counts.items()}
        digest = cache.key(self._described, self._counts, VERSION)
        return {**self._described, **counts, 'digest': digest}


def uniform(index: np.ndarray, count: int, key: int) -> np.ndarray:
    """Returns float64 [N, count] in (0, 1), independent for each row number and column."""
    place = np.asarray(index, np.int64)[:, None] * count + np.arange(count)
    return ((order.hashed(place, key) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def integers(index: np.ndarray, count: int, size: int, key: int) -> np.ndarray:
    """Returns int64 [N, count] in [0, size), with replacement."""
    return (uniform(index, count, key) * size).astype(np.int64)


def distinct(index: np.ndarray, count: int, size: int, key: int) -> np.ndarray:
    """Returns int64 [N, count] in [0, size), without replacement within a row, in random order.

    Rows with a repeated number are drawn again, which leaves all others equally likely.
    """
    if 2 * count > size:  # too few to draw again: the first of a random order
        return np.argsort(uniform(index, size, key), axis=1, kind='stable')[:, :count]
    index = np.asarray(index, np.int64)
    out = np.empty((len(index), count), np.int64)
    left, turn = np.arange(len(index)), 0
    while len(left):
        drawn = integers(index[left], count, size, order.fold(key, turn))
        ordered = np.sort(drawn, axis=1)
        good = (ordered[:, 1:] != ordered[:, :-1]).all(axis=1)
        out[left[good]] = drawn[good]
        left, turn = left[~good], turn + 1
    return out


def weighted(index: np.ndarray, count: int, weights: np.ndarray, key: int) -> np.ndarray:
    """Returns int64 [N, count] places drawn one after another without replacement.

    Each draw takes one of the places left with a chance in proportion to its weight: the largest of
    log w + Gumbel noise, in order.

    Args:
      index: row numbers [N].
      count: places to draw.
      weights: positive, of each place.
      key: names the draw.
    """
    noise = -np.log(-np.log(uniform(index, len(weights), key)))
    return np.argsort(-(np.log(weights) + noise), axis=1, kind='stable')[:, :count]
