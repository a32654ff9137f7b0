"""Mixtures: several text sources in given proportions.

    data = dict(kind='mixture', weights=dict(code=3, prose=1),
                sources=dict(code=dict(kind='stdlib'), prose=dict(kind='text', path='books')),
                tokenizer=dict(kind='bpe', vocab_size=4096), packing='pack')

One tokenizer serves all; where it has to be trained it sees every source's training split. A
weight is the share of *samples* (rows) drawn from a source; the shares are met within a few
samples over any stretch of training. Each source keeps its own place, epoch and held-out split:
evaluations may name 'code/valid', or 'valid' for all of them in turn.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, ClassVar

from effjax.core.errors import ConfigError, DataError
from effjax.core.registry import suggest
from effjax.data import cache
from effjax.data.documents import Document


class Mixture:
    """`dict(kind='mixture')`: looks like one source that holds all their documents.

    Attributes:
      members: name -> source, in the config's order.
      shares: name -> its part of the samples; they sum to 1.
      splits: those that every source has.
    """

    modality: ClassVar[str] = 'text'
    one_document: ClassVar[bool] = False

    def __init__(self, *, sources: dict, weights: dict):
        """Builds the sources.

        Args:
          sources: name -> source block.
          weights: name -> share of the samples, in any unit; 0 leaves a source out of training.

        Raises:
          ConfigError: a bad block or weight.
          DataError: a source that has no data.
        """
        from effjax.data.dataset import build_source

        _check_weights(sources, weights)
        total = float(sum(weights.values()))
        self.shares = {name: weights[name] / total for name in sources}
        self.members: dict[str, Any] = {}
        for name, block in sources.items():
            member = build_source(block, f'config.data.sources.{name}')
            if member.modality != 'text' or isinstance(member, Mixture):
                raise ConfigError(
                    f'config.data.sources.{name}: a mixture mixes text sources, not '
                    f'{block["kind"]!r}.'
                )
            self.members[name] = member
        self.splits = tuple(
            split
            for split in next(iter(self.members.values())).splits
            if all(split in m.splits for m in self.members.values())
        )

    def documents(self, split: str) -> Iterator[Document]:
        """Streams the documents of all sources, one source after another.

        Raises:
          DataError: a source without that split.
        """
        for name, member in self.members.items():
            if split not in member.splits:
                raise DataError(
                    f'source {name!r} of the mixture has no split {split!r}; it has '
                    f'{", ".join(member.splits)}.'
                )
        return itertools.chain.from_iterable(m.documents(split) for m in self.members.values())

    def describe(self) -> dict[str, Any]:
        """Returns what each source says of itself, the shares, and a digest of all sources."""
        described = {name: member.describe() for name, member in self.members.items()}
        return {
            'source': 'mixture',
            'modality': 'text',
            'shares': dict(self.shares),
            'sources': described,
            # Not of the weights: another mixture of the same text needs no other tokenizer.
            'digest': cache.key({name: d['digest'] for name, d in described.items()}),
        }


def _check_weights(sources: dict, weights: dict) -> None:
    if not sources:
        raise ConfigError('config.data.sources: a mixture needs at least one source.')
    for name in weights:
        if name not in sources:
            raise ConfigError(
                f'config.data.weights.{name}: there is no such source.' + suggest(name, sources)
            )
    for name in sources:
        if '/' in name:
            raise ConfigError(f'config.data.sources.{name}: a name may not contain a slash.')
        if name not in weights:
            raise ConfigError(f'config.data.weights: give {name!r} a weight.')
        weight = weights[name]
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ConfigError(
                f'config.data.weights.{name} must be a number of at least 0, got {weight!r}.'
            )
    if not sum(weights.values()):
        raise ConfigError('config.data.weights are all 0; give at least one source a weight.')
