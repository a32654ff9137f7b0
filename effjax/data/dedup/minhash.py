"""MinHash signatures, and the bands by which similar ones meet (Broder, 1997; LSH).

A signature holds, for each of P permutations, the least image of the document's shingles; two
signatures agree in one place with a probability of the Jaccard similarity J of the two sets. Cut
into b bands of r rows, two documents share at least one band with probability 1 - (1 - J^r)^b
(Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, chapter 3).

The permutations are x -> a x + c modulo 2^32 with a odd, on the high half of a shingle's hash:
bijections, so that the least image is of one shingle. Linear maps are nearly min-wise independent
on almost every set (Bohman, Cooper and Frieze, 2000), and shingles are as good as drawn: they come
out of a mixer. Two shingles of one half (odds of 2^-32 for a pair) count as one in the signature,
never in `verify`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from effjax.core.errors import ConfigError
from effjax.data import order
from effjax.data.dedup import hashing

_HALF = np.uint64(32)
_COLUMNS, _IMAGES = 1 << 12, 1 << 16  # held at once: 256 KB, what the second cache holds


def permutations(count: int, seed: int = 0) -> np.ndarray:
    """Returns the maps of a signature: uint32 [P, 2], each an odd factor and an offset.

    The first of more permutations are those of fewer.

    Raises:
      ConfigError: fewer than 1.
    """
    if count < 1:
        raise ConfigError(f'permutations must be at least 1, got {count}.')
    drawn = order.hashed(np.arange(2 * count), order.fold('minhash', seed)) >> np.uint64(32)
    seeds = drawn.astype(np.uint32).reshape(count, 2)
    seeds[:, 0] |= np.uint32(1)
    return seeds


def sign(shingles: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """Returns the MinHash signature of a set.

    Args:
      shingles: uint64 [S], well mixed, in any order.
      seeds: uint32 [P, 2], from `permutations`.

    Returns:
      uint32 [P]; all ones where S is 0, which must not be compared.
    """
    return sign_many([shingles], seeds)[0]


def sign_many(sets: Sequence[np.ndarray], seeds: np.ndarray) -> np.ndarray:
    """Returns the signatures of many sets, small ones together: uint32 [N, P]; see `sign`.

    Memory beyond the result: four bytes a shingle, and half a MB; never P times the shingles.
    """
    sizes = np.array([s.size for s in sets], np.int64)
    filled = np.flatnonzero(sizes)
    starts = np.cumsum(sizes[filled]) - sizes[filled]
    values = np.empty(int(sizes.sum()), np.uint32)
    for start, at in zip(starts.tolist(), filled.tolist(), strict=True):
        values[start : start + sizes[at]] = sets[at] >> _HALF
    least = np.full((len(seeds), filled.size), 0xFFFFFFFF, np.uint32)
    for at in range(0, values.size, _COLUMNS):
        block = values[at : at + _COLUMNS]
        first = np.searchsorted(starts, at, side='right') - 1
        last = np.searchsorted(starts, at + block.size)
        cuts = np.maximum(starts[first:last] - at, 0)
        rows = _IMAGES // block.size
        for row in range(0, len(seeds), rows):
            images = block * seeds[row : row + rows, :1]
            images += seeds[row : row + rows, 1:]
            part = least[row : row + rows, first:last]
            np.minimum(part, np.minimum.reduceat(images, cuts, axis=1), out=part)
    out = np.full((len(sets), len(seeds)), 0xFFFFFFFF, np.uint32)
    out[filled] = least.T
    return out


def band_keys(signatures: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """Hashes each band of signatures: equal for documents that agree in all rows of a band.

    The band's number is hashed with it: keys of all bands may go into one group-by.

    Args:
      signatures: uint32 [..., P].
      bands: b.
      rows: r; the first b r places of a signature are used.

    Returns:
      uint64 [..., b].

    Raises:
      ConfigError: b r exceeds P, or one of them is below 1.
    """
    check(bands, rows, signatures.shape[-1])
    cut = signatures[..., : bands * rows].astype(np.uint64)
    cut = hashing.mix(cut.reshape(*signatures.shape[:-1], bands, rows))
    numbers = np.arange(1, bands + 1, dtype=np.uint64)
    keys = np.broadcast_to(numbers, cut.shape[:-1]).copy()
    for row in range(rows):
        keys = hashing.mix(keys ^ cut[..., row])
    return keys


def estimate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Estimates J as the part of places in which two signatures agree: float64, over the last axis.

    Unbiased; its standard deviation is sqrt(J (1 - J) / P), at most .044 for P = 128.
    """
    return np.mean(a == b, axis=-1)


def s_curve(jaccard: np.ndarray | float, bands: int, rows: int) -> np.ndarray:
    """Returns the probability that two documents of this similarity share a band: float64."""
    return 1 - (1 - np.asarray(jaccard, np.float64) ** rows) ** bands


@dataclasses.dataclass(frozen=True)
class Bands:
    """How a signature is cut: `bands` of `rows`, of which `unused` permutations are left over."""

    bands: int
    rows: int
    unused: int


def choose(threshold: float, permutations: int, recall: float = 0.98) -> Bands:
    """Chooses bands and rows for a search whose candidates are verified.

    Verification removes every false candidate, so that precision needs no help here: of all
    choices that find a pair at the threshold with probability `recall`, the one with the most
    rows, which has the fewest candidates below the threshold, with as many bands as fit.

    Args:
      threshold: the Jaccard similarity from which documents are duplicates, in (0, 1].
      permutations: P.
      recall: the least probability of finding a pair exactly at the threshold, in (0, 1).

    Raises:
      ConfigError: a value out of its range, or no choice reaches the recall.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f'threshold must be above 0 and at most 1, got {threshold}.')
    if not 0 < recall < 1:
        raise ConfigError(f'recall must be above 0 and below 1, got {recall}.')
    if permutations < 1:
        raise ConfigError(f'permutations must be at least 1, got {permutations}.')
    for rows in range(permutations, 0, -1):
        bands = permutations // rows
        if s_curve(threshold, bands, rows) >= recall:
            return Bands(bands, rows, permutations - bands * rows)
    raise ConfigError(
        f'no bands of {permutations} permutations find a pair at Jaccard {threshold:g} with '
        f'probability {recall:g}; raise permutations or threshold, or lower recall.'
    )


def check(bands: int, rows: int, permutations: int) -> None:
    """Checks that the bands fit the signature.

    Raises:
      ConfigError: they do not.
    """
    if bands < 1 or rows < 1:
        raise ConfigError(f'bands and rows must be at least 1, got {bands} and {rows}.')
    if bands * rows > permutations:
        raise ConfigError(
            f'{bands} bands of {rows} rows need {bands * rows} permutations, and there are '
            f'{permutations}; raise permutations, or lower bands or rows.'
        )
