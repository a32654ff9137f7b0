"""Handwritten digits, 1797 images of 8x8: the image set that ships with effjax.

The file and its licence stand in `effjax/data/builders`.
"""

import gzip
import hashlib
import importlib.resources
import zlib

import numpy as np

from effjax.core.errors import DataError
from effjax.data.images import ImageSource, Index, index_arrays

_FILE = 'digits.csv.gz'
_DIGEST = '81aa993702d8610957934db48ff9b143'  # BLAKE2b-128 of the uncompressed file


def load() -> tuple[np.ndarray, np.ndarray]:
    """Reads the embedded file.

    Returns:
      images uint8 [1797, 8, 8, 1], the file's 0..16 stretched to 0..255; labels int32 [1797].

    Raises:
      DataError: the file is missing or damaged.
    """
    try:
        file = importlib.resources.files('effjax.data.builders').joinpath(_FILE)
        text = gzip.decompress(file.read_bytes())
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f'the embedded {_FILE} cannot be read ({e}); install effjax again.') from e
    if hashlib.blake2b(text, digest_size=16).hexdigest() != _DIGEST:
        raise DataError(f'the embedded {_FILE} is damaged; install effjax again.')
    rows = np.array([line.split(b',') for line in text.split()], dtype=np.int64)
    images = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return images, rows[:, 64].astype(np.int32)


class Digits(ImageSource):
    """The embedded handwritten digits."""

    def __init__(self, *, valid_fraction: float = 0.2):
        """Reads the file.

        Args:
          valid_fraction: held-out part of the images, by content.

        Raises:
          ConfigError: a bad argument.
          DataError: the file is missing or damaged.
        """
        names = [str(digit) for digit in range(10)]
        super().__init__('digits', valid_fraction, image_shape=(8, 8, 1), class_names=names)
        self._images, self._labels = load()

    def _scan(self, part: str) -> Index:
        return index_arrays(self._images, self._labels)

    def _take(self, part: str, positions: np.ndarray) -> np.ndarray:
        return self._images[positions]
