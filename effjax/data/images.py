"""Image sources: indexed examples with labels, split by content.

A subclass implements `_scan` (one pass over a part: digests and labels) and `_take` (some images).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from effjax.core.errors import DataError
from effjax.data import cache
from effjax.data import split as splitting


@dataclasses.dataclass(frozen=True)
class Index:
    """What one pass over a part of a source found.

    Attributes:
      digests: 16 bytes an example, of the image's content.
      labels: int32 [N].
    """

    digests: list[bytes]
    labels: np.ndarray

    def to_json(self) -> dict[str, Any]:
        return {'digests': [d.hex() for d in self.digests], 'labels': self.labels.tolist()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> 'Index':
        digests = [bytes.fromhex(d) for d in value['digests']]
        return cls(digests, np.array(value['labels'], dtype=np.int32))


class Examples:
    """The examples of one split, by position; always in the same order."""

    def __init__(
        self,
        take: Callable[[np.ndarray], np.ndarray],
        positions: np.ndarray,
        labels: np.ndarray,
    ):
        """Holds positions into the source.

        Args:
          take: maps int64 [N] positions to uint8 [N, H, W, C] images.
          positions: int64; which of the source's examples these are.
          labels: int32, of all the source's examples.
        """
        self._take = take
        self._positions = positions
        self.labels = labels[positions]  # int32 [len]

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, indices: slice | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns `image` uint8 [N, H, W, C] and `label` int32 [N]."""
        if not isinstance(indices, slice):
            indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        return {'image': self._take(self._positions[indices]), 'label': self.labels[indices]}


class ImageSource:
    """Base of the image sources.

    Attributes:
      name: short name of the source.
      image_shape: (H, W, C) of every image.
      class_names: a name for each label.
      classes: how many labels there are.
      splits: ('train', 'valid'), or ('train',) when `valid_fraction` is 0.
    """

    modality: ClassVar[str] = 'image'

    def __init__(
        self,
        name: str,
        valid_fraction: float,
        *,
        image_shape: tuple[int, int, int],
        class_names: Sequence[str],
        own_valid: bool = False,
    ):
        """Sets what all image sources share.

        Args:
          name: short name of the source.
          valid_fraction: held-out part of the images, by content, in [0, 1).
          image_shape: (H, W, C).
          class_names: a name for each label.
          own_valid: the source has a held-out part of its own, 'valid' beside 'train'.

        Raises:
          ConfigError: `valid_fraction` is not in [0, 1).
        """
        self.name = name
        self.valid_fraction = float(valid_fraction)
        self.image_shape = image_shape
        self.class_names = tuple(class_names)
        self.classes = len(self.class_names)
        self.splits = splitting.names(valid_fraction, own_valid)
        self._own_valid = own_valid
        self._indexed: dict[str, Index] = {}

    def _scan(self, part: str) -> Index:
        """Reads a part ('all', or 'train' and 'valid' of a source that holds out its own)."""
        raise NotImplementedError

    def _take(self, part: str, positions: np.ndarray) -> np.ndarray:
        """Returns uint8 [N, H, W, C] images of a part."""
        raise NotImplementedError

    def _identity(self, part: str) -> Any | None:
        """Returns what a part's index depends on, to keep it in the cache; None keeps nothing."""
        return None

    def _facts(self) -> dict[str, Any]:
        """Returns what `describe` shows of this source only."""
        return {}

    def examples(self, split: str) -> Examples:
        """Returns the examples of a split.

        Raises:
          DataError: no such split, or a split without an example.
        """
        splitting.check(split, self.splits, self.name)
        part = split if self._own_valid else 'all'
        index = self._index(part)
        if not self._own_valid:
            positions = splitting.indices(index.digests, split, self.valid_fraction)
        elif split == 'train':  # images that are also held out leave the training split
            held_out = set(self._index('valid').digests)
            positions = np.flatnonzero([d not in held_out for d in index.digests])
        else:
            positions = np.arange(len(index.digests))
        if not len(positions):
            why = '' if self._own_valid else '; change valid_fraction or give more images'
            raise DataError(f'the split {split!r} of source {self.name!r} is empty{why}.')
        return Examples(functools.partial(self._take, part), positions, index.labels)

    def arrays(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns images uint8 [N, H, W, C] and labels int32 [N] of a split that fits in memory."""
        batch = self.examples(split)[:]
        return batch['image'], batch['label']

    def describe(self) -> dict[str, Any]:
        """Returns counts by split and class, the image shape, and the digest of both splits."""
        both = hashlib.blake2b(digest_size=16)
        counts = {}
        for split in self.splits:
            examples = self.examples(split)
            index = self._index(split if self._own_valid else 'all')
            both.update(split.encode())
            for position in examples._positions:
                both.update(index.digests[position] + index.labels[position].tobytes())
            by_class = np.bincount(examples.labels, minlength=self.classes)
            counts[split] = {'examples': len(examples), 'by_class': by_class.tolist()}
        return {
            'source': self.name,
            'modality': self.modality,
            **self._facts(),
            'examples': sum(c['examples'] for c in counts.values()),
            **counts,
            'image_shape': list(self.image_shape),
            'classes': self.classes,
            'valid_fraction': self.valid_fraction,
            'digest': both.hexdigest(),
        }

    def _index(self, part: str) -> Index:
        if part not in self._indexed:
            identity = self._identity(part)
            if identity is None:
                self._indexed[part] = self._scan(part)
            else:
                value = cache.remember('images', identity, lambda: self._scan(part).to_json())
                self._indexed[part] = Index.from_json(value)
        return self._indexed[part]


def index_arrays(images: np.ndarray, labels: np.ndarray) -> Index:
    """Returns the index of images held in memory, uint8 [N, H, W, C] with labels [N]."""
    digests = [splitting.digest(np.ascontiguousarray(image).tobytes()) for image in images]
    return Index(digests, labels.astype(np.int32))
