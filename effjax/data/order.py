"""Hashes and permutations of indices, computed on the fly: the order of data without a list of it.

Everything is integer arithmetic of fixed width, so that an order never depends on the machine, the
number of hosts, or a library's version, and costs no memory that grows with the data.
"""

import functools
import hashlib

import numpy as np

_ROUNDS = 6  # four make a Feistel network pseudo-random; tiny domains want the rest
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: the Weyl step of splitmix64
_MASK = (1 << 64) - 1


def fold(*parts: int | str) -> int:
    """Folds names and numbers into one key, an int of 64 bits."""
    text = '\0'.join(f'{type(p).__name__}:{p}' for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), 'little')


def hashed(index: np.ndarray, key: int) -> np.ndarray:
    """Returns a hash of each index: uint64, the same shape (splitmix64; Steele et al., 2014)."""
    x = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    x = x * np.uint64(_GOLDEN) + np.uint64(key & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).reshape(np.shape(index))


def draw(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Returns for each index a number in [0, size), int64, drawn uniformly with replacement."""
    return (hashed(index, key) % np.uint64(size)).astype(np.int64)


def permute(index: np.ndarray, size: int, key: int) -> np.ndarray:
    """Returns the images of `index` under a pseudo-random permutation of [0, size).

    A Feistel network over the next even power of two that walks its cycle until it is back inside
    [0, size) (Black and Rogaway, 2002): no memory beyond the indices asked for.

    Args:
      index: integers in [0, size), any shape.
      size: number of elements permuted.
      key: names the permutation.

    Returns:
      int64, the shape of `index`.
    """
    x = np.array(index, dtype=np.uint64)
    out = x.reshape(-1)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    keys = _round_keys(key)
    walking = np.arange(out.size)
    while walking.size:
        out[walking] = _feistel(out[walking], half, keys)
        walking = walking[out[walking] >= size]
    return x.astype(np.int64)


@functools.lru_cache(maxsize=64)
def _round_keys(key: int) -> list[int]:
    return [fold(key, r) for r in range(_ROUNDS)]


def _feistel(x: np.ndarray, half: int, keys: list[int]) -> np.ndarray:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> bits, x & mask
    for key in keys:
        # The high bits of the hash: the best mixed ones.
        left, right = right, left ^ (hashed(right, key) >> np.uint64(64 - half))
    return (left << bits) | right


def choose(index: np.ndarray, shares: list[float], key: int) -> np.ndarray:
    """Picks for each sample index one of several sources, in proportion to `shares`.

    The indices follow a Weyl sequence of the golden ratio, the most even one there is: over any n
    consecutive indices each source is chosen within a few of n times its share (at most 8 for two
    million; a random choice would be off by the square root of n).

    Args:
      index: int64 [n].
      shares: of each source; they sum to 1.
      key: shifts the sequence.

    Returns:
      int64 [n], the number of the source.
    """
    turn = np.asarray(index, dtype=np.int64).astype(np.uint64) * np.uint64(_GOLDEN)
    turn = turn + np.uint64(key & _MASK)
    edges = np.cumsum(np.asarray(shares, np.float64))[:-1]
    bounds = np.array([min(int(e * 2.0**64), _MASK) for e in edges], np.uint64)
    return np.searchsorted(bounds, turn, side='right').astype(np.int64)
