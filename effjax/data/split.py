"""The held-out split: by content, so that identical examples never straddle it, or by position."""

import hashlib

import numpy as np

from effjax.core.errors import ConfigError, DataError


def digest(content: bytes) -> bytes:
    """Returns the 16-byte BLAKE2b digest of an example's content."""
    return hashlib.blake2b(content, digest_size=16).digest()


def fraction_of(content_digest: bytes) -> float:
    """Maps a digest to [0, 1), uniformly over contents."""
    # 53 bits fit a float exactly, so that the result is below 1 on every machine.
    return (int.from_bytes(content_digest[:8], 'big') >> 11) / 2**53


def by_content(content: bytes, valid_fraction: float) -> str:
    """Returns 'valid' or 'train' from the content alone.

    Neither order, name nor number of examples matters: an example keeps its split when others are
    added or removed, and a larger fraction only moves examples from train to valid.
    """
    return 'valid' if fraction_of(digest(content)) < valid_fraction else 'train'


def by_position(text: str, valid_fraction: float) -> tuple[str, str]:
    """Cuts one document: the last `valid_fraction` of its characters is held out."""
    cut = int(len(text) * (1 - valid_fraction))
    return text[:cut], text[cut:]


def indices(digests: list[bytes], split: str, valid_fraction: float) -> np.ndarray:
    """Returns the positions, int64 and ascending, of the examples that belong to a split."""
    valid = np.array([fraction_of(d) < valid_fraction for d in digests], dtype=bool)
    return np.flatnonzero(valid if split == 'valid' else ~valid)


def names(valid_fraction: float, own_valid: bool) -> tuple[str, ...]:
    """Returns the splits of a source: 'train', and 'valid' where anything is held out.

    Args:
      valid_fraction: part held out by content or position.
      own_valid: the source has a held-out part of its own.

    Raises:
      ConfigError: `valid_fraction` is not in [0, 1).
    """
    if not 0 <= valid_fraction < 1:
        raise ConfigError(f'valid_fraction must be in [0, 1), got {valid_fraction}.')
    return ('train', 'valid') if valid_fraction > 0 or own_valid else ('train',)


def check(split: str, splits: tuple[str, ...], source: str) -> None:
    """Checks that a source has a split.

    Raises:
      DataError: it has not.
    """
    if split not in splits:
        raise DataError(
            f'source {source!r} has no split {split!r}; it has {", ".join(splits)}.'
            + (' Set valid_fraction above 0.' if split == 'valid' else '')
        )
